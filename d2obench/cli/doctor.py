"""``d2obench doctor``: is this machine fit to measure, and how small a change can it tell from noise?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from d2obench.measure.noise import Noise

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "bad": "[red]✗[/]"}


def command(
    seconds: Annotated[float, typer.Option(min=0.0, help="length of the A/A run; 0 leaves it out")] = 60.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    study: Annotated[bool, typer.Option("--study", help="try the gate's timed rule here, some 20 minutes")] = False,
    gates: Annotated[int, typer.Option(min=1, help="live gates of the study for each of +0, +10 and +20 %")] = 20,
    load: Annotated[bool, typer.Option("--load", help="keep one core busy during the study")] = False,
    output: Annotated[Path | None, typer.Option(help="folder for what the study found")] = None,
) -> None:
    """Tell what is here, what is missing and what to type; measure the noise."""
    from rich.console import Console

    from d2obench.models import pick_device

    console = Console()
    if study:
        from d2obench.cli.study import show_study

        show_study(console, gates, output, load=load)
        return
    place = pick_device(device)
    _show_findings(console, place)
    if seconds > 0:
        from d2obench.measure.noise import measure_noise

        with console.status("A/A run: the same loop against itself") as status:
            noise = measure_noise(place, seconds, progress=lambda share: status.update(f"A/A run: {share:.0%}"))
        _show_noise(console, noise)
    _show_bandwidth(console, place)


def _show_findings(console: Console, device: torch.device) -> None:
    from rich.markup import escape
    from rich.table import Table

    from d2obench.measure.checkup import checkup

    table = Table.grid(padding=(0, 2))
    bad = 0
    with console.status("looking around"):
        for finding in checkup(device):
            bad += finding.state == "bad"
            remedy = f"→ {finding.remedy}" if finding.remedy else ""
            table.add_row(MARKS[finding.state], escape(finding.topic), escape(finding.text), escape(remedy))
    console.print(table)
    console.print(f"\n{bad} to mend before figures can be trusted" if bad else "\nNothing to mend", style="bold")


def _show_bandwidth(console: Console, device: torch.device) -> None:
    from d2obench.measure.roofline import copy_bandwidth

    found = copy_bandwidth(device)
    console.print(f"Copy bandwidth of {device}: {found.best / 1e9:.1f} GB/s (median {found.median / 1e9:.1f})")


def _show_noise(console: Console, noise: Noise) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(
        f"\nNoise of {len(noise.pairs)} interleaved rounds of one loop against itself: {noise.paired:.1%} a paired"
        f" round, {noise.single:.1%} unpaired; the two differ by {noise.offset:+.2%}"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="Smallest change seen 4 times of 5", title_justify="left")
    for header in ("rounds", "as different from 0", "past a gate of 5 %", "past a gate of 10 %"):
        table.add_column(header, justify="right")
    for rounds, change in noise.detectable.items():
        limits = [f"{(1 + limit) * (1 + change) - 1:.1%}" for limit in (0.05, 0.10)]
        table.add_row(str(rounds), f"{change:.1%}", *limits)
    console.print(table)
