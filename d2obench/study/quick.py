"""Whether the first command tells the truth on a busy machine: a short ``quick``, many times, under four loads.

A fifth of the runs are taken alone and are the truth: their figures, one a run and each from fresh processes, give an
interval of every figure. The others run on a quiet machine, beside one busy core, beside as many busy processes as
there are cores, and beside bursts of two seconds. A sentence of these (a :class:`~d2obench.stats.claims.Claim` of their
report: better, worse, best, met, missed, a bold figure) is false where the truth's interval excludes it: the truth lies
on the other side, or so far off that the two intervals do not touch.

Runs of all kinds take turns, so a study that is stopped, or out of time, is a smaller study. A run that is already in
the folder is not run again.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from d2obench.errors import D2OBenchError, UsageError
from d2obench.metric import METRICS
from d2obench.record import Value, write_atomic
from d2obench.report import build
from d2obench.stats.claims import Claim
from d2obench.stats.intervals import median, proportion

TRUTH, LOADS = "truth", ("quiet", "one core", "all cores", "bursts")
SHORT = (
    "--policy", "full,h2o,d2o", "--shape", "128+16", "--batch", "8", "--task", "speed,fidelity(documents=6)",
    "--rounds", "2", "--set", "timing.max_rounds=2", "--set", "timing.windows=8",
)  # fmt: skip
"""What follows ``d2obench run quick`` to make it short: some 40 seconds on two quiet cores."""
_BURN = """
import os, sys, time
parent, on, off = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
while os.getppid() == parent:
    end = time.monotonic() + on
    while time.monotonic() < end:
        pass
    time.sleep(off)
"""
Runner = Callable[[Sequence[str], Path], str]
Reader = Callable[[Path], "Said"]


class Said(NamedTuple):
    """What the report of a run claims, and all its figures as (cell, metric, value)."""

    claims: tuple[Claim, ...]
    figures: tuple[tuple[str, str, float], ...]


class Sentence(msgspec.Struct, frozen=True):
    """One claim of one run, and what the truth says to it; ``truth`` is the median of the undisturbed runs."""

    run: str
    load: str
    claim: Claim
    false: bool
    truth: float | None
    lo: float | None
    hi: float | None


class Tried(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run: its load, how long it took, what it claims, its figures where it is a truth, and how it failed."""

    name: str
    load: str
    seconds: float
    claims: tuple[Claim, ...] = ()
    figures: tuple[tuple[str, str, float], ...] = ()
    failed: str = ""


class QuickStudy(msgspec.Struct, frozen=True):
    """All runs and all sentences of the runs that are not the truth."""

    command: tuple[str, ...]
    runs: tuple[Tried, ...]
    sentences: tuple[Sentence, ...]
    schema: int = 1


def study(
    folder: Path,
    *,
    runs: int = 40,
    truths: int = 20,
    minutes: float = 60.0,
    options: Sequence[str] = SHORT,
    runner: Runner | None = None,
    reader: Reader | None = None,
    watch: Callable[[str], None] = print,
) -> QuickStudy:
    """Runs, judges and writes ``study.json`` and ``README.md`` after every run.

    Args:
        folder: holds the runs and what was found.
        runs: runs that are judged, a quarter of them under each load.
        truths: undisturbed runs beside them.
        minutes: no run is begun after these.
        options: of ``d2obench run quick``.
        runner: runs a command that leaves its run in a folder, and returns why it failed or nothing.
        reader: reads that folder.
        watch: is told what goes on.

    Raises:
        UsageError: too few runs for any truth.
    """
    if runs < len(LOADS) or truths < 3:
        raise UsageError(
            f"{runs} runs and {truths} undisturbed ones are too few",
            why="each of four loads needs a run, and an interval of the truth needs three",
            remedy="give --runs 4 or more",
        )
    end, done = time.monotonic() + 60 * minutes, list[Tried]()
    found = QuickStudy(tuple(options), (), ())
    for name, load in plan(runs, truths):
        place = folder / "runs" / name
        known = (place / "run.json").is_file()
        if not known and time.monotonic() > end:
            watch(f"{minutes:g} minutes are over after {len(done)} runs")
            break
        since, failed = time.monotonic(), ""
        if not known:
            with loaded(load):
                failed = (runner or run)(options, place)
        seconds = round(time.monotonic() - since, 1)
        try:
            said = (reader or read)(place)
        except D2OBenchError as problem:
            said, failed = Said((), ()), failed or str(problem)
        figures = said.figures if load == TRUTH else ()
        done.append(Tried(name, load, seconds, said.claims, figures, failed))
        watch(f"{name}, {load}: {done[-1].failed or f'{len(done[-1].claims)} sentences'}")
        found = QuickStudy(tuple(options), tuple(done), tuple(judge(done)))
        write(folder, found)
    return found


