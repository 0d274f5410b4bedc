"""A history: append-only, merged by git itself, repaired, shortened, and its change points."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
from test_gate_baseline import Story
from typer.testing import CliRunner

from d2obench.cli import app
from d2obench.errors import RecordError, UsageError
from d2obench.gate import history as module
from d2obench.gate.history import Entry, Point, add, change_points, prune, read, repair
from d2obench.gate.history import series as series_of
from d2obench.gate.history_entry import entry_of_run, entry_of_verdicts
from d2obench.gate.verdict import Row, Verdict, gather
from d2obench.record import Value, read_run
from d2obench.report.history import view
from d2obench.report.render import write_report
from d2obench.report.verdicts import as_json


def entry(number: int, machine: str = "cpu", **figures: float) -> Entry:
    made = Entry(
        when=f"2030-01-{number:02d}T00:00:00+00:00", commit=f"{number:040x}", suite="gate", settings="s",
        machine=machine, versions={"torch": "2.13"},
        figures={"speed/d2o": {key: Value(value) for key, value in (figures or {"kv_bytes": 4096}).items()}},
    )  # fmt: skip
    return msgspec.structs.replace(made, id=made.digest)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def test_entries_are_read_by_time_and_count_once(file):
    assert read(file).entries == []
    second, first = entry(2), entry(1)
    assert add(file, second) and add(file, first)
    assert not add(file, second)
    assert read(file).entries == [first, second]
    assert len(file.read_bytes().splitlines()) == 2


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(file):
    add(file, entry(1))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    add(file, entry(2))
    found = read(file)
    assert [one.when[8:10] for one in found.entries] == ["01", "02"]
    assert "line 2 was left out" in found.warnings[0]
    assert len(repair(file)) == 1
    assert read(file) == ([entry(1), entry(2)], [])


def test_a_line_that_was_changed_by_hand_does_not_count(file):
    add(file, entry(1, kv_bytes=4096))
    file.write_text(file.read_text().replace("4096", "4000"))
    assert read(file).entries == []
    assert "changed after" in read(file).warnings[0]


def test_lines_of_a_later_version_are_not_thrown_away(file):
    add(file, entry(1))
    later = msgspec.structs.replace(entry(2), schema=99)
    file.write_text(file.read_text() + json.dumps(msgspec.to_builtins(later)) + "\n")
    with pytest.raises(RecordError, match="later version"):
        repair(file)
    assert len(read(file).entries) == 1


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_two_branches_that_both_added_are_merged_without_a_conflict(file):
    folder = file.parent
    git(folder, "init", "-q", "-b", "main")
    add(file, entry(1))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "x")
    git(folder, "checkout", "-q", "-b", "other")
    for branch, number in (("other", 2), ("main", 3)):
        git(folder, "checkout", "-q", branch)
        add(file, entry(number))
        git(folder, "commit", "-q", "-am", "x")
    git(folder, "merge", "-q", "other")
    assert read(file) == ([entry(1), entry(2), entry(3)], [])
    assert (folder / ".gitattributes").read_text() == "history.jsonl merge=union\n"


def test_marks_of_an_unsolved_merge_are_left_out_and_repaired(file):
    lines = [json.dumps(msgspec.to_builtins(entry(n))) for n in (1, 2)]
    file.write_text(f"<<<<<<< HEAD\n{lines[0]}\n=======\n{lines[1]}\n>>>>>>> other\n")
    assert len(read(file).entries) == 2
    assert len(repair(file)) == 3
    assert len(file.read_text().splitlines()) == 2


def test_a_full_disk_keeps_what_was_there(file, monkeypatch):
    add(file, entry(1))
    before = file.read_bytes()
    real = module.os.write
    monkeypatch.setattr(module.os, "write", lambda handle, line: real(handle, line[: len(line) // 2]))
    with pytest.raises(RecordError, match="the disk is full"):
        add(file, entry(2))
    assert file.read_bytes() == before


def test_the_newest_of_each_machine_are_kept(file):
    for number in range(1, 6):
        add(file, entry(number, machine="a" if number < 5 else "b"))
    assert prune(file, 2) == 2
    assert [one.when[8:10] for one in read(file).entries] == ["03", "04", "05"]
    assert prune(file, 2) == 0


def test_a_run_and_a_gate_become_entries(tmp_path):
    run = entry_of_run(read_run(Story().write(tmp_path / "run")))
    assert run.figures["speed/d2o"]["tpot_s"] == Value(0.010, 0.0099, 0.0101, 5)
    assert run.machine == "cpu-x86_64, AMD EPYC, 2 threads"
    assert run.versions == {"d2obench": "0.1.0", "torch": "2.13", "transformers": "5.23"}
    rows = [
        Row("speed/d2o", "tpot_s", Verdict.REGRESSED, "timed", 0.01, 0.012, 0.2, 0.1, 0.3, 0.05, 8),
        Row("speed/d2o", "tokens_digest", Verdict.OK, "exact", "ab", "ab"),
        Row("speed/d2o", "kv_bytes", Verdict.OK, "budget", "≤ 1 MiB", 4096),
    ]
    about = {"when": "2030-01-01T00:00:00+00:00", "commit": "c", "suite": "gate", "machine": "cpu-x86_64",
             "cpu": "AMD", "torch": "2.13+cpu"}  # fmt: skip
    path = tmp_path / "verdicts.json"
    path.write_text(as_json(gather("gate", "a", "b", rows, about=about)))
    found = entry_of_verdicts(path)
    assert found.figures == {"speed/d2o": {"tpot_s": Value(0.012, n=8)}}
    assert (found.machine, found.versions, found.verdict) == ("cpu-x86_64, AMD", {"torch": "2.13"}, "REGRESSED")
    path.write_text(as_json(gather("gate", "a", "b", rows)))
    with pytest.raises(UsageError, match="when and where"):
        entry_of_verdicts(path)


def points(metric: str, values: list[float]) -> list[Point]:
    return [Point(entry(i % 28 + 1), Value(value)) for i, value in enumerate(values)]


def test_an_exact_figure_changes_whenever_it_differs():
    assert change_points("kv_bytes", points("kv_bytes", [4, 4, 5, 5, 4])) == [2, 4]


@pytest.mark.needs("ruptures")
def test_change_points_are_where_a_level_begins_and_noise_has_none():
    rng = np.random.default_rng(0)

    def noise(n: int) -> list[float]:
        return list(0.01 * np.exp(rng.normal(0, 0.02, n)))

    assert [
        change_points("tpot_s", points("tpot_s", noise(20) + [1.15 * v for v in noise(15)])) for _ in range(20)
    ] == [[20]] * 20
    false = sum(bool(change_points("tpot_s", points("tpot_s", noise(30)))) for _ in range(100))
    assert false <= 2
    assert change_points("tpot_s", points("tpot_s", [0.01] * 20)) == []
    assert change_points("tpot_s", points("tpot_s", noise(5))) == []


def test_machines_and_versions_have_lines_of_their_own(tmp_path):
    old = msgspec.structs.replace(entry(3), versions={"torch": "2.14"}, id="")
    entries = [entry(1), entry(2, machine="gpu"), msgspec.structs.replace(old, id=old.digest), entry(4)]
    assert [(one.machine, one.versions, len(one.points)) for one in series_of(entries)] == [
        ("cpu", "torch 2.13", 2), ("cpu", "torch 2.14", 1), ("gpu", "torch 2.13", 1),
    ]  # fmt: skip
    page = view(module.History(entries, []))
    (figure,) = page.figures
    assert {row[0] for row in figure.rows} == {"cpu; torch 2.13", "cpu; torch 2.14", "gpu; torch 2.13"}
    assert [row[1] for row in figure.rows] == [0, 3, 2, 1]


def test_the_page_has_a_figure_for_each_figure_of_each_cell_and_names_the_commit(tmp_path):
    entries = [entry(n, kv_bytes=4096 + 1024 * (n > 2), ops_step=100) for n in range(1, 5)]
    page = view(module.History(entries, ["a warning"]))
    assert [figure.title for figure in page.figures] == [
        "KV of speed/d2o (gate)", next(f.title for f in page.figures[1:]),
    ]  # fmt: skip
    assert page.warnings[0] == "a warning"
    change = page.headline[0].rows[0][-1]
    assert (change.text, change.mark) == (f"+25.0% at {entry(3).commit[:12]}, 2030-01-03", "bad")
    written = write_report(page, tmp_path, ["md"])
    assert {path.name for path in written} == {"history.md", "history-1.svg", "history-2.svg"}
    assert "http://www.w3.org/2000/svg" in (tmp_path / "figures/history-1.svg").read_text()


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Story().write(tmp_path / "run")

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["history", *words], standalone_mode=True)
        assert done.exit_code == 0, done.output
        return done.output

    assert "added" in run("add", "run")
    assert "there already" in run("add", "run")
    assert "KV" in run("show", "--cell", "speed/d2o")
    assert "0 lines removed" in run("repair")
    assert "0 entries removed" in run("prune", "--keep", "1")
    assert not (tmp_path / ".gitattributes").exists()  # this folder is in no repository
