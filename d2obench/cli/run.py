"""``d2obench run SUITE``: plans a suite, runs it, and shows what came out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2obench.cli import options
from d2obench.cli.options import OUTPUT, REPEATS, WHERE
from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.record import Run
    from d2obench.run.plan import Plan
    from d2obench.run.progress import Display
    from d2obench.run.runner import Engine
    from d2obench.suite.definition import Suite

DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        rich_help_panel=WHERE,
        help="Spread the layers of a model over the GPUs of this machine: auto, balanced or sequential. "
        "Default: none, one device holds the model.",
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        rich_help_panel=WHERE,
        help="Split every layer's heads over N processes, one a device: --tensor-parallel 4. Default: 1.",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=REPEATS,
        help="Measure every timed cell in exactly this many rounds: --rounds 5. Default: the suite's, which may add "
        "rounds until intervals are narrow.",
    ),
]
Within = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        rich_help_panel=REPEATS,
        help="Plan the run into this time: --within 90s, 10m or 2h. Rounds and items are cut first, then whole cells "
        "are dropped; the rows say which. Default: the suite's; --within '' is as long as it takes.",
    ),
]
Decode = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        rich_help_panel=REPEATS,
        help="full times every decode step, sampled times windows of a long generation and integrates, both checks "
        "one by the other. Default: the suite's.",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=REPEATS,
        help="Memory that batch max may fill, as a size or a share of the device: --memory-limit 24GiB. "
        "Default: all of a GPU, or what is free of a CPU's memory.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=0,
        rich_help_panel=REPEATS,
        help="Items of each quality task at most: --limit 20. Default: the suite's; 0 is all of them.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TASK=]PATH",
        rich_help_panel=REPEATS,
        help="Your own data in place of a task's data set: --data gsm8k=test.jsonl; a path alone is a text for "
        "fidelity: --data essay.txt. Can be given several times.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=0, rich_help_panel=REPEATS, help="CPU threads of a worker: --threads 4. Default: 0, which is all cores."
    ),
]
Python = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        rich_help_panel=WHERE,
        help="An interpreter of your own for the cells of kvpress. Default: the environment that d2obench bridges "
        "install kvpress makes.",
    ),
]
AllowBusy = Annotated[
    bool,
    typer.Option("--allow-busy", rich_help_panel=WHERE, help="Measure even where other processes use the GPU."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", rich_help_panel=OUTPUT, help="Show the cells with their predicted memory and time; run nothing."
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="RUN", rich_help_panel=OUTPUT, help="Go on with a run that was stopped, given by its folder."),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        rich_help_panel=WHERE,
        help="Where cells run: local is this machine, ray a Ray cluster, slurm writes an array script.",
    ),
]
Address = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        help="With --engine ray: the address of a running cluster. Default: a cluster of its own on this machine.",
    ),
]
RayCpus = Annotated[
    float,
    typer.Option(
        min=0,
        rich_help_panel=WHERE,
        help="With --engine ray: cores reserved with each GPU. Default: 0, an even share of the node's cores.",
    ),
]
RayResource = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        help="With --engine ray: use only nodes that offer this resource: --ray-resource accelerator_type:H100. "
        "Default: all nodes.",
    ),
]
Shard = Annotated[
    str,
    typer.Option(
        metavar="I/N",
        rich_help_panel=WHERE,
        help="Run every N-th group of cells, from the I-th on: --shard 2/8. d2obench merge joins the shards.",
    ),
]
Shards = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=WHERE,
        help="With --engine slurm: tasks of the array. Default: one for each group of cells, 8 at most.",
    ),
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OPTION",
        rich_help_panel=WHERE,
        help="With --engine slurm: an option for sbatch: --sbatch=--partition=gpu. Can be given several times.",
    ),
]
Submit = Annotated[
    bool,
    typer.Option("--submit", rich_help_panel=WHERE, help="With --engine slurm: hand the script to sbatch as well."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", rich_help_panel=OUTPUT, help="The folder of the run. Default: d2obench-runs/<time>-<suite>."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=OUTPUT, help="Show no progress.")]
NoProgress = Annotated[
    bool,
    typer.Option(
        "--no-progress", rich_help_panel=OUTPUT, help="Write a plain line for each cell in place of the live display."
    ),
]


def command(
    suite: options.SuiteName = "",
    policy: options.Policy = None,
    budget: options.Budget = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    shape: options.Shape = None,
    batch: options.Batch = None,
    task: options.Task = None,
    seed: options.Seed = None,
    rounds: Rounds = None,
    within: Within = None,
    decode: Decode = None,
    memory_limit: MemoryLimit = None,
    limit: Limit = None,
    data: Data = None,
    threads: Threads = None,
    set_: options.Set = None,
    device_map: DeviceMap = None,
    tensor_parallel: TensorParallel = None,
    kernels: options.Kernels = None,
    python: Python = None,
    allow_busy: AllowBusy = False,
    engine: EngineName = "local",
    address: Address = "",
    ray_cpus: RayCpus = 0.0,
    ray_resource: RayResource = "",
    shard: Shard = "",
    shards: Shards = None,
    sbatch: Sbatch = None,
    submit: Submit = False,
    dry_run: DryRun = False,
    resume: Resume = None,
    out: Out = None,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Run a suite: compare KV-cache policies on speed, memory and quality.

    Every cell of the suite ends as a row of the run folder. The table is printed at the end, with the files written.

    Example: d2obench run quick --policy full,d2o,h2o --budget 0.2
    """
    began = time.monotonic()
    check_engine(
        engine,
        ray={"--address": address, "--ray-cpus": ray_cpus, "--ray-resource": ray_resource},
        slurm={"--shards": shards, "--sbatch": sbatch, "--submit": submit},
        local={"--python": python, "--within": within},
        not_slurm={"--resume": resume, "--dry-run": dry_run, "--shard": shard},
    )
    axes = {
        "policy": policy, "budget": budget, "model": model, "dtype": dtype, "device": device,
        "shape": shape, "batch": batch, "task": task, "seed": seed,
    }  # fmt: skip
    settings = {
        "within": None if within is None else json.dumps(within),
        "timing.rounds": rounds, "timing.max_rounds": rounds, "timing.decode": decode,
        "timing.memory_limit": json.dumps(memory_limit) if memory_limit else None,  # text, also where it is a number
        "quality.limit": limit, "worker.threads": threads,
        "models.device_map": device_map, "models.tensor_parallel": tensor_parallel,
        "models.kernels": kernels,
    }  # fmt: skip
    given = options.overrides(axes, settings, set_ or (), data or ())
    chosen, earlier = choose(suite, given, resume, starts_anew=bool(out or shard))
    if engine == "slurm":
        slurm_array(suite, chosen, given, out, shards, sbatch or [], submit=submit, allow_busy=allow_busy)
        return
    if dry_run and engine == "local":
        show_dry_run(chosen, python, shard, earlier)
        return
    from d2obench.run.check import check
    from d2obench.run.runner import open_engine

    with open_engine(
        engine,
        chosen,
        address=address,
        cpus=ray_cpus,
        resource=ray_resource,
        allow_busy=allow_busy,
        python=python,
        say=tell,
    ) as place:
        plan = part_of(check(place.suite, place.client, allow_busy=allow_busy), shard, earlier)
        if dry_run:
            show_dry_run_of(plan, place)
            return
        plan = replace(plan, began=began)
        folder, stopped = measure(plan, place, earlier, out=out, quiet=quiet, plain=no_progress)
    finish(folder, stopped)


