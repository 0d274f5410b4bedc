"""Planning into a time: what fits is measured whole, then rounds and items are cut, then units are dropped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_worker import DIMENSIONS
from hypothesis import given
from hypothesis import strategies as st
from runs import Silent, cell, checked, run

from d2obench.models import Dimensions
from d2obench.run.plan import Plan, group
from d2obench.run.predict import Device, predict
from d2obench.run.run_folder import RunLog
from d2obench.run.schedule import REPORT_S, Schedule, units_of
from d2obench.suite.definition import Quality, Timing
from d2obench.tasks import read_cell
from d2obench.tasks.base import Cell

MODEL = Dimensions("llama", 30, 9, 3, 64, 576, 49_152, 8192, 134_515_008)
DEVICE = Device(1e10, 1e11)


def scored(policy: str, budget: str | None = None) -> Cell:
    axes = msgspec.to_builtins(cell(policy, budget).axes)
    axes |= {"task": "fidelity(documents=8)", "shape": "256+32", "batch": None}
    return read_cell({"id": f"fidelity/{policy}", "hash": f"fidelity-{policy}", "axes": axes})


CELLS = [
    *(
        cell(policy, budget, shape)
        for shape in ("64+8", "512+8")
        for policy, budget in (("full", None), ("d2o", "0.2"))
    ),
    scored("full"),
    scored("d2o", "0.2"),
]


def plan(within: str, rounds: int = 8) -> Plan:
    found = checked(CELLS, Timing(rounds=rounds, max_rounds=rounds, windows=0))
    suite = msgspec.structs.replace(found.suite, within=within, quality=Quality(batch=4))
    return dataclasses.replace(found, suite=suite, models={"fake": MODEL}, began=0.0)


class Machine:
    """A clock and a worker whose requests take ``slow`` times what is predicted."""

    def __init__(self, found: Plan, slow: float) -> None:
        self.now, self._plan, self.slow = 0.0, found, slow

    def call(self, op: str, args: Any, **_: Any) -> Any:
        return {}

    def work(self, cells: list[Cell], suite: Any) -> None:
        self.now += sum(self.slow * (predict(one, suite, MODEL, DEVICE).seconds or 0.0) for one in cells)


def measured(folder: Path, within: str, slow: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Machine, RunLog]:
    """What each group was given, on a machine that is ``slow`` times slower than its rates say."""
    found = plan(within)
    machine, log = Machine(found, slow), RunLog(folder, Silent())
    slower = Device(DEVICE.bandwidth / slow, DEVICE.flops / slow)
    monkeypatch.setattr("d2obench.run.schedule._probe", lambda client, one, model: (0.0, slower))
    schedule = Schedule(found, log, clock=lambda: machine.now)
    schedule.probe(machine)  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for together in group(found.cells):
        suite = schedule.begin(together)
        for one in together:
            given[one.id] = suite
        if suite is not None:
            machine.work(together, suite)
            for one in together:
                log.end(one, "ok")
            schedule.end(together)
    return given, machine, log


def whole() -> float:
    """Seconds of everything in full, on a machine as fast as its rates."""
    suite = plan("").suite
    return sum(predict(one, suite, MODEL, DEVICE).seconds or 0.0 for one in CELLS)


def test_without_a_limit_everything_is_measured_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _, _ = measured(tmp_path, "", 1.0, monkeypatch)
    assert all(suite.timing.rounds == 8 and suite.quality.limit == 0 for suite in given.values())


def test_what_fits_is_measured_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _, log = measured(tmp_path, f"{2 * whole() + 60:.0f}s", 1.0, monkeypatch)
    assert all(suite.timing.rounds == 8 and suite.quality.limit == 0 for suite in given.values())
    assert all(record.flags == () for record in log.records.values())


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("slow", [1.0, 4.0])
def test_a_shorter_time_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, slow: float
) -> None:
    """Rounds and items are cut, the same for all cells that are compared, and every cut row says so."""
    seconds = share * slow * whole() + REPORT_S
    given, machine, log = measured(tmp_path, f"{max(30.0, seconds):.1f}s", slow, monkeypatch)
    assert machine.now <= max(30.0, seconds) - REPORT_S + 1e-6
    assert len({given[one.id].quality.limit for one in CELLS if one.task is not None}) == 1
    cut = [one for one in CELLS if given[one.id] is not None and any(log.records[one.id].flags)]
    assert cut
    for one in cut:
        (flag,) = log.records[one.id].flags
        count = given[one.id].timing.rounds if one.timed else given[one.id].quality.limit
        assert flag.startswith(f"{count} of 8 {'rounds' if one.timed else 'items'} within ")


def test_what_can_not_fit_is_dropped_and_its_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _, log = measured(tmp_path, "30s", 30.0 / whole() * 5, monkeypatch)
    dropped = [one for one in CELLS if given[one.id] is None]
    assert dropped
    assert len(dropped) < len(CELLS)
    assert any("dropped" in note for note in log.display.notes)  # type: ignore[attr-defined]
    for one in dropped:
        record = log.records[one.id]
        assert record.status == "skipped"
        assert "no time was left for it within 30s" in record.reason


def test_a_machine_that_slows_down_costs_cells_and_not_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times slower from the first quality cell on: it ends, and the other one of its task is dropped."""
    work = Machine.work

    def slower(self: Machine, cells: list[Cell], suite: Any) -> None:
        self.slow = 1.0 if cells[0].timed else 100.0
        work(self, cells, suite)

    monkeypatch.setattr(Machine, "work", slower)
    seconds = 1.2 * whole() + REPORT_S + 30
    given, _, log = measured(tmp_path, f"{seconds:.1f}s", 1.0, monkeypatch)
    assert [one.axes.policy for one in CELLS if given[one.id] is None] == ["d2o"]
    assert "no time was left" in log.records[CELLS[-1].id].reason


def test_something_is_measured_however_short_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _, _ = measured(tmp_path, "30s", 1e4, monkeypatch)
    assert {one.axes.task for one in CELLS if given[one.id] is not None}


def test_the_time_left_is_told_from_the_start_and_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured the display knows the whole time, within a tenth, on a machine as steady as this."""
    told: list[float] = []
    monkeypatch.setattr(Silent, "expect", lambda self, seconds: told.append(sum(seconds.values())))
    _, machine, _ = measured(tmp_path, "", 3.0, monkeypatch)
    assert told[0] == pytest.approx(machine.now, rel=0.1)
    assert told[-1] == 0.0


@given(st.floats(30, 5000), st.floats(0.1, 50))
def test_units_stay_whole_whatever_the_time(seconds: float, slow: float) -> None:
    found = plan(f"{seconds:.1f}s")
    units = units_of(found)
    assert [len(one.cells) for one in units] == [2, 2, 2]
    assert {one.most for one in units} == {8}


def test_a_run_says_in_its_rows_what_the_time_bought(tmp_path: Path) -> None:
    """Through the engine and a scripted worker: whole rows, and the suite of the record names the time."""
    work = checked(timing=Timing(rounds=3, max_rounds=3))
    suite = msgspec.structs.replace(work.suite, within="10m")
    work = dataclasses.replace(work, suite=suite, models={"fake": Dimensions(**DIMENSIONS)})
    found = run(tmp_path / "run", work)
    assert found.info.suite["within"] == "10m"
    assert {one.status for one in found.cells} == {"ok"}
    assert not any("within" in flag for one in found.cells for flag in one.flags)
    json.dumps(found.info.suite)
