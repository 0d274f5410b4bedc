"""Interleaved rounds of two arms in ABBA order, judged at looks that are fixed in advance.

In a round, every cell is measured by one arm and immediately afterwards by the other; while one worker measures, the
other waits. The next round has the arms in the opposite order and the cells backwards.

After ``looks[0]`` rounds every timed figure is judged. A cell with an INCONCLUSIVE figure is measured on to the next
look, by fresh processes: the place of a process in memory changes its times by some percent (Mytkowicz et al., ASPLOS
2009; Kalibera and Jones, ISMM 2013), and more rounds of the same process would make that difference look certain.

A pair of measurements during which the GPU's clocks were held back is repeated a limited number of times, and the
repetitions are counted. Nothing is left out because it was slow.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from d2obench.errors import D2OBenchError, OutOfMemory
from d2obench.gate.arm import Arm
from d2obench.gate.rules import judge_timed, tolerance
from d2obench.gate.verdict import Row, Verdict
from d2obench.run.plan import abba
from d2obench.stats.ratios import RATIOS, pairs
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell

SLOWED = "GPU "
"""The beginning of a round's flag that says that the device's clocks were held back."""
REPEATS = 4
"""How often a pair is measured at most."""
Trace = dict[str, Any]

TIMES: dict[str, Callable[[Trace], float]] = {
    "ttft_s": lambda one: float(one["ttft_s"]),
    "prefill_s": lambda one: float(one["prefill_s"]),
    "compress_s": lambda one: float(one["compress_s"]),
    "tpot_s": lambda one: float(median(one["step_s"])) if one["step_s"] else 0.0,
    "e2e_s": lambda one: float(one["e2e_s"]),
    "instructions_step": lambda one: float(one.get("instructions") or 0.0),
}
"""Metric → the timed figure of one round; 0 where there is none."""

JUDGED_RATIOS = ("speedup", "speedup_e2e", "prefill_cost", "to_streaming")
"""Ratios within a group that a gate can judge: each side has its own, and the two are compared."""


class Failure(NamedTuple):
    """How a cell failed on one arm."""

    status: str
    reason: str


class Rounds:
    """All measurements of one group of cells: ``traces[cell id][arm]`` is a list with one entry for each round."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = list(cells)
        self.traces: dict[str, dict[str, list[Trace]]] = {cell.id: {"base": [], "head": []} for cell in cells}
        self.failed: dict[str, dict[str, Failure]] = {cell.id: {} for cell in cells}
        self.repeated = 0

    def series(self, cell: Cell, metric: str) -> tuple[list[float], list[float]]:
        """The figures of the base and of the head, one for each round; empty if the cell has no such figure."""
        mine = self.traces[cell.id]
        if metric in TIMES:
            sides = [[TIMES[metric](one) for one in mine[arm]] for arm in ("base", "head")]
        else:
            partner = self.partner(cell, metric)
            if partner is None:
                return [], []
            sides = []
            for arm in ("base", "head"):
                rounds = [{"rounds": _numbered(traces[arm])} for traces in (mine, self.traces[partner.id])]
                ours, theirs, _ = pairs(metric, *rounds, every=True)
                over, under = (theirs, ours) if RATIOS[metric].speedup else (ours, theirs)
                sides.append([a / b for a, b in zip(over, under, strict=True)])
        base, head = sides
        if self.failed[cell.id]:
            return [], []
        whole = len(base) == len(head) and all(value > 0 and math.isfinite(value) for value in (*base, *head))
        return (base, head) if whole else ([], [])

    def partner(self, cell: Cell, metric: str) -> Cell | None:
        """The cell of this group that a ratio of ``cell`` is taken against."""
        policy = RATIOS[metric].partner
        if cell.axes.policy == policy:
            return None
        for other in self.cells:
            if other.axes.policy == policy and other.axes.budget in (None, cell.axes.budget):
                return other
        return None


def measure_group(
    arms: Mapping[str, Arm],
    cells: Sequence[Cell],
    suite: Suite,
    watch: Callable[[str], None],
    only: Iterable[tuple[str, str]] | None = None,
    renew: Callable[[], object] | None = None,
) -> tuple[Rounds, list[Row]]:
    """Measures a group of cells until every timed figure is decided, or until the last look.

    Args:
        arms: ``base`` and ``head``.
        cells: a group that is timed together.
        suite: its ``gate`` table has the looks, the level, the metrics and the tolerances.
        watch: receives a line on what is going on.
        only: the pairs of cell id and metric to judge; all if it is left out.
        renew: gives both arms fresh processes; it is called before every look but the first.
    """
    rounds, gate = Rounds(cells), suite.gate
    wanted = None if only is None else set(only)
    first = random.Random(zlib.crc32(",".join(cell.id for cell in cells).encode())).choice((0, 1))
    live, number = list(cells), 0
    rows: dict[tuple[str, str], Row] = {}
    for look in sorted(gate.looks):
        # 1. measure on up to this look; which arm begins is drawn for each group, and then alternates
        watch(f"rounds {number + 1} to {look} of {len(live)} cells")
        if number and renew is not None:
            renew()
        while number < look and live:
            for cell in abba(live, number):
                _pair(arms, cell, rounds, ("base", "head") if (number + first) % 2 == 0 else ("head", "base"))
            live = [cell for cell in live if not rounds.failed[cell.id]]
            number += 1
        # 2. judge every figure that is not decided yet; the first decision is final
        for cell in cells:
            for metric in gate.metrics:
                key = (cell.id, metric)
                open_ = key not in rows or rows[key].verdict is Verdict.INCONCLUSIVE
                if open_ and (wanted is None or key in wanted) and all(sides := rounds.series(cell, metric)):
                    limit = tolerance(metric, gate.tolerance)
                    rows[key] = judge_timed(cell.id, metric, *sides, limit, gate.level)
        # 3. only cells with an undecided figure go on to the next look
        live = _undecided(rounds, rows)
        if not live:
            break
    return rounds, list(rows.values())


def _undecided(rounds: Rounds, rows: Mapping[tuple[str, str], Row]) -> list[Cell]:
    """The cells that need more rounds: those with an undecided figure, and the partners of undecided ratios."""
    needed = set()
    for (name, metric), row in rows.items():
        if row.verdict is Verdict.INCONCLUSIVE:
            cell = next(cell for cell in rounds.cells if cell.id == name)
            partner = rounds.partner(cell, metric) if metric in JUDGED_RATIOS else None
            needed |= {cell.id} | ({partner.id} if partner else set())
    return [cell for cell in rounds.cells if cell.id in needed and not rounds.failed[cell.id]]


def _pair(arms: Mapping[str, Arm], cell: Cell, rounds: Rounds, order: tuple[str, str]) -> None:
    if rounds.failed[cell.id]:
        return
    for attempt in range(REPEATS):
        found: dict[str, Trace] = {}
        for name in order:
            try:
                found[name] = arms[name].measure(cell)
            except OutOfMemory as problem:
                rounds.failed[cell.id][name] = Failure("oom", str(problem))
            except D2OBenchError as problem:
                rounds.failed[cell.id][name] = Failure("failed", str(problem))
        if rounds.failed[cell.id]:
            return
        slowed = any(flag.startswith(SLOWED) for one in found.values() for flag in one["flags"])
        if attempt + 1 == REPEATS or not slowed:
            break
        rounds.repeated += 1
    for name, trace in found.items():
        rounds.traces[cell.id][name].append(trace)


def _numbered(traces: Iterable[Trace]) -> list[Trace]:
    """The traces of one arm, each with the number of its round."""
    return [{**trace, "round": number} for number, trace in enumerate(traces)]
