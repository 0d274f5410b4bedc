"""Records on the disk: torn, doubled, hostile and unwritable."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2obench.errors import RecordError
from d2obench.record import (
    MAX_LINE,
    Axes,
    CellRecord,
    RunInfo,
    Value,
    append_cell,
    dump,
    read_run,
    read_samples,
    write_atomic,
)

INFO = RunInfo("t", {}, "0", ("a", "b"), {}, "0", (), "0", "2026-01-01T00:00:00+00:00")


def cell(name: str = "a", status: str = "ok", **fields: Any) -> CellRecord:
    axes = Axes("speed", "m", "float32", "cpu", "full", None, "8+8", 1, 0)
    return CellRecord(name, "0" * 16, axes, status, **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_atomic(tmp_path / "run.json", dump(INFO))
    return tmp_path


def test_a_record_comes_back_as_it_was(folder: Path) -> None:
    one = cell(
        values={"tpot_s": Value(0.5, 0.4, 0.6, 7, "why")}, flags=("sampled decode",), details={"x": [1, {"y": None}]}
    )
    append_cell(folder, one)
    run = read_run(folder)
    assert run.cells == (one,)
    assert run.info == INFO
    assert run.missing == ("b",)


def test_cells_stand_in_the_order_planned_and_the_last_record_of_one_counts(folder: Path) -> None:
    for one in (cell("b"), cell("a", "failed"), cell("a")):
        append_cell(folder, one)
    assert [(one.id, one.status) for one in read_run(folder).cells] == [("a", "ok"), ("b", "ok")]


@given(cut=st.integers(1, 200))
def test_a_torn_last_line_is_left_out_and_the_next_append_repairs_it(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    write_atomic(folder / "run.json", dump(INFO))
    append_cell(folder, cell("a"))
    whole = (folder / "cells.jsonl").read_bytes()
    with open(folder / "cells.jsonl", "ab") as file:
        file.write(whole[: min(cut, len(whole) - 2)])
    torn = read_run(folder)
    assert [one.id for one in torn.cells] == ["a"]
    assert "cells.jsonl line 2 was left out" in torn.warnings[0]
    append_cell(folder, cell("b"))
    assert [one.id for one in read_run(folder).cells] == ["a", "b"]


HOSTILE = {
    "not JSON": b"\x00\xff\xfe",
    "no object": b"[1,2,3]",
    "another object": b'{"id":"a"}',
    "wrong types": b'{"id":7,"hash":[],"axes":{},"status":"ok"}',
    "unknown status": dump(cell("x")).replace(b'"ok"', b'"great"'),
    "NaN": dump(cell("x", seconds=1.5)).replace(b"1.5", b"NaN"),
    "deep": b'{"details":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number too large": dump(cell("x", seconds=1.5)).replace(b"1.5", b"1e999"),
    "a name that is no text": dump(cell("x")).replace(b'"x"', b'"\\ud800"'),
    "huge": b'{"id":"' + b"x" * (MAX_LINE + 10) + b'"}',
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_line_is_left_out_with_a_short_warning(folder: Path, line: bytes) -> None:
    append_cell(folder, cell("a"))
    with open(folder / "cells.jsonl", "ab") as file:
        file.write(line + b"\n")
    append_cell(folder, cell("b"))
    run = read_run(folder)
    assert [one.id for one in run.cells] == ["a", "b"]
    assert len(run.warnings) == 1
    assert len(run.warnings[0]) < 300


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_in_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "run.json").write_bytes(data)
    with pytest.raises(RecordError):
        read_run(folder)
    write_atomic(folder / "run.json", dump(INFO))
    (folder / "cells.jsonl").write_bytes(data)
    assert read_run(folder).cells == ()


def test_html_and_control_characters_are_kept_as_they_are(folder: Path) -> None:
    name = "<script>alert(1)</script>|\x1b[31m\u202e\n"
    append_cell(folder, cell(name))
    assert len((folder / "cells.jsonl").read_bytes().splitlines()) == 1
    assert read_run(folder).cells[0].id == name


def test_nan_and_infinity_become_null(folder: Path) -> None:
    append_cell(folder, cell(values={"kl": Value(float("nan"), float("-inf"), float("inf"))}))
    line = json.loads((folder / "cells.jsonl").read_text())
    assert line["values"]["kl"] == {"value": None, "lo": None, "hi": None}
    assert read_run(folder).cells[0].values["kl"].value is None


def test_a_newer_schema_asks_for_a_newer_version(folder: Path) -> None:
    newer = json.loads((folder / "run.json").read_text()) | {"schema": 99}
    (folder / "run.json").write_text(json.dumps(newer))
    with pytest.raises(RecordError, match=r"schema 99.*update d2obench"):
        read_run(folder)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is not a run folder"):
        read_run(tmp_path)
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RecordError, match="can't read"):
        read_run(tmp_path)


def test_samples_outside_the_folder_are_never_read(folder: Path) -> None:
    for path in ("../secret.json", "/etc/passwd", "samples/../../secret.json"):
        with pytest.raises(RecordError, match="outside the run folder"):
            read_samples(folder, cell(samples=path))


@pytest.mark.parametrize("data", [b"", b"[1]", b"\xff", b'{"rounds":', b"[" * 100_000])
def test_damaged_samples_count_as_none(folder: Path, data: bytes) -> None:
    (folder / "s.json").write_bytes(data)
    assert read_samples(folder, cell(samples="s.json")) == {}
    assert read_samples(folder, cell(samples="gone.json")) == {}
    assert read_samples(folder, cell()) == {}


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "x.json"
    write_atomic(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match="No space left on device; free some space"):
        write_atomic(path, b"new")
    with pytest.raises(RecordError, match="No space left on device"):
        append_cell(folder, cell())
    assert path.read_bytes() == b"old"
    assert sorted(one.name for one in folder.iterdir()) == ["cells.jsonl", "run.json", "x.json"]  # nothing half done