def check_engine(
    engine: str,
    ray: Mapping[str, object],
    slurm: Mapping[str, object],
    local: Mapping[str, object],
    not_slurm: Mapping[str, object],
) -> None:
    """Refuses an option that the chosen engine would ignore."""
    if engine not in ("local", "ray", "slurm"):
        raise UsageError(f"unknown engine '{engine}'", remedy="use --engine local, ray or slurm")
    for name, given in (("ray", ray), ("slurm", slurm), ("local", local)):
        wrong = next((option for option, value in given.items() if value), None)
        if wrong and engine != name:
            raise UsageError(f"{wrong} is an option of --engine {name}", remedy=f"add --engine {name}")
    wrong = next((option for option, value in not_slurm.items() if value), None)
    if wrong and engine == "slurm":
        raise UsageError(f"{wrong} can't be used with --engine slurm", remedy="its tasks run shards; leave it out")


def choose(
    suite: str, given: Mapping[str, str], resume: Path | None, *, starts_anew: bool = False
) -> tuple[Suite, Run | None]:
    """The suite to run, and the run to go on with where one is named.

    Args:
        suite: as typed.
        given: what was set on the command line.
        resume: the folder of a run.
        starts_anew: whether an option was given that only a new run can have.
    """
    from d2obench.run.run_folder import suite_of
    from d2obench.suite.definition import load_suite, shipped

    if resume is None:
        if not suite:
            raise UsageError("which suite?", remedy=f"name a .toml or one of {', '.join(shipped())}")
        return load_suite(suite, given), None
    if given or suite or starts_anew:
        raise UsageError("--resume goes on with a run as it was started", remedy="give no suite, axis or --out with it")
    run, found = suite_of(resume)
    return found, run


