"""``d2obench profile SUITE``: where the time and memory of a cell go, with policies side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2obench.cli import options
from d2obench.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from d2obench.measure.profiler import Cost, Profile
    from d2obench.tasks.base import Cell


CellName = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART",
        help="Profile the cells whose id contains this, where * stands for anything: --cell 'd2o*b4'. The option can "
        "be repeated. By default, the first cells that are timed together are profiled.",
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Profile so many decode steps, after two that warm up: --steps 8.")]
Top = Annotated[int, typer.Option(min=1, help="List so many operators of each phase, the costliest first: --top 20.")]
Stacks = Annotated[
    bool,
    typer.Option(
        "--stacks",
        help="Write the stacks of a flame graph as well, which slows profiling. By default, none are written.",
    ),
]
Snapshot = Annotated[
    bool,
    typer.Option(
        "--snapshot",
        help="Write CUDA's memory history as well, for pytorch.org/memory_viz. By default, it is not recorded.",
    ),
]
Nvtx = Annotated[
    bool,
    typer.Option(
        "--nvtx",
        help="Send the named ranges to Nsight Systems (nsys). By default, PyTorch's profiler records them.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write traces and figures to this folder. By default, it is d2obench-runs/TIME-profile-SUITE.",
    ),
]


def profile(
    suite: options.SuiteName,
    cell: CellName = None,
    policy: options.Policy = None,
    budget: options.Budget = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    shape: options.Shape = None,
    batch: options.Batch = None,
    set_: options.Set = None,
    kernels: options.Kernels = None,
    steps: Steps = 4,
    top: Top = 12,
    stacks: Stacks = False,
    snapshot: Snapshot = False,
    nvtx: Nvtx = False,
    out: Out = None,
) -> None:
    """Show where the time and memory of a cell go, with policies side by side, and write a trace for Perfetto.

    Example: d2obench profile quick --policy full,d2o --shape 768+32
    """
    axes = {
        "policy": policy, "budget": budget, "model": model, "dtype": dtype,
        "device": device, "shape": shape, "batch": batch, "task": "speed",
    }  # fmt: skip
    given = options.overrides(axes, {"models.kernels": kernels}, set_ or ())
    name, whose, picked = _picked(suite, given, cell or ())
    if nvtx:
        _to_nsys(picked, steps, whose)
        return
    _profile_all(name, picked, steps, top, out, kernels=whose, stacks=stacks, snapshot=snapshot)


def _picked(suite: str, given: Mapping[str, str], wanted: Sequence[str]) -> tuple[str, str, list[Cell]]:
    """The name of the suite, the choice of ``--kernels``, and the cells to profile."""
    from d2obench.run.check import check_one, check_suite
    from d2obench.run.plan import cells
    from d2obench.suite.definition import load_suite

    chosen = load_suite(suite, given)
    check_suite(chosen)
    check_one(chosen, "d2obench profile")
    return chosen.name, chosen.models.kernels, pick(cells(chosen), wanted)


def _profile_all(
    name: str,
    picked: Sequence[Cell],
    steps: int,
    top: int,
    out: Path | None,
    *,
    kernels: str,
    stacks: bool,
    snapshot: bool,
) -> None:
    """Profiles the cells one after another, writes their traces and figures, and prints the tables."""
    from rich.console import Console

    from d2obench.record import dump, write_atomic
    from d2obench.run.run_folder import new_folder

    console, folder = Console(), new_folder(f"profile-{name}", out)
    found: dict[str, Profile] = {}
    for one in picked:
        console.print(f"profiling {one.id}", style="dim", markup=False)
        found[one.id] = _profile(one, steps, folder, kernels=kernels, stacks=stacks, snapshot=snapshot)
    write_atomic(folder / "profile.json", dump({cell: _plain(profile) for cell, profile in found.items()}))
    labelled = {label: found[one.id] for one, label in zip(picked, labels(picked), strict=True)}
    for table in [*tables(labelled, top), counts_table(labelled, top)]:
        console.print(table)
    console.print(f"Traces (open them at ui.perfetto.dev) and figures are in {folder}", markup=False)


def pick(cells: Sequence[Cell], wanted: Sequence[str]) -> list[Cell]:
    """The speed cells whose id contains one of ``wanted``; if it is empty, the first group that is timed together.

    Raises:
        UsageError: there is no such cell.
    """
    from d2obench.run.plan import group

    timed = [cell for cell in cells if cell.timed and isinstance(cell.batch, int)]
    if not timed:
        raise UsageError("the suite has no speed cell with a batch in numbers", remedy="add --batch 4")
    if not wanted:
        return group(timed)[0]
    found = [cell for cell in timed if any(fnmatch(cell.id, f"*{words}*") for words in wanted)]
    if not found:
        raise UsageError(f"no speed cell is named like '{wanted[0]}'", remedy=f"for example --cell {timed[0].id}")
    return found


def labels(cells: Sequence[Cell]) -> list[str]:
    """The header of each cell's column: policy and budget, and every other axis that differs between the cells."""
    others = ("model", "dtype", "device", "shape", "batch", "seed")
    differing = [key for key in others if len({getattr(cell.axes, key) for cell in cells}) > 1]
    found = []
    for cell in cells:
        at = f"@{cell.axes.budget}" if cell.axes.budget else ""
        found.append(" ".join([cell.axes.policy + at, *(str(getattr(cell.axes, key)) for key in differing)]))
    return found


