"""``d2obench run SUITE``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.record import Run
    from d2obench.report.display import Display
    from d2obench.run.check import Checked
    from d2obench.run.engines import Engine

AXES, REPEATS, WHERE, OUTPUT = "Axes of the suite", "Repeats and data", "Where it runs", "Output"


def command(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A shipped name such as quick, or a path to a .toml.")
    ] = "",
    policy: Annotated[str | None, typer.Option(help="d2o,h2o,streaming", rich_help_panel=AXES)] = None,
    budget: Annotated[
        str | None, typer.Option(help="0.2,512: share of prompt, or tokens", rich_help_panel=AXES)
    ] = None,
    model: Annotated[str | None, typer.Option(help="see d2obench list models", rich_help_panel=AXES)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16", rich_help_panel=AXES)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1", rich_help_panel=AXES)] = None,
    device_map: Annotated[
        str | None, typer.Option(help="layers over several GPUs: auto, balanced, sequential", rich_help_panel=AXES)
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="KV heads over N processes", rich_help_panel=AXES)
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="prompt+gen: 2048+8192,512..4096*2+64", rich_help_panel=AXES)
    ] = None,
    batch: Annotated[str | None, typer.Option(help="1,8,max", rich_help_panel=AXES)] = None,
    task: Annotated[
        str | None, typer.Option(help="speed,fidelity, see d2obench list tasks", rich_help_panel=AXES)
    ] = None,
    seed: Annotated[str | None, typer.Option(help="0,1,2", rich_help_panel=AXES)] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="rounds of a timed cell", rich_help_panel=REPEATS)] = None,
    decode: Annotated[str | None, typer.Option(help="full, sampled, or both to check", rich_help_panel=REPEATS)] = None,
    memory_limit: Annotated[str | None, typer.Option(help="of batch max: 24GiB, 0.5", rich_help_panel=REPEATS)] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="items a task; 0 is all", rich_help_panel=REPEATS)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[TASK=]PATH", help="own data; a text for fidelity", rich_help_panel=REPEATS),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="CPU threads; 0 is all", rich_help_panel=REPEATS)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="any other key of a suite")
    ] = None,
    python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="interpreter for kvpress: cells", rich_help_panel=WHERE)
    ] = None,
    allow_busy: Annotated[bool, typer.Option("--allow-busy", help="measure though others use the GPU")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show cells, memory and time; run nothing")] = False,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="go on with a run that stopped")] = None,
    engine: Annotated[str, typer.Option(help="local, ray or slurm", rich_help_panel=WHERE)] = "local",
    address: Annotated[
        str, typer.Option(help="of a running Ray cluster; none starts one here", rich_help_panel=WHERE)
    ] = "",
    ray_cpus: Annotated[float, typer.Option(min=0, help="cores with each GPU; 0 shares", rich_help_panel=WHERE)] = 0.0,
    ray_resource: Annotated[str, typer.Option(help="only nodes that have it", rich_help_panel=WHERE)] = "",
    shard: Annotated[str, typer.Option(metavar="I/N", help="every N-th group of cells", rich_help_panel=WHERE)] = "",
    shards: Annotated[int | None, typer.Option(min=1, help="tasks of a slurm array", rich_help_panel=WHERE)] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="of sbatch: --partition=gpu", rich_help_panel=WHERE)
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="hand the script to sbatch", rich_help_panel=WHERE)] = False,
    out: Annotated[Path | None, typer.Option(help="the run folder", rich_help_panel=OUTPUT)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress", rich_help_panel=OUTPUT)] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="plain lines", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Run a suite: every cell ends as a row; the table and the files written stand at the end."""
    from d2obench.cli.dry_run import show_plan
    from d2obench.report.display import display
    from d2obench.run.check import check
    from d2obench.run.engines import open_engine
    from d2obench.run.plan import parse_shard, part
    from d2obench.run.plan import shard as shard_of
    from d2obench.run.run_folder import new_folder, suite_of
    from d2obench.suite.definition import load_suite

    axes = {
        "policy": policy, "budget": budget, "model": model, "dtype": dtype, "device": device,
        "shape": shape, "batch": batch, "task": task, "seed": seed,
    }  # fmt: skip
    settings = {
        "timing.rounds": rounds, "timing.max_rounds": rounds, "timing.decode": decode,
        "timing.memory_limit": json.dumps(memory_limit) if memory_limit else None,  # text, also where it is a number
        "quality.limit": limit, "worker.threads": threads,
        "models.device_map": device_map, "models.tensor_parallel": tensor_parallel,
    }  # fmt: skip
    _check_engine(
        engine,
        ray={"--address": address, "--ray-cpus": ray_cpus, "--ray-resource": ray_resource},
        slurm={"--shards": shards, "--sbatch": sbatch, "--submit": submit},
        others={"--resume": resume, "--dry-run": dry_run, "--shard": shard},
    )
    if python is not None and engine != "local":
        raise UsageError(f"--python can't go with --engine {engine}", remedy="use --engine local")
    wanted = parse_shard(shard) if shard else None
    given = overrides(axes, settings, set_ or (), data or ())
    earlier = None
    if resume is None:
        chosen = load_suite(_named(suite), given)
    else:
        if given or out or suite or shard:
            raise UsageError(
                "--resume goes on with a run as it was started", remedy="give no suite, axis or --out with it"
            )
        earlier, chosen = suite_of(resume)
    if engine == "slurm":
        from d2obench.cli.sweep import sweep

        sweep(suite, chosen, given, out=out, shards=shards, options=sbatch or (), submit=submit, allow_busy=allow_busy)
        return
    with open_engine(
        engine,
        chosen,
        address=address,
        cpus=ray_cpus,
        resource=ray_resource,
        allow_busy=allow_busy,
        python=python,
        say=lambda words: typer.echo(f"d2obench: {words}", err=True),
    ) as place:
        checked = check(place.suite, place.client, allow_busy=allow_busy)
        checked = shard_of(checked, *wanted) if wanted else part(checked, earlier.info.cells) if earlier else checked
        if dry_run:
            show_plan(checked, place.client)
            return
        folder = resume or new_folder(chosen.name, out)
        shown = display(quiet=quiet, plain=no_progress, vitals=place.vitals)
        stopped = execute(checked, folder, place, earlier, shown)
    if stopped:
        typer.echo(f"d2obench: stopped; go on with: d2obench run --resume {folder}", err=True)
        typer.echo(f"d2obench: or look at what is there: d2obench report {folder}", err=True)
        raise typer.Exit(130)
    show_results(folder)