def part_of(plan: Plan, shard: str, earlier: Run | None) -> Plan:
    """The cells of one shard, or those that an earlier part of the run had planned."""
    from d2obench.run.plan import parse_shard, part
    from d2obench.run.plan import shard as shard_of

    if shard:
        return shard_of(plan, *parse_shard(shard))
    return part(plan, earlier.info.cells) if earlier else plan


def show_dry_run(suite: Suite, python: Path | None, shard: str, earlier: Run | None) -> None:
    """Plans in this process and prints the cells; no worker is started for it."""
    from d2obench.cli.dry_run import show_plan
    from d2obench.run.check import plan_here

    show_plan(part_of(plan_here(suite, python), shard, earlier))


def show_dry_run_of(plan: Plan, engine: Engine) -> None:
    """Prints the cells with the rates of an engine's first device."""
    from d2obench.cli.dry_run import show_plan
    from d2obench.run.predict import Device

    def rates(device: str, dtype: str) -> Device:
        return Device(**engine.client.call("rates", {"device": device, "dtype": dtype}))

    show_plan(plan, rates)


def measure(
    plan: Plan, engine: Engine, earlier: Run | None, *, out: Path | None = None, quiet: bool = False, plain: bool = True
) -> tuple[Path, bool]:
    """Runs a plan into a new folder, or goes on with an earlier run; the folder, and whether the user stopped it."""
    from d2obench.report.display import display
    from d2obench.run.run_folder import new_folder

    folder = earlier.path if earlier else new_folder(plan.suite.name, out)
    return folder, execute(plan, folder, engine, earlier, display(quiet=quiet, plain=plain, vitals=engine.vitals))


def execute(plan: Plan, folder: Path, engine: Engine, earlier: Run | None, shown: Display) -> bool:
    """Runs all cells; true when the user stopped it."""
    from d2obench.run.runner import run_suite

    shown.start([cell.id for cell in plan.cells])
    for cell in earlier.cells if earlier else ():
        shown.cell(cell.id, cell.status)
    try:
        run_suite(plan, folder, engine, shown, command=recorded_command(sys.argv), resume=earlier is not None)
    except KeyboardInterrupt:
        return True
    finally:
        shown.finish()
    return False


def finish(folder: Path, stopped: bool) -> None:
    """Shows the results of a run that is over; says how to go on with one that was stopped, and ends with code 130."""
    if not stopped:
        show_results(folder)
        return
    if (folder / "run.json").exists():
        tell(f"stopped; go on with: d2obench run --resume {folder}")
        tell(f"or look at what is there: d2obench report {folder}")
    else:
        tell("stopped before anything was measured; start it again with the same command")
    raise typer.Exit(130)


def show_results(folder: Path) -> None:
    """Writes the views of a run, prints its tables and says where everything is."""
    from rich.console import Console

    from d2obench.report import print_tables, write_views

    written = write_views(folder)
    print_tables(folder, Console())
    for path in [folder / "run.json", folder / "cells.jsonl", *(path for path in written if path.parent == folder)]:
        typer.echo(str(path))


def slurm_array(
    named: str,
    suite: Suite,
    given: Mapping[str, str],
    out: Path | None,
    shards: int | None,
    sbatch: list[str],
    *,
    submit: bool,
    allow_busy: bool,
) -> None:
    """Writes the array script, prints it, submits it where asked, and says how to go on."""
    from d2obench.run import slurm

    array = slurm.write_array(suite, slurm.words_of(named, given, allow_busy=allow_busy), out, shards, sbatch)
    typer.echo(array.script.read_text(), nl=False)
    tell(f"{array.script}: {array.tasks} tasks for {array.groups} groups of cells")
    tell(slurm.submit(array.script) if submit else f"submit it with: sbatch {array.script}")
    folder = array.script.parent
    tell(f"when all are done: d2obench merge {folder}/shards/* --out {folder}/run")


def recorded_command(words: list[str]) -> list[str]:
    """The command line as it is recorded: how to run it again, without the paths of this machine."""
    return ["d2obench", *(Path(word).name if word.startswith(("/", "~")) else word for word in words[1:])]


def tell(words: str) -> None:
    """A line to stderr."""
    typer.echo(f"d2obench: {words}", err=True)
