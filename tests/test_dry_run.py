"""The total of a dry run: what is cut by ``timing.max_seconds``, and that one round is always measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from runs import cell, checked

from d2obench.cli.dry_run import show_plan
from d2obench.report.display import spell
from d2obench.run.plan import Device, predict
from d2obench.suite.definition import Timing

DIMENSIONS = {
    "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 16, "parameters": 10**6, "context": 4096,
}  # fmt: skip
RATES = {"bandwidth": 1e6, "flops": 1e6}


class Client:
    """A worker that only knows how fast its device is."""

    def call(self, op: str, args: Any) -> Any:
        assert op == "rates"
        return RATES


@pytest.mark.parametrize(("seconds", "cut"), [(1e9, False), (1.0, True)])
def test_the_total_is_bounded_but_holds_a_round(capsys: Any, monkeypatch: Any, seconds: float, cut: bool) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    cells = [cell("full"), cell("h2o", "0.2")]
    work = checked(cells, Timing(rounds=4, max_rounds=4, max_seconds=seconds))
    work = dataclasses.replace(work, models={"fake": DIMENSIONS})
    show_plan(work, Client())  # type: ignore[arg-type]
    out = capsys.readouterr().out
    told = [predict(one, work.suite, DIMENSIONS, Device(**RATES)).seconds or 0.0 for one in cells]
    total = sum(told) / 4 if cut else sum(told)
    last = next(line for line in out.splitlines() if "2 cells" in line)
    assert last.rstrip().endswith(spell(total))
    assert ("timing.max_seconds" in out) == cut
