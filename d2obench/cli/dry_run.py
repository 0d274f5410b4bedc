"""The table of ``d2obench run --dry-run``: every cell with its predicted memory and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2obench.run.check import Checked
    from d2obench.run.plan import Device
    from d2obench.run.worker_client import Client


def show_plan(checked: Checked, client: Client) -> None:
    """Prints the cells; the device's rates are measured for it, nothing else is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from d2obench.report.display import spell
    from d2obench.run.plan import group, predict
    from d2obench.suite.definition import SPEED

    devices = _rates(checked, client)
    table = Table("cell", "memory", "time", box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    whole, most, unknown, cut = 0.0, 0.0, 0, False
    for together in group(checked.cells):
        told = 0.0
        for cell in together:
            if cell.id in checked.too_long:
                table.add_row(escape(cell.id), "too long", "skipped")
                continue
            axes = cell.axes
            memory, seconds = predict(cell, checked.suite, checked.models[axes.model], devices[axes.device, axes.dtype])
            memory = memory and memory / checked.devices
            told, most, unknown = told + (seconds or 0.0), max(most, memory or 0.0), unknown + (seconds is None)
            table.add_row(escape(cell.id), _size(memory), spell(seconds) if seconds is not None else "–")
        timing = checked.suite.timing
        bound = max(timing.max_seconds, told / timing.rounds)  # the first round is measured whole
        if together[0].axes.task == SPEED and told > bound:
            told, cut = bound, True
        whole += told
    for column, words in zip(table.columns, (f"{len(checked.cells)} cells", _size(most), spell(whole)), strict=True):
        column.footer = words
    console = Console()
    console.print(table)
    console.print("Rough, from the model's dimensions and rates measured just now:")
    if checked.devices > 1:
        console.print(f"{checked.devices} devices share a model; the memory is that of each.")
    if cut:
        console.print(
            f"Cells that are timed together stop after {checked.suite.timing.max_seconds:g} s (timing.max_seconds), so "
            "the total is less than their sum."
        )
    if any(cell.axes.task != SPEED for cell in checked.cells):
        console.print("Rougher still for quality: published sizes of the sets, answers as long as they may be.")
    for (device, dtype), rate in devices.items():
        console.print(
            f"{device}, {dtype}: copies {rate.bandwidth / 1e9:.0f} GB/s, multiplies {rate.flops / 1e9:,.0f} GFLOP/s"
        )
    if unknown:
        console.print(
            f"{unknown} cells are not in the time: it depends on a plug-in's data, or on a search (batch max)."
        )


def _rates(checked: Checked, client: Client) -> dict[tuple[str, str], Device]:
    from d2obench.run.plan import Device

    kinds = dict.fromkeys((cell.axes.device, cell.axes.dtype) for cell in checked.cells)
    return {
        (device, dtype): Device(**client.call("rates", {"device": device, "dtype": dtype})) for device, dtype in kinds
    }


def _size(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
