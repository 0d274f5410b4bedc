"""``d2obench list KIND``: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.plugin import Registry

Row = tuple[str, ...]


def command(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="suites, policies, tasks, metrics or models.")],
    plugins: Annotated[bool, typer.Option("--plugins", help="Only what other packages add.")] = False,
) -> None:
    """List suites, policies, tasks, metrics or models."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if kind not in _KINDS:
        raise UsageError(f"can't list '{kind}'", remedy=f"use one of {', '.join(_KINDS)}")
    header, rows = _KINDS[kind](plugins)
    table = Table(*header, box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fit
        console.width = 160
    console.print(table if table.row_count else f"no {kind} from other packages")


def _suites(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from d2obench.suite import load_suite, shipped

    names = [] if plugins else shipped()
    return ("suite", "tasks", "what it is for"), [
        (name, ", ".join(suite.axes.task), suite.about) for name in names for suite in [load_suite(name)]
    ]


def _policies(plugins: bool) -> tuple[Row, Iterable[Row]]:
    import dataclasses

    from d2obench.policies import REGISTRY, YARDSTICKS

    rows = []
    for name, origin in _names(REGISTRY, plugins):
        cls = REGISTRY.get(name)
        params = ", ".join(f"{field.name}={_word(field.default)}" for field in dataclasses.fields(cls))
        rows.append((name, "yes" if cls.takes_budget else "no", params, _first_line(cls), origin))
    if not plugins:
        rows += [(name, "no", "", f"transformers' own {name[3:]} cache, a yardstick", "") for name in YARDSTICKS]
    return ("policy", "budget", "parameters", "rule", "from"), rows


def _tasks(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from d2obench.tasks import REGISTRY
    from d2obench.tasks.base import parameters

    rows = [] if plugins else [("speed", "", "throughput, latency and peak memory of one batch of prompts", "")]
    for name, origin in _names(REGISTRY, plugins):
        cls = REGISTRY.get(name)
        params = ", ".join(f"{key}={_word(value)}" for key, value in parameters(cls).items())
        rows.append((name, params, _first_line(cls), origin))
    return ("task", "parameters", "what it asks", "from"), rows


def _metrics(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from d2obench.metric import METRICS

    better = {"lower": "lower", "higher": "higher", "none": ""}
    rows = [(key, m.header, m.unit, better[m.direction], m.kind, m.about) for key, m in METRICS.items()]
    return ("metric", "header", "unit", "better", "kind", "definition"), [] if plugins else rows


def _models(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from d2obench.models import REGISTRY, known

    if plugins:
        return ("model", "what it is"), [(f"{name}:…", origin) for name, origin in _names(REGISTRY, True)]
    rows = [(name, "random weights in the published dimensions") for name in known() if name.startswith("shape:")]
    return ("model", "what it is"), [
        ("embedded", "SmolLM2-135M-Instruct, weights dequantised from 4 bit; fetched once"),
        *rows,
        ("ORG/NAME[@REVISION]", "a model of the Hugging Face hub (safetensors)"),
        ("path/to/folder", "a saved model with config.json and safetensors"),
        ("path/to/file.gguf", "a GGUF file, dequantised"),
    ]


_KINDS: dict[str, Callable[[bool], tuple[Row, Iterable[Row]]]] = {
    "suites": _suites,
    "policies": _policies,
    "tasks": _tasks,
    "metrics": _metrics,
    "models": _models,
}


def _names(registry: Registry, plugins: bool) -> list[tuple[str, str]]:
    found = registry.plugins()
    return [(name, found.get(name, "")) for name in registry.names() if name in found or not plugins]


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _word(value: object) -> str:
    from d2obench.spec import show_value

    return show_value(value)