def tables(profiles: Mapping[str, Profile], top: int) -> list[Table]:
    """Three tables for each phase, with a column for each cell: time by range, memory by range, time by operator."""
    found = []
    for phase in ("prefill", "compress", "decode"):
        each = " a step" if phase == "decode" else ""
        ranges = {label: profile.ranges[phase] for label, profile in profiles.items()}
        operators = {label: profile.operators[phase] for label, profile in profiles.items()}
        on_device = any(cost.device_s > 0 for costs in ranges.values() for cost in costs.values())
        time = _device_ms if on_device else _cpu_ms
        clock = "device ms" if on_device else "ms"
        found.append(_table(f"{phase}: {clock}{each} by range", ranges, time, None))
        found.append(_table(f"{phase}: MiB allocated{each} by range", ranges, _mib, None))
        found.append(_table(f"{phase}: {clock}{each} by operator, the {top} largest", operators, time, top))
    return found


def counts_table(profiles: Mapping[str, Profile], top: int) -> Table:
    """Counts of what one decode step does, which are the same on every machine, and its most frequent operators."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title="decode: counts a step", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for label in profiles:
        table.add_column(Text(label), justify="right", overflow="fold")
    counts = [profile.counts for profile in profiles.values()]
    rows: list[tuple[str, list[str]]] = [
        ("operators", [str(one.ops) for one in counts]),
        ("kernels launched", ["–" if one.launches is None else str(one.launches) for one in counts]),
        ("concatenations", [str(sum(one.concatenations.values())) for one in counts]),
        ("host waits", [str(sum(one.waits.values())) for one in counts]),
        ("MFLOP", [f"{one.flops / 1e6:,.1f}" for one in counts]),
        ("fresh MiB", [f"{one.allocated_bytes / 2**20:.2f}" for one in counts]),
        ("largest fresh MiB", [f"{one.largest_bytes / 2**20:.2f} {one.largest_op}" for one in counts]),
    ]
    for name, fields in rows:
        table.add_row(name, *map(Text, fields))
    table.add_section()
    most = {name: max(one.by_op.get(name, 0) for one in counts) for one in counts for name in one.by_op}
    for name in sorted(most, key=lambda name: (-most[name], name))[:top]:
        table.add_row(Text(name), *(str(one.by_op.get(name, 0)) for one in counts))
    return table


def _plain(profile: Profile) -> dict[str, Any]:
    return {**profile._asdict(), "counts": profile.counts._asdict()}


def _table(
    title: str, costs: Mapping[str, Mapping[str, Cost]], measure: Callable[[Cost], float], top: int | None
) -> Table:
    """A table with the largest figures first; each field shows the figure and its share of the column."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for label in costs:
        table.add_column(Text(label), justify="right", overflow="fold")
    totals = [sum(map(measure, column.values())) for column in costs.values()]
    names = {name for column in costs.values() for name in column}
    highest = {name: max(measure(column[name]) for column in costs.values() if name in column) for name in names}
    for name in sorted(names, key=lambda name: (-highest[name], name))[:top]:
        fields = [
            f"{measure(column[name]):.2f} {measure(column[name]) / (total or 1):4.0%}" if name in column else "–"
            for column, total in zip(costs.values(), totals, strict=True)
        ]
        table.add_row(Text(name), *fields)
    table.add_section()
    table.add_row("all", *(f"{total:.2f}     " for total in totals))
    return table


def _cpu_ms(cost: Cost) -> float:
    return cost.cpu_s * 1e3


def _device_ms(cost: Cost) -> float:
    return cost.device_s * 1e3


def _mib(cost: Cost) -> float:
    return cost.allocated_bytes / 2**20


def _profile(cell: Cell, steps: int, folder: Path, *, kernels: str, stacks: bool, snapshot: bool) -> Profile:
    from d2obench.measure.memory import settle
    from d2obench.measure.profiler import Files, profile_request

    factory, loaded, prompts = _request(cell, steps, kernels)
    settle(loaded.device)
    name = re.sub(r"[^\w.@+=-]+", "_", cell.id.partition("/")[2])
    files = Files(
        folder / f"{name}.trace.json.gz",
        folder / f"{name}.stacks.txt" if stacks else None,
        folder / f"{name}.memory.pickle" if snapshot else None,
    )
    return profile_request(factory, loaded.model, prompts, steps=steps, files=files)


def _to_nsys(cells: Sequence[Cell], steps: int, kernels: str) -> None:
    import torch

    from d2obench.measure.profiler import nvtx_request

    if not torch.cuda.is_available():
        raise UsageError("--nvtx needs a GPU", why="torch sees none", remedy="leave it out to profile here")
    for cell in cells:
        factory, loaded, prompts = _request(cell, steps, kernels)
        nvtx_request(factory, loaded.model, prompts, steps=steps)


def _request(cell: Cell, steps: int, kernels: str) -> tuple[Any, Any, list[list[int]]]:
    """A function that opens the cell's session, its model (the last one used stays loaded), and its prompts."""
    from d2obench.external import open_session
    from d2obench.models import load
    from d2obench.tasks.base import shape_of
    from d2obench.tasks.prompts import timing_prompts

    axes = cell.axes
    key = (axes.model, axes.dtype, axes.device)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load(*key, kernels=kernels)
    loaded = _loaded[key]
    shape = shape_of(cell)
    assert isinstance(axes.batch, int)

    def factory(mark: Any) -> Any:
        steps_most = max(shape.gen, steps + 2)
        return open_session(loaded, cell.policy.built, cell.budget, max_new=steps_most, seed=axes.seed, mark=mark)

    return factory, loaded, timing_prompts(loaded, shape.prompt, axes.batch, axes.seed)


_loaded: dict[tuple[str, str, str], Any] = {}
