"""``d2obench list KIND``: the suites, policies, tasks, metrics, models, formats and plugins that can be chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.plugin import Registry

Row = tuple[str, ...]


Kind = Annotated[
    str,
    typer.Argument(
        metavar="KIND",
        show_default=False,
        help="List suites, policies, tasks, metrics, models, formats or plugins. There is no default.",
    ),
]
Plugins = Annotated[
    bool,
    typer.Option(
        "--plugins", help="List only what other packages add. By default, what is built in is listed as well."
    ),
]


def list_(kind: Kind = "", plugins: Plugins = False) -> None:
    """List suites, policies, tasks, metrics, models, formats of a report, or plugins of other packages.

    Policies and tasks are listed with their parameters, which follow a name in brackets: d2o(merge=values).

    Example: d2obench list policies

    Example: d2obench list tasks --plugins
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    kind = kind or ("plugins" if plugins else "")
    if kind not in _KINDS:
        raise UsageError(f"can't list '{kind}'" if kind else "which list?", remedy=f"use one of {', '.join(_KINDS)}")
    header, rows = _KINDS[kind](plugins)
    table = Table(*header, box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for row in rows:  # the row of a broken plugin is shorter
        table.add_row(*(escape(cell) for cell in (*row[:-1], *[""] * (len(header) - len(row)), row[-1])))
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fit
        console.width = 160
    console.print(table if table.row_count else f"no {kind} from other packages".replace("no plugins", "nothing"))


def _suites(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from d2obench.suite.definition import load_suite, shipped

    names = [] if plugins else shipped()
    return ("suite", "tasks", "what it is for"), [
        (name, ", ".join(suite.axes.task), suite.about) for name in names for suite in [load_suite(name)]
    ]


def _policies(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from dataclasses import fields

    from d2obench.policies import REGISTRY

    def row(cls: Any) -> Row:
        params = (f"{field.name}={_word(field.default)}" for field in fields(cls) if not field.kw_only)
        return "yes" if cls.takes_budget else "no", ", ".join(params), _first_line(cls)

    return ("policy", "budget", "parameters", "rule", "from"), _described(REGISTRY, plugins, row)


def _tasks(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from d2obench.tasks import REGISTRY
    from d2obench.tasks.base import parameters

    def row(cls: Any) -> Row:
        params = (f"{key}={_word(value)}" for key, value in parameters(cls).items())
        return ", ".join(params), _first_line(cls)

    speed = [] if plugins else [("speed", "", "throughput, latency and peak memory of one batch of prompts", "")]
    return ("task", "parameters", "what it asks", "from"), [*speed, *_described(REGISTRY, plugins, row)]


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


def _formats(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from d2obench.report.render import RENDERERS

    return ("format", "what it writes", "from"), _described(RENDERERS, plugins, lambda made: (_first_line(made),))


def _plugins(plugins: bool) -> tuple[Row, Iterable[Row]]:
    from d2obench import models, policies, tasks
    from d2obench.report.render import RENDERERS

    registries = (policies.REGISTRY, tasks.REGISTRY, models.REGISTRY, RENDERERS)
    return ("plugin", "kind", "distribution", "version", "class", "problem"), [
        (offer.name, offer.kind, offer.distribution, offer.version, offer.target, offer.problem)
        for registry in registries
        for offer in registry.offers()
    ]


_KINDS: dict[str, Callable[[bool], tuple[Row, Iterable[Row]]]] = {
    "suites": _suites,
    "policies": _policies,
    "tasks": _tasks,
    "metrics": _metrics,
    "models": _models,
    "formats": _formats,
    "plugins": _plugins,
}


def _names(registry: Registry, plugins: bool) -> list[tuple[str, str]]:
    found = registry.plugins()
    return [(name, found.get(name, "")) for name in registry.names() if name in found or not plugins]


def _described(registry: Registry, plugins: bool, describe: Callable[[Any], Row]) -> list[Row]:
    """A row for each name: the name, what ``describe`` says of its class, and the package it comes from. A plugin that
    can't be imported has a row with its error."""
    rows = []
    for name, origin in _names(registry, plugins):
        try:
            found = registry.get(name)
            rows.append((f"{name}:…" if getattr(found, "methods", False) else name, *describe(found), origin))
        except Exception as problem:
            if not origin:
                raise
            rows.append((name, f"broken: {problem}", origin))
    return rows


def _first_line(cls: Any) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _word(value: object) -> str:
    from d2obench.suite.grammar import show_value

    return show_value(value)
