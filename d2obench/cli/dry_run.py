"""The table of ``d2obench run --dry-run``: every cell with its predicted memory and time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2obench.run.plan import Plan
    from d2obench.run.predict import Device
    from d2obench.tasks.base import Cell


@dataclass
class Total:
    """Time and memory of all cells together."""

    seconds: float = 0.0
    memory: float = 0.0
    unknown: int = 0
    """Number of cells whose time can't be predicted."""
    cut: bool = False
    """Whether ``timing.max_seconds`` ends a group before all of its rounds are measured."""


def show_plan(plan: Plan, rates: Callable[[str, str], Device] | None = None) -> None:
    """Prints each cell as soon as it is predicted, then the total and the rates that the prediction is based on.

    Args:
        plan: the cells that would run.
        rates: returns the rates of a device for a dtype; by default they are measured in this process.
    """
    from d2obench.run.plan import group
    from d2obench.run.predict import rates_here
    from d2obench.run.schedule import sharing_of
    from d2obench.suite.grammar import show_duration

    rates = rates or rates_here
    known: dict[tuple[str, str], Device] = {}
    width = max(len(cell.id) for cell in plan.cells)
    print(f"{'cell':{width}}  {'memory':>11}  {'time':>10}", flush=True)
    total, sharing = Total(), sharing_of(plan)
    for together in group(plan.cells):
        kind = together[0].axes.device, together[0].axes.dtype
        if kind not in known:
            known[kind] = rates(*kind)
        _show_group(plan, together, known[kind], total, width, sharing)
    print(f"\n{f'{len(plan.cells)} cells':{width}}  {_size(total.memory):>11}  {show_duration(total.seconds):>10}\n")
    _explain(plan, total, known)


def _show_group(
    plan: Plan, together: Sequence[Cell], device: Device, total: Total, width: int, sharing: Mapping[str, int]
) -> None:
    """Prints the cells that are measured together and adds them to the total; ``sharing`` says for each quality cell
    how many read its prompts together."""
    from d2obench.run.predict import predict
    from d2obench.suite.grammar import show_duration

    timing, told = plan.suite.timing, 0.0
    for cell in together:
        if cell.id in plan.too_long:
            print(f"{cell.id:{width}}  {'too long':>11}  {'skipped':>10}")
            continue
        memory, seconds = predict(cell, plan.suite, plan.models[cell.axes.model], device, sharing.get(cell.id, 1))
        memory = memory and memory / plan.devices
        told += seconds or 0.0
        total.memory = max(total.memory, memory or 0.0)
        total.unknown += seconds is None
        print(f"{cell.id:{width}}  {_size(memory):>11}  {'–' if seconds is None else show_duration(seconds):>10}")
    sys.stdout.flush()
    bound = max(timing.max_seconds, told / timing.rounds)  # the first round is measured whole
    if together[0].timed and told > bound:
        told, total.cut = bound, True
    total.seconds += told


def _explain(plan: Plan, total: Total, rates: dict[tuple[str, str], Device]) -> None:
    """Prints the rates that the prediction is based on, and what it leaves out."""
    print("Memory and time are rough: they come from the model's dimensions and from these rates:")
    for (device, dtype), rate in rates.items():
        flops = f"{rate.flops / 1e9:,.0f} GFLOP/s"
        print(f"{device}, {dtype}: copies {rate.bandwidth / 1e9:,.0f} GB/s, multiplies {flops}")
    if plan.devices > 1:
        print(f"{plan.devices} devices share a model; the memory is that of each.")
    if total.cut:
        seconds = f"{plan.suite.timing.max_seconds:g} s (timing.max_seconds)"
        print(f"Cells that are timed together stop after {seconds}, so the total is less than their sum.")
    if not all(cell.timed for cell in plan.cells):
        print("The time of quality tasks is rougher still: published sizes of their sets, answers of full length.")
    if total.unknown:
        print(f"The time leaves out {total.unknown} cells: it depends on a search (batch max) or on a plug-in's data.")


def _size(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
