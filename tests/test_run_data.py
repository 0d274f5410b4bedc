"""A file given in place of a hub data set is part of what a cell's figures depend on: its content, not its place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from runs import client, run

from d2obench import tasks
from d2obench.errors import DataError
from d2obench.record import Axes, read_run
from d2obench.run.check import check
from d2obench.run.plan import Plan
from d2obench.run.run_folder import suite_of
from d2obench.suite.definition import load_suite

ROW = '{"question": "%s", "answer": "#### 4"}\n'


def written(path: Path, text: str = "two and two?") -> Path:
    path.write_text(ROW % text)
    return path


def checked(**data: Path) -> Plan:
    """gsm8k and recall under full, as they come out of the checks."""
    given = {"axes.policy": "full", "axes.task": "gsm8k,recall", "axes.model": "fake", "axes.shape": "64+8"}
    suite = load_suite("quick", given | {f"quality.data.{task}": str(path) for task, path in data.items()})
    with client() as worker:
        return check(suite, worker)


def hashes(work: Plan) -> dict[str, str]:
    return {cell.axes.task: cell.hash for cell in work.cells}


def test_the_hash_of_a_cell_follows_the_content_of_its_own_file(tmp_path: Path) -> None:
    first = hashes(checked(gsm8k=written(tmp_path / "a.jsonl")))
    assert first == hashes(checked(gsm8k=written(tmp_path / "b.jsonl")))  # the same words in another place
    changed = hashes(checked(gsm8k=written(tmp_path / "a.jsonl", "three and one?")))
    assert first["gsm8k"] != changed["gsm8k"]
    assert first["recall"] == changed["recall"] == hashes(checked())["recall"]
    assert hashes(checked())["gsm8k"] not in (first["gsm8k"], changed["gsm8k"])


def test_a_run_does_not_go_on_with_another_file(tmp_path: Path) -> None:
    data = written(tmp_path / "a.jsonl")
    run(tmp_path / "run", checked(gsm8k=data))
    _, suite = suite_of(tmp_path / "run")
    with client() as worker:
        again = check(suite, worker)  # the same file: the same cells
        assert {cell.hash for cell in again.cells} == {cell.hash for cell in read_run(tmp_path / "run").cells}
        written(data, "three and one?")
        with pytest.raises(DataError, match=r"data for 'gsm8k' is not what the run began with: .*a.jsonl has changed"):
            check(suite, worker)
        data.unlink()
        with pytest.raises(DataError, match="is not there"):
            check(suite, worker)


def test_a_file_that_is_edited_in_the_middle_of_a_run_ends_its_cells(tmp_path: Path) -> None:
    data = written(tmp_path / "a.jsonl")
    quality = checked(gsm8k=data).suite.quality
    written(data, "three and one?")
    cell = tasks.read_cell({"axes": Axes("gsm8k", "fake", "float32", "cpu", "full", None, None, None, 0)})
    loaded: Any = SimpleNamespace(has_sense=True, tokenizer=object(), name="fake")
    with pytest.raises(DataError, match=r"'gsm8k' changed during the run: .*a.jsonl; start a new run"):
        tasks.evaluate(loaded, cell, quality, lambda done, total: None)


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can.t read .*Is a directory"):
        checked(gsm8k=tmp_path)


def test_the_digest_stands_in_the_record(tmp_path: Path) -> None:
    work = checked(gsm8k=written(tmp_path / "a.jsonl"))
    run(tmp_path / "run", work)
    kept = read_run(tmp_path / "run").info.suite["quality"]["digests"]
    assert kept == msgspec.to_builtins(work.suite.quality.digests)
    assert len(kept["gsm8k"]) == 64