def execute(checked: Checked, folder: Path, engine: Engine, earlier: Run | None, shown: Display) -> bool:
    """Runs all cells; true when the user stopped it."""
    from d2obench.run.engines import run_suite

    shown.start([cell.id for cell in checked.cells])
    for cell in earlier.cells if earlier else ():
        shown.cell(cell.id, cell.status)
    try:
        run_suite(checked, folder, engine, shown, command=_said(sys.argv), resume=earlier is not None)
    except KeyboardInterrupt:
        return True
    finally:
        shown.finish()
    return False


def show_results(folder: Path) -> None:
    """Writes the views of a run, prints its tables and says where everything is."""
    from rich.console import Console

    from d2obench.report import print_tables, write_views

    written = write_views(folder)
    console = Console()
    print_tables(folder, console)
    for path in [folder / "run.json", folder / "cells.jsonl", *(path for path in written if path.parent == folder)]:
        typer.echo(str(path))


def overrides(
    axes: Mapping[str, str | None], settings: Mapping[str, object], more: Iterable[str], data: Iterable[str]
) -> dict[str, str]:
    """What was given on the command line as dotted keys of a suite → text."""
    found = {f"axes.{name}": value for name, value in axes.items() if value is not None}
    found |= {key: str(value) for key, value in settings.items() if value is not None}
    for word in more:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"can't read --set '{word}'", remedy="write it as table.key=value, for example timing.warmup=0"
            )
        found[key.strip()] = value.strip()
    for word in data:
        task, equals, path = word.partition("=")
        if not equals:  # a text of one's own
            task, path = "fidelity", word
        if not task or not path:
            raise UsageError(
                f"can't read --data '{word}'", remedy="write it as TASK=PATH, or PATH of a text for fidelity"
            )
        found[f"quality.data.{task}"] = str(Path(path).expanduser().resolve())
    return found


def _check_engine(
    engine: str, ray: Mapping[str, object], slurm: Mapping[str, object], others: Mapping[str, object]
) -> None:
    """An option of another engine than the chosen one would be ignored, so it is refused."""
    if engine not in ("local", "ray", "slurm"):
        raise UsageError(f"unknown engine '{engine}'", remedy="use --engine local, ray or slurm")
    for name, options in (("ray", ray), ("slurm", slurm)):
        wrong = next((word for word, value in options.items() if value), None)
        if wrong and engine != name:
            raise UsageError(f"{wrong} is an option of --engine {name}", remedy=f"add --engine {name}")
    wrong = next((word for word, value in others.items() if value), None)
    if wrong and engine == "slurm":
        raise UsageError(f"{wrong} can't be used with --engine slurm", remedy="its tasks run shards; leave it out")


def _named(suite: str) -> str:
    if not suite:
        from d2obench.suite.definition import shipped

        raise UsageError("which suite?", remedy=f"name a .toml or one of {', '.join(shipped())}")
    return suite


def _said(words: list[str]) -> list[str]:
    """The command line as it is recorded: how to run it again, without the paths of this machine."""
    return ["d2obench", *(Path(word).name if word.startswith(("/", "~")) else word for word in words[1:])]
