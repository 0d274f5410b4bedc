"""Quality cells that share their prefills: rows as if each cell had been alone, whatever was killed on the way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from runs import Silent, cell, checked, client, run
from test_tasks_loop import Bytes
from test_tasks_loop import cell as quality_cell

from d2obench import record, tasks
from d2obench.cache import Session
from d2obench.errors import OutOfMemory
from d2obench.models import LoadedModel
from d2obench.run.plan import group, shares
from d2obench.run.quality import QualityGroup
from d2obench.run.run_folder import RunLog
from d2obench.run.worker import Worker
from d2obench.run.worker_client import describe, revive
from d2obench.suite.definition import AxesTable, Placement, Quality, Suite, WorkerTable
from d2obench.tasks.base import Cell

ASKED = [
    ("full", None),
    ("streaming", "0.3"),
    ("h2o", "0.2"),
    ("h2o", "0.4"),
    ("d2o", "0.3"),
    ("snapkv(window=4)", "0.3"),
]
TASKS = [("fidelity(documents=5)", "96+6"), ("recall(items=3,query=unseen)", "400+8"),
         ("needle(contexts=[400],depths=[0,0.5,1],needles=2,kind=word,ask=each,query=unseen)", None)]  # fmt: skip


class Direct:
    """A client whose worker is in this process and has a tiny model; it dies at some call, if it is told to."""

    def __init__(self, model: LoadedModel, die_at: int = -1) -> None:
        self.worker, self.calls, self.die_at = Worker(), 0, die_at
        self.worker._loaded, self.worker._key = model, ("tiny", "float32", "cpu")

    def call(
        self, op: str, args: Any = None, *, progress: Any = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        if op == "evaluate_part":
            self.calls += 1
            if self.calls == self.die_at:
                raise KeyboardInterrupt
        request = msgspec.json.decode(msgspec.json.encode(args))
        try:
            answer = getattr(self.worker, op)(request, lambda *words: None)
        except Exception as problem:
            raise revive(describe(problem)) from None
        decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(answer))
        return decoded


@pytest.fixture
def model(tiny: LoadedModel) -> LoadedModel:
    return dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=4096)


def cells_of(task: str, shape: str | None) -> list[Cell]:
    found = [quality_cell(task, policy, budget, shape) for policy, budget in ASKED]
    return [
        dataclasses.replace(one, id=f"{one.axes.policy}@{one.axes.budget}", hash=f"hash{i}")
        for i, one in enumerate(found)
    ]


def suite_of(quality: Quality) -> Suite:
    return Suite(name="x", about="", axes=AxesTable(policy=("full",)), quality=quality)


def rows(folder: Path) -> dict[str, Any]:
    """Everything of a row but the times, and its items."""
    found = {}
    for line in (folder / "cells.jsonl").read_text().splitlines():
        row = msgspec.json.decode(line, type=record.CellRecord)
        samples = json.loads((folder / row.samples).read_text()) if row.samples else {}
        assert "partial" not in samples
        found[row.id] = (row.status, row.values, row.details, row.flags, samples.get("items"))
    return found


def evaluate(folder: Path, cells: list[Cell], worker: Direct, quality: Quality, save_s: float = 0.0) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    known: Mapping[str, Any] = {}
    log = RunLog(folder, Silent(), known, "", cells)  # type: ignore[arg-type]
    QualityGroup(suite_of(quality), cells, worker, log, save_s).run()  # type: ignore[arg-type]
    return rows(folder)


@pytest.mark.parametrize(("task", "shape"), TASKS)
def test_rows_are_those_of_each_cell_alone_killed_or_not(
    model: LoadedModel, tmp_path: Path, task: str, shape: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = Session.prefill

    def counted(self: Session, texts: Any) -> Any:
        read.append(len(texts))
        return plain(self, texts)

    monkeypatch.setattr(Session, "prefill", counted)
    cells, quality = cells_of(task, shape), Quality(batch=2)
    together = evaluate(tmp_path / "together", cells, Direct(model), quality)
    batches = 2 + task.startswith("fidelity")
    assert len(read) == 2 * batches, "with column sums and without"
    # 1. each cell by itself
    for one in cells:
        alone = tasks.evaluate(model, one, quality, lambda done, total: None)
        status, values, details, flags, items = together[one.id]
        assert (status, values, flags) == ("ok", alone.values, tuple(alone.details.get("flags", ())))
        assert items == json.loads(record.dump(alone.items))
        assert {**details, **json.loads(record.dump(alone.details))} == details
    # 2. killed in the second batch, and gone on with
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, cells, Direct(model, die_at=2), quality)
    going_on = Direct(model)
    assert evaluate(folder, cells, going_on, quality) == together
    assert going_on.calls == batches - 1, "the first batch was not run again"


def test_cells_that_stand_apart_go_on_apart(model: LoadedModel, tmp_path: Path) -> None:
    """A cell that was added, or that lost its samples, begins at the first batch."""
    cells, quality = cells_of(*TASKS[0])[:3], Quality(batch=2)
    whole = evaluate(tmp_path / "whole", cells, Direct(model), quality)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, cells, Direct(model, die_at=3), quality)
    (folder / "samples" / f"{cells[1].hash}.json").unlink()
    damaged = folder / "samples" / f"{cells[2].hash}.json"
    held = json.loads(damaged.read_text())
    held["partial"]["places"] = "all"
    damaged.write_text(json.dumps(held))
    assert evaluate(folder, cells, Direct(model), quality) == whole
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        evaluate(other, cells, Direct(model, die_at=3), quality)
    fewer = evaluate(other, cells, Direct(model), Quality(batch=2, limit=2))
    assert len(fewer[cells[0].id][4]) == 2, "items of another number are not gone on with"


def test_a_cell_that_fails_fails_alone(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, quality = cells_of(*TASKS[0]), Quality(batch=3)
    whole = evaluate(tmp_path / "whole", cells, Direct(model), quality)
    compress = Session.compress
    tried: list[str] = []

    def failing(self: Session) -> None:
        name = type(self.policy).__name__
        tried.append(name)
        if name == "D2O":
            raise OutOfMemory("out of memory in compress")
        if name == "SnapKV":
            raise ValueError("a fault of this policy")
        compress(self)

    monkeypatch.setattr(Session, "compress", failing)
    found = evaluate(tmp_path / "run", cells, Direct(model), quality)
    assert [found[one.id][0] for one in cells] == ["ok"] * 4 + ["oom", "failed"]
    assert all(found[one.id] == whole[one.id] for one in cells[:4])
    assert tried.count("D2O") == 2, "once more without the prompts of the others in memory"


def test_a_scripted_worker_may_crash(tmp_path: Path) -> None:
    work = checked([cell(policy, task="fidelity") for policy in ("full", "h2o", "roco")])
    found = run(tmp_path / "run", work, crash=["h2o"], parts=3)
    assert {one.axes.policy: one.status for one in found.cells} == {"full": "ok", "h2o": "failed", "roco": "ok"}
    items = {one.axes.policy: record.read_samples(tmp_path / "run", one).get("items") for one in found.cells}
    assert [item["id"] for item in items["full"]] == ["0", "1", "2"]
    assert items["full"] == items["roco"]


def test_groups_share_where_one_worker_runs_them() -> None:
    cells = [cell(policy, task=task) for task in ("fidelity", "recall") for policy in ("full", "h2o")]
    timed = [cell("full"), cell("h2o")]
    assert [len(one) for one in group([*cells, *timed])] == [1, 1, 1, 1, 2]
    assert [len(one) for one in group([*cells, *timed], shared=True)] == [2, 2, 2]
    suite = suite_of(Quality())
    assert shares(suite)
    assert not shares(msgspec.structs.replace(suite, worker=WorkerTable(mode="fresh")))
    assert not shares(msgspec.structs.replace(suite, models=Placement(tensor_parallel=2)))


def test_the_workers_operations_are_those_of_the_protocol(tmp_path: Path) -> None:
    with client(parts=2) as worker:
        sent = [cell("h2o", task="fidelity").sent()]
        answer = worker.call("evaluate_part", {"cells": sent, "quality": {}, "part": 1})
        assert (answer["parts"], answer["places"]) == (2, [1])


def test_a_gpu_that_breaks_costs_the_other_cells_nothing(tmp_path: Path) -> None:
    """The cells are run apart then, and the faulty one without what failed."""
    work = checked([cell(policy, task="fidelity") for policy in ("full", "d2o", "h2o")])
    found = run(tmp_path / "run", work, broken=["d2o"], broken_always=["h2o"], parts=2)
    assert {one.axes.policy: one.status for one in found.cells} == {"full": "ok", "d2o": "ok", "h2o": "failed"}
    items = {one.axes.policy: record.read_samples(tmp_path / "run", one).get("items") for one in found.cells}
    assert [item["id"] for item in items["d2o"]] == ["0", "1"] == [item["id"] for item in items["full"]]
