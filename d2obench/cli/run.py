"""``d2obench run`` plans a suite, runs it and shows what came out; ``d2obench merge`` makes one run of its shards."""

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
from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.record import Run
    from d2obench.run.plan import Plan
    from d2obench.run.progress import Display
    from d2obench.run.runner import Engine
    from d2obench.suite.definition import Suite


def run(
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
    rounds: options.Rounds = None,
    within: options.Within = None,
    decode: options.Decode = None,
    memory_limit: options.MemoryLimit = None,
    limit: options.Limit = None,
    data: options.Data = None,
    prompts: options.Prompts = None,
    threads: options.Threads = None,
    set_: options.Set = None,
    device_map: options.DeviceMap = None,
    tensor_parallel: options.TensorParallel = None,
    kernels: options.Kernels = None,
    python: options.Python = None,
    allow_busy: options.AllowBusy = False,
    engine: options.EngineName = "local",
    address: options.Address = "",
    ray_cpus: options.RayCpus = 0.0,
    ray_resource: options.RayResource = "",
    shard: options.Shard = "",
    shards: options.Shards = None,
    sbatch: options.Sbatch = None,
    submit: options.Submit = False,
    dry_run: options.DryRun = False,
    resume: options.Resume = None,
    out: options.Out = None,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Run a suite: compare KV-cache policies in speed, memory and quality.

    Every cell of the suite becomes a row of the results. At the end the table and the files written are printed.

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
    given = options.overrides(axes, settings, set_ or (), data or (), prompts or ())
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


Shards = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...",
        help="Give the folders of the shards in any order; all of them have to be runs of the same suite.",
    ),
]
Whole = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER", help="Write the whole run to this folder, which must not hold a run yet: --out whole."
    ),
]


def merge(runs: Shards, out: Whole) -> None:
    """Make one run of the shards that d2obench run --shard or --engine slurm left.

    Cells that no shard has are missing in the result; d2obench run --resume measures them.

    Example: d2obench merge sweep/shards/* --out sweep/run
    """
    from d2obench.record import read_run
    from d2obench.run.run_folder import merge as join

    for warning in join(runs, out):
        tell(warning)
    missing = read_run(out).missing
    show_results(out)
    if missing:
        tell(f"{len(missing)} cells are missing, the first is {missing[0]}")
        tell(f"run them here with: d2obench run --resume {out}")


def check_engine(
    engine: str,
    ray: Mapping[str, object],
    slurm: Mapping[str, object],
    local: Mapping[str, object],
    not_slurm: Mapping[str, object],
) -> None:
    """Raises a UsageError for an option that the chosen engine would ignore."""
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
    """The suite to run, and the earlier run that is continued, or None.

    Args:
        suite: as typed.
        given: keys of the suite that were set on the command line.
        resume: the folder of the run to continue.
        starts_anew: whether an option was given that only a new run can have.

    Raises:
        UsageError: no suite is named, or one is named although an earlier run is continued.
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
    """The part of a plan that is one shard, or that an earlier run had planned."""
    from d2obench.run.plan import parse_shard, part
    from d2obench.run.plan import shard as shard_of

    if shard:
        return shard_of(plan, *parse_shard(shard))
    return part(plan, earlier.info.cells) if earlier else plan


def show_dry_run(suite: Suite, python: Path | None, shard: str, earlier: Run | None) -> None:
    """Plans in this process, without starting a worker, and prints the cells."""
    from d2obench.cli.dry_run import show_plan
    from d2obench.run.check import plan_here

    show_plan(part_of(plan_here(suite, python), shard, earlier))


def show_dry_run_of(plan: Plan, engine: Engine) -> None:
    """Prints the cells, predicted with the rates of an engine's first device."""
    from d2obench.cli.dry_run import show_plan
    from d2obench.run.predict import Device

    def rates(device: str, dtype: str) -> Device:
        return Device(**engine.client.call("rates", {"device": device, "dtype": dtype}))

    show_plan(plan, rates)


def measure(
    plan: Plan, engine: Engine, earlier: Run | None, *, out: Path | None = None, quiet: bool = False, plain: bool = True
) -> tuple[Path, bool]:
    """Runs a plan into a new folder, or continues an earlier run.

    Returns: the folder, and whether the user stopped the run.
    """
    from d2obench.cli.display import display
    from d2obench.run.run_folder import new_folder

    folder = earlier.path if earlier else new_folder(plan.suite.name, out)
    return folder, execute(plan, folder, engine, earlier, display(quiet=quiet, plain=plain, vitals=engine.vitals))


def execute(plan: Plan, folder: Path, engine: Engine, earlier: Run | None, shown: Display) -> bool:
    """Runs all cells. Returns whether the user stopped the run."""
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
    """Shows the results of a finished run. For a run that was stopped, says how to continue it and exits with 130."""
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
    """Writes the views of a run, prints its tables and names the files."""
    from rich.console import Console

    from d2obench.report import build, write_report
    from d2obench.report.render.console import show_report

    report = build([folder])
    written = write_report(report, folder)
    show_report(report, Console())
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
    """Writes the array script, prints it, submits it if asked, and says what to do next."""
    from d2obench.run import slurm

    array = slurm.write_array(suite, slurm.words_of(named, given, allow_busy=allow_busy), out, shards, sbatch)
    typer.echo(array.script.read_text(), nl=False)
    tell(f"{array.script}: {array.tasks} tasks for {array.groups} groups of cells")
    tell(slurm.submit(array.script) if submit else f"submit it with: sbatch {array.script}")
    folder = array.script.parent
    tell(f"when all are done: d2obench merge {folder}/shards/* --out {folder}/run")


def recorded_command(words: list[str]) -> list[str]:
    """The command line as it is recorded: it can be typed again, and folders of this machine are left out."""
    return ["d2obench", *(Path(word).name if word.startswith(("/", "~")) else word for word in words[1:])]


def tell(words: str) -> None:
    """Prints a line to stderr."""
    typer.echo(f"d2obench: {words}", err=True)
