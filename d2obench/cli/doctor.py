"""``d2obench doctor``: whether this machine is fit to measure, and how small a change it can tell from noise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from d2obench.measure.checkup import Finding, Noise
    from d2obench.study.gate import Study

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "bad": "[red]✗[/]"}


Seconds = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Measure the noise for so many seconds, by comparing a loop with itself; 0 leaves it out: --seconds 20.",
    ),
]
Device = Annotated[
    str, typer.Option(help="Look at this device: auto, cpu, cuda or cuda:1. auto is the first GPU, if there is one.")
]
Gpu = Annotated[
    bool,
    typer.Option(
        "--gpu",
        help="Check the GPU path in one or two minutes: compile the kernels and compare them with PyTorch's operators, "
        "capture CUDA graphs, time a decode step against the memory bandwidth, and compare the driver's memory with "
        "PyTorch's. Nobody has run this on a real GPU yet: please send what it prints. By default, it is left out.",
    ),
]
StudyGate = Annotated[
    bool,
    typer.Option(
        "--study",
        help="Study how often the gate's rule for timed figures is right on this machine, in about 20 minutes. By "
        "default, no study is made.",
    ),
]
StudyRepository = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Study how often whole gates of a repository are right: FOLDER has a repository with a gate.toml and "
        "known changes of it, as tests/template_plugin has. A gate takes about a minute. By default, no study is made.",
    ),
]
Gates = Annotated[
    int,
    typer.Option(
        min=1,
        help="With --study, try so many gates for each head, 0, 10 and 20 % slower; with --study-repository, for each "
        "change: --gates 5.",
    ),
]
Load = Annotated[
    bool,
    typer.Option(
        "--load",
        help="With --study or --study-repository, keep one core busy with other work. By default, nothing else is "
        "started.",
    ),
]
Coverage = Annotated[
    bool,
    typer.Option(
        "--coverage",
        help="Simulate how often the intervals of a report contain the true value, in about a minute. By default, "
        "nothing is simulated.",
    ),
]
StudyQuick = Annotated[
    bool,
    typer.Option(
        "--study-quick",
        help="Run a short version of the suite quick many times, quiet and under load, and count the false sentences "
        "of its reports; this needs --output. By default, no study is made.",
    ),
]
Runs = Annotated[
    int,
    typer.Option(
        min=4, help="With --study-quick, judge so many runs: --runs 8. Half as many undisturbed runs are added."
    ),
]
Minutes = Annotated[
    float, typer.Option(min=0.0, help="With --study-quick, begin no run after so many minutes: --minutes 60.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="With a study or --coverage, write the results to this folder; a study goes on with what it holds. By "
        "default, they are only printed.",
    ),
]


def doctor(
    seconds: Seconds = 60.0,
    device: Device = "auto",
    gpu: Gpu = False,
    study: StudyGate = False,
    study_repository: StudyRepository = None,
    gates: Gates = 20,
    load: Load = False,
    coverage: Coverage = False,
    study_quick: StudyQuick = False,
    runs: Runs = 40,
    minutes: Minutes = 60.0,
    output: Output = None,
) -> None:
    """Tell whether this machine is fit to measure: what is missing, what to type, and how small a change can be seen.

    Example: d2obench doctor --seconds 20

    Nobody has run d2obench on a GPU yet. If you have one, three commands tell in ten minutes whether it works there:

    1. d2obench doctor --gpu: every line begins with ✓, and the last one says "Nothing to mend".

    2. d2obench run quick: a table with figures for four policies, whose remarks don't say "PyTorch's operators" or "not
    captured".

    3. d2obench run engine-gpu --shape 1024+256 --batch 32 --within 6m: the same of Llama-3-8B, with stated targets; it
    needs 24 GiB.

    Please send what they print and the folder d2obench-runs as an issue of the repository, above all where it is not
    so.
    """
    from rich.console import Console

    console = Console()
    if coverage:
        _show_coverage(console, output)
        return
    if study_quick:
        _show_study_quick(console, runs, minutes, output)
        return
    if study_repository is not None:
        _show_study_repository(console, study_repository, gates, output, load=load)
        return
    if study:
        _show_study(console, gates, output, load=load)
        return
    from d2obench.models import pick_device

    place = pick_device(device)
    if gpu:
        _show_gpu(console, place)
        return
    from d2obench.measure.checkup import checkup

    _show_findings(console, checkup(place))
    if seconds > 0:
        from d2obench.measure.checkup import measure_noise

        with console.status("A/A run: the same loop against itself") as status:
            noise = measure_noise(place, seconds, progress=lambda share: status.update(f"A/A run: {share:.0%}"))
        _show_noise(console, noise)
    _show_bandwidth(console, place)


def _show_gpu(console: Console, device: torch.device) -> None:
    """Prints the findings about the GPU path; a machine without a GPU is refused."""
    from d2obench.errors import UsageError

    if device.type != "cuda":
        raise UsageError(
            "doctor --gpu needs a GPU",
            why=f"the device is {device}",
            remedy="where nvidia-smi lists one, install the CUDA build of torch: see pytorch.org/get-started",
        )
    from d2obench.measure.gpu_checkup import gpu_checkup

    _show_findings(console, gpu_checkup(device))


def _show_findings(console: Console, findings: Iterable[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    bad = 0
    with console.status("looking around"):
        for finding in findings:
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


def _show_study(console: Console, gates: int, output: Path | None, *, load: bool) -> None:
    """Runs the study of the gate and prints its outcomes; the files in ``output`` are updated after every gate."""
    from d2obench.study.gate import CHANGES, Study, read_study, study, write_study

    def keep(found: Study) -> None:
        if output is not None:
            write_study(output, found)

    def watch(words: str) -> None:
        console.print(words, style="dim", markup=False)

    known = read_study(output, Study) if output else None
    found = study(gates=dict.fromkeys(CHANGES, gates), burn=load, known=known, watch=watch, keep=keep)
    for outcome in found.outcomes:
        console.print(str(outcome), markup=False)
    if output is not None:
        console.print(f"{output / 'README.md'}", markup=False)


def _show_study_repository(console: Console, folder: Path, gates: int, output: Path | None, *, load: bool) -> None:
    """Gates the known changes of a repository and prints how often that was right."""
    from d2obench.study.gate import read_study
    from d2obench.study.repository import Study, as_markdown, study, write_study

    def watch(words: str) -> None:
        console.print(words, style="dim", markup=False)

    found = study(
        folder,
        gates=gates,
        burn=load,
        known=read_study(output, Study) if output else None,
        watch=watch,
        keep=lambda part: write_study(output, part) if output else None,
    )
    console.print(as_markdown(found), markup=False)


def _show_study_quick(console: Console, runs: int, minutes: float, output: Path | None) -> None:
    """Runs the study of the first command and prints its table. Runs that ``output`` already holds are not repeated."""
    from d2obench.errors import UsageError
    from d2obench.study.quick import markdown, study

    if output is None:
        raise UsageError("the study of quick needs a folder for its runs", remedy="add --output FOLDER")

    def watch(words: str) -> None:
        console.print(words, style="dim", markup=False)

    found = study(output, runs=runs, truths=max(3, runs // 2), minutes=minutes, watch=watch)
    console.print(markdown(found), markup=False)


def _show_coverage(console: Console, output: Path | None) -> None:
    """Simulates coverage and prints the lowest of each kind of figure; ``output`` receives the whole table."""
    from d2obench.study.coverage import bootstrap, least, study, write

    rows = study()
    console.print(least(rows), markup=False)
    if output is not None:
        write(output, rows, bootstrap())
        console.print(f"{output / 'README.md'}", markup=False)
