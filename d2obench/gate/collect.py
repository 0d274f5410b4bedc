"""A finished run → the facts of its cells, for a baseline or a comparison with one."""

from __future__ import annotations

from typing import Any

from d2obench.gate.facts import Facts, facts_of
from d2obench.gate.rounds import RATIOS, STREAMING
from d2obench.record import CellRecord, Run, Value, read_samples
from d2obench.stats.bootstrap import paired_ratio
from d2obench.suite.definition import SPEED


def facts_of_run(run: Run) -> dict[str, Facts]:
    """Facts by cell id, ``to_streaming`` among the ratios; a cell that did not end well has only its status."""
    found = {}
    for cell in run.cells:
        samples = read_samples(run.path, cell) if cell.status == "ok" else {}
        values = {**cell.values, **_to_streaming(run, cell, samples)}
        found[cell.id] = facts_of(cell.id, cell.status, values, samples)
    return found


def _to_streaming(run: Run, cell: CellRecord, samples: dict[str, Any]) -> dict[str, Value]:
    """The cell's decode time against streaming's at the same budget, round by round."""
    other = next((one for one in run.cells if _is_partner(one, cell)), None)
    if other is None or cell.axes.task != SPEED or cell.status != "ok":
        return {}
    _, time, _ = RATIOS["to_streaming"]
    theirs = {one["round"]: one for one in read_samples(run.path, other).get("rounds", ())}
    pairs = [(time(one), time(theirs[one["round"]])) for one in samples.get("rounds", ()) if one["round"] in theirs]
    mine, base = [[pair[i] for pair in pairs if min(pair) > 0] for i in (0, 1)]
    if not mine:
        return {}
    return {"to_streaming": Value(*paired_ratio(mine, base, seed=f"{cell.id}:to_streaming"), n=len(mine))}


def _is_partner(one: CellRecord, cell: CellRecord) -> bool:
    a, b = one.axes, cell.axes
    same = ("task", "model", "dtype", "device", "budget", "shape", "batch", "seed")
    return a.policy == STREAMING != b.policy and all(getattr(a, key) == getattr(b, key) for key in same)