def plan(runs: int, truths: int, seed: int = 0) -> list[tuple[str, str]]:
    """Name and load of every run: all kinds spread evenly, in an order that chance decides."""
    places = [((i + 0.5) / truths, TRUTH, i) for i in range(truths)]
    each = [runs // len(LOADS) + (number < runs % len(LOADS)) for number in range(len(LOADS))]
    places += [((i + 0.5) / count, load, i) for load, count in zip(LOADS, each, strict=True) for i in range(count)]
    dice = random.Random(seed)
    ordered = sorted(places, key=lambda place: (place[0], dice.random()))
    return [(f"{load.replace(' ', '-')}-{number + 1:02}", load) for _, load, number in ordered]


def run(options: Sequence[str], place: Path) -> str:
    """``d2obench run quick`` in a process of its own."""
    command = [sys.executable, "-P", "-m", "d2obench", "run", "quick", *options, "--out", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[-300:] or f"exit {done.returncode}"


@contextmanager
def loaded(load: str) -> Iterator[None]:
    """Keeps cores busy for as long as the block lasts; the processes end with this one, however it ends."""
    count = {TRUTH: 0, "quiet": 0, "one core": 1, "all cores": os.cpu_count() or 1, "bursts": 1}[load]
    on, off = (2.0, 2.0) if load == "bursts" else (1.0, 0.0)
    command = [sys.executable, "-c", _BURN, str(os.getpid()), str(on), str(off)]
    busy = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()


def read(place: Path) -> Said:
    """The report of a run folder."""
    report = build([place])
    return Said(
        report.claims, tuple((row.cell, row.metric, row.value) for row in report.results if row.value is not None)
    )


def judge(runs: Sequence[Tried]) -> list[Sentence]:
    """Every sentence of the judged runs against the undisturbed ones; none before there are three of those."""
    every: dict[tuple[str, str], list[float]] = {}
    for one in runs:
        for cell, metric, value in one.figures if not one.failed else ():
            every.setdefault((cell, metric), []).append(value)
    truth = {key: median(values) for key, values in every.items() if len(values) > 2}
    return [
        _sentence(one, claim, truth) for one in runs if one.load != TRUTH and not one.failed for claim in one.claims
    ]


def excluded(claim: Claim, truth: Mapping[tuple[str, str], Value]) -> bool:
    """Whether the truth's interval excludes what a sentence says."""
    mine = _ends(truth.get((claim.cell, claim.metric)))
    if mine is None:
        return False
    lo, hi = mine
    if claim.lo is not None and claim.hi is not None and (hi < claim.lo or lo > claim.hi):
        return True
    if claim.word == "best":
        others = [_ends(truth.get((other, claim.metric))) for other in claim.others]
        up = METRICS[claim.metric.partition(":")[0]].direction == "higher"
        return any(other[0] > hi if up else other[1] < lo for other in others if other)
    least = -math.inf if claim.least is None else claim.least
    most = math.inf if claim.most is None else claim.most
    if claim.word == "missed":
        return least <= lo and hi <= most
    return hi < least or lo > most


def write(folder: Path, found: QuickStudy) -> None:
    """``study.json`` and ``README.md``."""
    text = json.dumps(msgspec.to_builtins(found), sort_keys=True, separators=(",", ":"))
    write_atomic(folder / "study.json", text.replace('{"claim"', '\n{"claim"').encode() + b"\n")
    write_atomic(folder / "README.md", markdown(found).encode())


def markdown(found: QuickStudy) -> str:
    """The table by load, and every false sentence."""
    judged = [one for one in found.runs if one.load != TRUTH]
    lines = [
        "# The first command on a busy machine\n",
        f"`d2obench run quick {' '.join(found.command)}`, {len(judged)} times under four loads and"
        f" {sum(one.load == TRUTH for one in found.runs)} times undisturbed in between. A sentence is false where the"
        " interval of the undisturbed runs excludes it.\n",
        "| load | runs | failed | sentences | false | runs with a false one (95 %) | median s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for load in (*LOADS, "all"):
        mine = [one for one in judged if load in (one.load, "all")]
        if not mine:
            continue
        said = [one for one in found.sentences if load in (one.load, "all")]
        wrong = len({one.run for one in said if one.false})
        good = [one for one in mine if not one.failed]
        share = proportion(wrong, len(good)) if good else Value(None)
        bounds = f"{share.value:.1%} ({share.lo:.1%} … {share.hi:.1%})" if good else "–"
        seconds = sorted(one.seconds for one in mine)[len(mine) // 2]
        lines.append(
            f"| {load} | {len(mine)} | {len(mine) - len(good)} | {len(said)} | {sum(one.false for one in said)}"
            f" | {bounds} | {seconds:.0f} |"
        )
    false = [one for one in found.sentences if one.false]
    if false:
        lines += ["\n## False sentences\n", "| run | sentence | it rests on | truth |", "|---|---|---|---|"]
        lines += [f"| {one.run} | {_said(one.claim)} | {_interval(one.claim)} | {_interval(one)} |" for one in false]
    failed = [one for one in found.runs if one.failed]
    if failed:
        lines += ["\n## Failed runs\n", *(f"* {one.name}: `{' '.join(one.failed.split())}`" for one in failed)]
    lines.append("\n`study.json` holds every sentence. Made by `d2obench doctor --study-quick --output FOLDER`.")
    return "\n".join(lines) + "\n"


def _sentence(one: Tried, claim: Claim, truth: Mapping[tuple[str, str], Value]) -> Sentence:
    known = truth.get((claim.cell, claim.metric), Value(None))
    return Sentence(one.name, one.load, claim, excluded(claim, truth), known.value, known.lo, known.hi)


def _ends(value: Value | None) -> tuple[float, float] | None:
    if value is None or value.lo is None or value.hi is None:
        return None
    return value.lo, value.hi


def _said(claim: Claim) -> str:
    against = f" than {', '.join(claim.others)}" if claim.others else ""
    return f"{claim.cell}: {METRICS[claim.metric.partition(':')[0]].header} {claim.word}{against}"


def _interval(of: Claim | Sentence) -> str:
    return "–" if of.lo is None or of.hi is None else f"{of.lo:.4g} … {of.hi:.4g}"
