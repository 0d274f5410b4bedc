"""Options that several commands share, each with its help: what it is, an example, and what holds without it.

A suite's axes and keys can all be set on the command line; :func:`overrides` turns what was typed into dotted keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from d2obench.errors import UsageError

AXES, REPEATS, WHERE, OUTPUT = "Axes of the suite", "Repeats and data", "Where it runs", "Output"

SuiteName = Annotated[
    str,
    typer.Argument(
        metavar="SUITE",
        help="The suite: the name of one that ships, such as quick (see d2obench list suites), or a path to a .toml.",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="Policies to compare, with parameters in brackets: --policy 'full,h2o,d2o(merge=values)'. "
        "Default: the suite's.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="What a policy may keep: a share of the prompt (0.2) or a number of tokens per layer (512): "
        "--budget 0.2,512. Default: the suite's.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="Models to run: embedded, a hub id, a folder, a .gguf file or shape:NAME: --model shape:llama-3-8b. "
        "Default: the suite's.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="Type of weights and cache, float32, bfloat16 or float16: --dtype bfloat16. Default: the suite's.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="Device to run on: auto, cpu, cuda or cuda:1. auto is the first GPU, or the CPU where there is none. "
        "Default: the suite's.",
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="Tokens of prompt + generation, also as ranges: --shape 2048+8192,512..4096*2+64. Default: the suite's.",
    ),
]
Batch = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="Sequences decoded together, or max for as many as fit: --batch 1,8,max. Default: the suite's.",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="What is measured: speed, or quality tasks such as fidelity (see d2obench list tasks): "
        "--task 'speed,recall(items=8)'. Default: the suite's.",
    ),
]
Seed = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=AXES,
        help="Seeds of prompts and of policies that draw at random: --seed 0,1,2. Default: the suite's.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Any other key of a suite: --set timing.warmup=2. Can be given several times.",
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="How the verdicts are written: text, json, markdown, html, github or junit. Can be given several times. "
        "Default: text.",
    ),
]
VerdictFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="A folder for files in these formats and for comment.md. Default: everything goes to the terminal.",
    ),
]
AllRows = Annotated[bool, typer.Option("--all", help="List the figures that are fine too, and not only the others.")]


Kernels = Annotated[
    str | None,
    typer.Option(
        metavar="WHOSE",
        rich_help_panel=WHERE,
        help="Whose kernels compute a model's linear layers, norms and rotary positions: --kernels library runs them "
        "exactly as transformers has them. Default: d2obench, ours where they serve.",
    ),
]


def overrides(
    axes: Mapping[str, str | None],
    settings: Mapping[str, object] | None = None,
    more: Iterable[str] = (),
    data: Iterable[str] = (),
) -> dict[str, str]:
    """What was given on the command line as dotted keys of a suite → text.

    Args:
        axes: name of an axis → list as typed; None where nothing was given.
        settings: dotted key → value; None where nothing was given.
        more: ``TABLE.KEY=VALUE``, as ``--set`` takes it.
        data: ``TASK=PATH``, or the path of a text, as ``--data`` takes it.

    Raises:
        UsageError: one of the last two can't be read.
    """
    found = {f"axes.{name}": value for name, value in axes.items() if value is not None}
    found |= {key: str(value) for key, value in (settings or {}).items() if value is not None}
    for setting in more:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"can't read --set '{setting}'", remedy="write it as table.key=value, for example timing.warmup=0"
            )
        found[key.strip()] = value.strip()
    for given in data:
        task, equals, path = given.partition("=")
        if not equals:  # the path alone is a text for the fidelity task
            task, path = "fidelity", given
        if not task or not path:
            raise UsageError(
                f"can't read --data '{given}'", remedy="write it as TASK=PATH, or PATH of a text for fidelity"
            )
        found[f"quality.data.{task}"] = str(Path(path).expanduser().resolve())
    return found
