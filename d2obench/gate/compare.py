"""Two finished runs side by side: effect, interval and verdict for every figure of every cell that both have.

Runs made at different times are judged by what the machine can't change: bytes, counts, quality, and ratios of caches
that took turns inside each run. Times and rates are shown side by side without a verdict. Peaks of memory are
INCOMPARABLE on unlike machines. What only one run has is a note: a comparison informs and never fails.
"""

from __future__ import annotations

import msgspec

from d2obench.gate.facts import facts_of_run, judge_facts
from d2obench.gate.rules import side_by_side
from d2obench.gate.verdict import Row, Verdict, Verdicts, gather
from d2obench.measure.environment import differences
from d2obench.metric import METRICS
from d2obench.record import CellRecord, Run

LATER = "measured at another time: the machine may have changed"


def compare_runs(base: Run, head: Run) -> Verdicts:
    """The comparison of ``head`` with ``base``.

    Raises:
        UsageError: no cell is in both.
    """
    before, after = facts_of_run(base), facts_of_run(head)
    apart = differences(base.info.environment, head.info.environment)
    machine = ", ".join(f"{key}: {a} → {b}" for key, (a, b) in apart.items())
    timed = {cell.id: cell for cell in base.cells}
    comparisons = sum(len(one.ratio) + len(one.sampled) for name, one in after.items() if name in before) or 1
    rows: list[Row] = []
    for cell in head.cells:
        if cell.id in before:
            facts = before[cell.id], after[cell.id]
            rows += judge_facts(cell.id, *facts, both_measured=True, comparisons=comparisons)
            rows += _times(timed[cell.id], cell, f"another machine: {machine}" if machine else LATER)
    if machine:
        rows = [_elsewhere(row, machine) if row.kind == "bounded" else row for row in rows]
    names = [run.path.name for run in (base, head)]
    notes = [f"{warning} ({name})" for name, run in zip(names, (base, head), strict=True) for warning in run.warnings]
    if machine:
        notes.append(f"the machines differ: {machine}")
    for name, mine, other in ((names[0], before, after), (names[1], after, before)):
        alone = [cell for cell in mine if cell not in other]
        if alone:
            notes.append(f"{len(alone)} cells are in {name} only, for example {alone[0]}")
    return gather("compare", names[0], names[1], rows, notes)


def _times(base: CellRecord, head: CellRecord, reason: str) -> list[Row]:
    if base.status != "ok" or head.status != "ok":
        return []
    keys = [key for key in base.values if key in METRICS and METRICS[key].kind == "timed" and key in head.values]
    pairs = [(key, base.values[key], head.values[key]) for key in keys]
    return [side_by_side(head.id, key, a, b, reason) for key, a, b in pairs if a.value and b.value]


def _elsewhere(row: Row, machine: str) -> Row:
    return msgspec.structs.replace(row, verdict=Verdict.INCOMPARABLE, reason=f"other machine: {machine}")
