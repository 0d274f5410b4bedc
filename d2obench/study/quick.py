"""Whether the first command tells the truth on a busy machine: a short ``quick`` is run many times under four loads.

A third of the runs are undisturbed and serve as the truth: each has fresh processes, and the median of a figure over
these runs has an interval. The other runs are judged. They run on a quiet machine, beside one busy core, beside as many
busy processes as there are cores, and beside bursts of two seconds.

What is judged are the claims of a report (:class:`~d2obench.stats.claims.Claim`): its sentences, bold figures, marks ◆
and targets. A claim is false if the interval of the truth excludes it, that is, if the truth lies on the other side, or
so far away that the two intervals do not touch.

Runs of all kinds alternate, so that a study that is stopped or runs out of time is a smaller study. A run that is
already in the folder is not repeated.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
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
"""The options that make ``d2obench run quick`` short: a run takes about 40 seconds on two quiet cores."""
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
    """The claims of a run's report, and all of its figures as (cell, metric, value)."""

    claims: tuple[Claim, ...]
    figures: tuple[tuple[str, str, float], ...]


class Sentence(msgspec.Struct, frozen=True):
    """One claim of one run, whether it is false, and the truth: the median of undisturbed runs, with its interval."""

    run: str
    load: str
    claim: Claim
    false: bool
    truth: float | None
    lo: float | None
    hi: float | None


class Tried(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run: its load, its duration in seconds, its claims, its figures if it is undisturbed, and why it failed."""

    name: str
    load: str
    seconds: float
    claims: tuple[Claim, ...] = ()
    figures: tuple[tuple[str, str, float], ...] = ()
    failed: str = ""


class QuickStudy(msgspec.Struct, frozen=True):
    """The options of the runs, all runs, and all claims of the judged ones."""

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
    """Runs and judges, and writes ``study.json`` and ``README.md`` after every run. Runs that an earlier call has ended
    are only read again.

    Args:
        folder: for the runs and the results.
        runs: number of runs that are judged, a quarter of them under each load.
        truths: number of undisturbed runs beside them.
        minutes: no run is begun after so many minutes.
        options: of ``d2obench run quick``.
        runner: makes a run in a folder, and returns why it failed, or an empty text.
        reader: reads the claims and figures of that folder.
        watch: receives a line after each run.

    Raises:
        UsageError: there are too few runs.
    """
    if runs < len(LOADS) or truths < 3:
        raise UsageError(
            f"{runs} runs and {truths} undisturbed ones are too few",
            why="each of four loads needs a run, and an interval of the truth needs three",
            remedy="give --runs 4 or more",
        )
    end, done = time.monotonic() + 60 * minutes, list[Tried]()
    found, took = QuickStudy(tuple(options), (), ()), _seconds(folder)
    for name, load in plan(runs, truths):
        place = folder / "runs" / name
        known = (place / "report.html").is_file()
        if not known and time.monotonic() > end:
            watch(f"{minutes:g} minutes are over after {len(done)} runs")
            break
        since, failed = time.monotonic(), ""
        if not known:
            shutil.rmtree(place, ignore_errors=True)  # what a killed study left
            with loaded(load):
                failed = (runner or run)(options, place)
        seconds = took.get(name, 0.0) if known else round(time.monotonic() - since, 1)
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


def _seconds(folder: Path) -> dict[str, float]:
    """What each run of an earlier call took, by name."""
    try:
        earlier = msgspec.json.decode((folder / "study.json").read_bytes(), type=QuickStudy)
    except (OSError, msgspec.MsgspecError):
        return {}
    return {one.name: one.seconds for one in earlier.runs}


def plan(runs: int, truths: int, seed: int = 0) -> list[tuple[str, str]]:
    """The name and the load of every run: each kind is spread evenly, and ties are ordered at random."""
    places = [((i + 0.5) / truths, TRUTH, i) for i in range(truths)]
    each = [runs // len(LOADS) + (number < runs % len(LOADS)) for number in range(len(LOADS))]
    places += [((i + 0.5) / count, load, i) for load, count in zip(LOADS, each, strict=True) for i in range(count)]
    dice = random.Random(seed)
    ordered = sorted(places, key=lambda place: (place[0], dice.random()))
    return [(f"{load.replace(' ', '-')}-{number + 1:02}", load) for _, load, number in ordered]


def run(options: Sequence[str], place: Path) -> str:
    """Runs ``d2obench run quick`` in a process of its own. Returns why it failed, or an empty text."""
    command = [sys.executable, "-P", "-m", "d2obench", "run", "quick", *options, "--out", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[-300:] or f"exit {done.returncode}"


@contextmanager
def loaded(load: str) -> Iterator[None]:
    """Keeps cores busy while the block runs; the processes that do so end with this one, however it ends."""
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
    """Reads the claims and the figures of a run's report."""
    report = build([place])
    return Said(
        report.claims, tuple((row.cell, row.metric, row.value) for row in report.results if row.value is not None)
    )


def judge(runs: Sequence[Tried]) -> list[Sentence]:
    """Every claim of the judged runs, compared with the undisturbed runs, of which at least three are needed."""
    every: dict[tuple[str, str], list[float]] = {}
    for one in runs:
        for cell, metric, value in one.figures if not one.failed else ():
            every.setdefault((cell, metric), []).append(value)
    truth = {key: median(values) for key, values in every.items() if len(values) > 2}
    return [
        _sentence(one, claim, truth) for one in runs if one.load != TRUTH and not one.failed for claim in one.claims
    ]


def excluded(claim: Claim, truth: Mapping[tuple[str, str], Value]) -> bool:
    """Whether the interval of the truth excludes a claim.

    1. The interval of the claim and that of the truth do not touch.
    2. ``best`` and ``undominated``: one of the others is truly better, that is, the intervals of the truth are apart.
    3. ``missed``: the truth lies inside the bounds of the target.
    4. ``better``, ``worse`` and ``met``: the truth lies outside the bounds that the word claims.
    """
    mine = _ends(truth.get((claim.cell, claim.metric)))
    if mine is None:
        return False
    lo, hi = mine
    if claim.lo is not None and claim.hi is not None and (hi < claim.lo or lo > claim.hi):
        return True
    if claim.word in ("best", "undominated"):
        others = [_ends(truth.get((other, claim.metric))) for other in claim.others]
        up = METRICS[claim.metric.partition(":")[0]].direction == "higher"
        return any(other[0] > hi if up else other[1] < lo for other in others if other)
    least = -math.inf if claim.least is None else claim.least
    most = math.inf if claim.most is None else claim.most
    if claim.word == "missed":
        return least <= lo and hi <= most
    return hi < least or lo > most


def write(folder: Path, found: QuickStudy) -> None:
    """Writes ``study.json`` and ``README.md``."""
    text = json.dumps(msgspec.to_builtins(found), sort_keys=True, separators=(",", ":"))
    write_atomic(folder / "study.json", text.replace('{"claim"', '\n{"claim"').encode() + b"\n")
    write_atomic(folder / "README.md", markdown(found).encode())


def markdown(found: QuickStudy) -> str:
    """The text of ``README.md``: a table by load, and every false claim."""
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
    against = f" against {', '.join(claim.others)}" if claim.others else ""
    return f"{claim.cell}: {METRICS[claim.metric.partition(':')[0]].header} {claim.word}{against}"


def _interval(of: Claim | Sentence) -> str:
    return "–" if of.lo is None or of.hi is None else f"{of.lo:.4g} … {of.hi:.4g}"
