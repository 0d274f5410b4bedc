"""The options of the commands that run a suite, and those that gate and compare share.

Each help text says in sentences what the option does, gives an example if the form is not obvious, and says what holds
without it. :func:`overrides` turns what was typed into keys of a suite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from d2obench.errors import UsageError

AXES, REPEATS, WHERE, OUTPUT = "Axes of the suite", "Repeats and data", "Where it runs", "Output"
"""Headings under which the help of run lists its options."""
SUITE_DECIDES = " By default, the suite decides."


def _axis(help_: str) -> Any:
    return typer.Option(metavar="LIST", rich_help_panel=AXES, help=help_ + SUITE_DECIDES)


SuiteName = Annotated[
    str,
    typer.Argument(
        metavar="SUITE",
        show_default=False,
        help="Name a suite that ships, such as quick (d2obench list suites shows all of them), or give the path of a "
        ".toml file. There is no default.",
    ),
]

# The axes of a suite

Policy = Annotated[
    str | None, _axis("Compare these policies; parameters follow in brackets: --policy 'full,h2o,d2o(merge=values)'.")
]
Budget = Annotated[
    str | None,
    _axis("Let policies keep a share of the prompt (0.2) or a number of tokens per layer (512): --budget 0.2,512."),
]
Model = Annotated[
    str | None,
    _axis(
        "Run these models: embedded, a hub id, a folder, a .gguf file, or shape:NAME for published dimensions with "
        "random weights: --model shape:llama-3-8b."
    ),
]
Dtype = Annotated[
    str | None,
    _axis(
        "Hold weights and cache in this type, float32, bfloat16 or float16: --dtype bfloat16. auto is bfloat16 on a "
        "GPU and float32 on a CPU."
    ),
]
Device = Annotated[
    str | None,
    _axis("Run on this device: auto, cpu, cuda or cuda:1. auto is the first GPU, or the CPU if there is no GPU."),
]
Shape = Annotated[
    str | None,
    _axis(
        "Measure prompts and generations of these lengths in tokens; ranges are allowed: "
        "--shape 2048+8192,512..4096*2+64."
    ),
]
Batch = Annotated[
    str | None, _axis("Decode so many sequences together; max finds the largest batch that fits: --batch 1,8,max.")
]
Task = Annotated[
    str | None,
    _axis(
        "Measure speed, or quality in tasks such as fidelity (d2obench list tasks shows all of them): "
        "--task 'speed,recall(items=8)'."
    ),
]
Seed = Annotated[str | None, _axis("Draw prompts, and what random policies keep, with these seeds: --seed 0,1,2.")]

# Repeats and data

Rounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=REPEATS,
        help="Measure every timed cell in exactly so many rounds: --rounds 5. By default, the suite decides, and may "
        "add rounds until the intervals are narrow.",
    ),
]
Within = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        rich_help_panel=REPEATS,
        help="Plan the run so that it ends within this time: --within 90s, 10m or 2h. Rounds and items are reduced "
        "first, then whole cells are dropped; the rows say which. --within '' sets no limit." + SUITE_DECIDES,
    ),
]
Decode = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        rich_help_panel=REPEATS,
        help="Time every decode step (full), or windows of a long generation from which the whole is estimated "
        "(sampled), or compare the two (both): --decode sampled." + SUITE_DECIDES,
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=REPEATS,
        help="Limit the memory that batch max may fill to a size or a share of the device: --memory-limit 24GiB. "
        "By default, it may fill all of a GPU, or what is free of a CPU's memory.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=0,
        rich_help_panel=REPEATS,
        help="Use at most so many items of each quality task; 0 is all of them: --limit 20." + SUITE_DECIDES,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK=PATH",
        rich_help_panel=REPEATS,
        help="Use your own data in place of a task's data set: --data gsm8k=test.jsonl. A path alone is a text for the "
        "task fidelity: --data essay.txt. The option can be repeated. By default, each task fetches its data set.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=REPEATS,
        help="Use a benchmark's own prompts in place of this project's words, so that scores can be compared with "
        "published ones: LongBench's --prompts dataset2prompt.json, and --prompts dataset2maxlen.json for the lengths "
        "of answers. By default, prompts are worded anew.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=0,
        rich_help_panel=REPEATS,
        help="Give a worker so many CPU threads: --threads 4. The default 0 gives it all cores.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Set any other key of the suite: --set timing.warmup=2. The option can be repeated." + SUITE_DECIDES,
    ),
]

# Where a suite runs

DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        rich_help_panel=WHERE,
        help="Spread the layers of a model over the GPUs of this machine: auto, balanced or sequential. By default, "
        "one device holds the model.",
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        rich_help_panel=WHERE,
        help="Split the heads of every layer among N processes with one device each: --tensor-parallel 4. By default, "
        "one process runs the model.",
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        metavar="WHOSE",
        rich_help_panel=WHERE,
        help="Choose whose kernels compute a model's linear layers, norms and rotary positions: --kernels library runs "
        "them exactly as transformers does. By default (d2obench), ours are used where they serve.",
    ),
]
Python = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        rich_help_panel=WHERE,
        help="Run the cells of kvpress with this Python interpreter: --python venv/bin/python. By default, it is the "
        "one of the environment that d2obench bridges install kvpress makes.",
    ),
]
AllowBusy = Annotated[
    bool,
    typer.Option(
        "--allow-busy",
        rich_help_panel=WHERE,
        help="Measure even if other processes use the GPU. By default, the run is refused.",
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="NAME",
        rich_help_panel=WHERE,
        help="Run the cells on this machine (local) or on a Ray cluster (ray), or write an array script (slurm).",
    ),
]
Address = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        show_default=False,
        help="With --engine ray, connect to the cluster at this address: --address ray://head:10001. By default, a "
        "cluster of its own is started on this machine.",
    ),
]
RayCpus = Annotated[
    float,
    typer.Option(
        min=0,
        rich_help_panel=WHERE,
        help="With --engine ray, reserve so many cores with each GPU. 0 is an even share of the node's cores.",
    ),
]
RayResource = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        show_default=False,
        help="With --engine ray, use only nodes that offer this resource: --ray-resource accelerator_type:H100. By "
        "default, all nodes are used.",
    ),
]
Shard = Annotated[
    str,
    typer.Option(
        metavar="I/N",
        rich_help_panel=WHERE,
        show_default=False,
        help="Run every N-th group of cells, beginning with the I-th: --shard 2/8. d2obench merge joins the shards. By "
        "default, all groups are run.",
    ),
]
Shards = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=WHERE,
        help="With --engine slurm, divide the array into so many tasks: --shards 4. By default, each group of cells "
        "is a task, up to 8.",
    ),
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OPTION",
        rich_help_panel=WHERE,
        help="With --engine slurm, give sbatch this option: --sbatch=--partition=gpu. The option can be repeated. By "
        "default, sbatch gets no further options.",
    ),
]
Submit = Annotated[
    bool,
    typer.Option(
        "--submit",
        rich_help_panel=WHERE,
        help="With --engine slurm, hand the script to sbatch. By default, it is only written.",
    ),
]

# Output

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        rich_help_panel=OUTPUT,
        help="Show the cells with their predicted memory and time, and run nothing. By default, they are run.",
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        rich_help_panel=OUTPUT,
        help="Continue the run in this folder, which was stopped. By default, a new run is started.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        rich_help_panel=OUTPUT,
        help="Write the run to this folder. By default, it is d2obench-runs/TIME-SUITE.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", rich_help_panel=OUTPUT, help="Show no progress. By default, it is shown on stderr."),
]
NoProgress = Annotated[
    bool,
    typer.Option(
        "--no-progress",
        rich_help_panel=OUTPUT,
        help="Write a plain line for each cell that ends. By default, a terminal shows a live table.",
    ),
]

# What gate and compare share

Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="Write the verdicts as text, json, markdown, html, github or junit. The option can be repeated. By "
        "default, they are written as text.",
    ),
]
VerdictFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write files in these formats to this folder, and comment.md beside them. By default, everything is "
        "printed.",
    ),
]
AllRows = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Print the figures that are in order as well. By default, only those that need a look are printed.",
    ),
]


def overrides(
    axes: Mapping[str, str | None],
    settings: Mapping[str, object] | None = None,
    more: Iterable[str] = (),
    data: Iterable[str] = (),
    prompts: Iterable[str] = (),
) -> dict[str, str]:
    """The keys of a suite that were set on the command line: dotted key → text.

    Args:
        axes: name of an axis → list as typed; None if the option was not given.
        settings: dotted key → value; None if the option was not given.
        more: ``TABLE.KEY=VALUE``, as ``--set`` takes it.
        data: ``TASK=PATH`` or the path of a text, as ``--data`` takes it.
        prompts: paths, as ``--prompts`` takes them.

    Raises:
        UsageError: one of ``more`` or ``data`` can't be read.
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
    for number, path in enumerate(prompts, 1):
        name = "prompts" if number == 1 else f"prompts-{number}"
        found[f"quality.data.{name}"] = str(Path(path).expanduser().resolve())
    return found
