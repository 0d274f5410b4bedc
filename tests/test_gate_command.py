"""``d2obench gate --command``: a program in each checkout, whose figures are read from a file and so are exact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT_S, wait_for

from d2obench.errors import SuiteError, UsageError, WorkerError
from d2obench.gate.command import gate_command
from d2obench.gate.gate import Side
from d2obench.gate.verdict import KINDS, Row, Verdict, Verdicts

BENCH = """
import json, os, sys, time
from pathlib import Path

here = json.loads(Path("figures.json").read_text())
log = Path(os.environ["SCRATCH"], "log")
with open(log, "a") as file:
    print(here["side"], file=file)
if here.get("hang"):
    Path(os.environ["SCRATCH"], "pid").write_text(str(os.getpid()))
    time.sleep(900)
if here.get("fail"):
    sys.exit("it fell over")
number = log.read_text().split().count(here["side"])
every = {key: value if isinstance(value, list) else [value] for key, value in here["values"].items()}
values = {key: value[number % len(value)] for key, value in every.items()}
out = Path(sys.argv[1])
assert str(out) == os.environ["D2OBENCH_RECORD"]
line = {"id": "serve", "values": values, "items": here.get("items", [])}
(out / "cells.jsonl").write_text(here.get("text") or json.dumps(line) + "\\n")
"""
TABLE = {"gate.looks": "[4, 8]"}
BASE = {"side": "base", "values": {"tpot_s": [0.010, 0.0101], "kv_bytes": 4096, "own_word": 3}}
COMMAND = f"{sys.executable} -IS bench.py {{record}}"


class Repo:
    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch
        root.mkdir()
        (root / "bench.py").write_text(BENCH)
        self.write(BASE)
        self.git("init", "-q", "-b", "main")
        self.git("add", "-A")
        self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "x")

    def git(self, *words: str) -> str:
        done = subprocess.run(["git", "-C", str(self.root), *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def write(self, figures: dict[str, Any]) -> None:
        (self.root / "figures.json").write_text(json.dumps(figures))

    def head(self, **figures: Any) -> Verdicts:
        self.write({**BASE, "side": "head", **figures})
        return run(self)

    @property
    def log(self) -> list[str]:
        return (self.scratch / "log").read_text().split()


def run(repo: Repo, overrides: dict[str, str] = TABLE, command: str = COMMAND) -> Verdicts:
    return gate_command(command, overrides, Side("HEAD"), Side(None), folder=repo.root, watch=str, kinds=KINDS)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("SCRATCH", str(scratch))
    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    made = Repo(tmp_path / "repo", scratch)
    yield made
    assert len(made.git("worktree", "list").splitlines()) == 1
    assert not list(scratch.glob("d2obench-*"))


def rows(found: Verdicts) -> dict[str, Row]:
    return {row.metric if row.kind != "budget" else f"{row.metric} budget": row for row in found.rows}


def test_equal_figures_are_ok_and_the_sides_take_turns(repo):
    found = repo.head()
    assert {name: row.verdict for name, row in rows(found).items()} == {"tpot_s": Verdict.OK, "kv_bytes": Verdict.OK}
    assert repo.log == ["base", "head", "head", "base"] * 2
    assert "own_word" in found.notes[0]
    assert found.about["suite"] == COMMAND
    assert found.about["machine"].startswith(("cpu-", "nvidia"))


def test_a_slower_head_is_regressed_after_a_second_sitting(repo):
    row = rows(repo.head(values={"tpot_s": [0.012, 0.0121], "kv_bytes": 4096}))["tpot_s"]
    assert row.verdict is Verdict.REGRESSED
    assert row.effect == pytest.approx(0.2, abs=0.02)
    assert len(repo.log) == 2 * 2 * 4


def test_an_undecided_time_is_measured_on_to_the_last_look(repo):
    row = rows(repo.head(values={"tpot_s": [0.009, 0.013], "kv_bytes": 4096}))["tpot_s"]
    assert (row.verdict, row.n) == (Verdict.INCONCLUSIVE, 8)


def test_a_larger_count_is_regressed_and_one_that_varies_is_not_exact(repo):
    assert rows(repo.head(values={"tpot_s": 0.01, "kv_bytes": 4160}))["kv_bytes"].verdict is Verdict.REGRESSED
    row = rows(repo.head(values={"kv_bytes": [4096, 4160]}))["kv_bytes"]
    assert row.verdict is Verdict.INCOMPARABLE
    assert "not exact" in row.reason


def test_without_times_two_rounds_are_enough(repo):
    repo.write({**BASE, "values": {"kv_bytes": 4096}})
    repo.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-am", "x")
    assert set(repo.head(values={"kv_bytes": 4096}).counts) == {Verdict.OK}
    assert len(repo.log) == 2 * 2


def test_a_figure_that_only_one_side_has_is_incomparable(repo):
    row = rows(repo.head(values={"kv_bytes": 4096}))["tpot_s"]
    assert (row.verdict, row.base, row.head) == (Verdict.INCOMPARABLE, 0.0101, None)


def test_items_are_compared_one_by_one(repo):
    def items(shift: float) -> list[dict[str, Any]]:
        return [{"id": str(i), "kl": 0.1 + i / 100 + shift} for i in range(10)]

    repo.write({**BASE, "values": {}, "items": items(0.0)})
    repo.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-am", "x")
    assert rows(repo.head(values={}, items=items(0.0)))["kl"].verdict is Verdict.OK
    assert rows(repo.head(values={}, items=items(0.1)))["kl"].verdict is Verdict.REGRESSED


@pytest.mark.parametrize(
    ("bound", "verdict"), [("≤ 5 KiB", Verdict.OK), ("<= 4095 B", Verdict.REGRESSED), ("≥ 1 MiB", Verdict.REGRESSED)]
)
def test_a_budget_is_kept_or_fails_whatever_the_base_has(repo, bound, verdict):
    repo.write({**BASE, "side": "head"})
    found = run(repo, {**TABLE, "gate.budget.kv_bytes": bound})
    row = rows(found)["kv_bytes budget"]
    assert row.verdict is verdict
    assert found.exit_code() == (verdict is Verdict.REGRESSED)
    assert (row.reason == "") == (verdict is Verdict.OK)


def test_a_time_over_its_budget_fails_with_what_to_do(repo):
    repo.write({**BASE, "side": "head"})
    row = rows(run(repo, {**TABLE, "gate.looks": "[8]", "gate.budget.tpot_s": "≤ 9 ms"}))["tpot_s budget"]
    assert row.verdict is Verdict.REGRESSED
    assert "change gate.budget.tpot_s in the suite on purpose" in row.reason
    row = rows(run(repo, {**TABLE, "gate.looks": "[8]", "gate.budget.tpot_s": "≤ 11 ms"}))["tpot_s budget"]
    assert row.verdict is Verdict.OK


def test_a_head_whose_command_fails_is_regressed_with_its_words(repo):
    row = rows(repo.head(fail=True))["status"]
    assert row.verdict is Verdict.REGRESSED
    assert "it fell over" in row.reason


def test_a_base_whose_command_fails_can_not_be_compared(repo):
    repo.write({**BASE, "fail": True})
    repo.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-am", "x")
    with pytest.raises(WorkerError, match="the base's command ended with code 1: it fell over"):
        repo.head()


@pytest.mark.parametrize("text", ["{", '{"values": {}}', "[1]", "  \n"])
def test_a_record_that_can_not_be_read_is_named(repo, text):
    assert "head's cells.jsonl" in rows(repo.head(text=text))["status"].reason


def test_wrong_words_are_one_clear_line(repo):
    with pytest.raises(UsageError, match="is empty"):
        run(repo, command="  ")
    with pytest.raises(UsageError, match="can't read --command"):
        run(repo, command="'open")
    with pytest.raises(WorkerError, match="can't be started"):
        run(repo, command="./no-such-program")
    with pytest.raises(SuiteError, match=r"no key 'axes\.model'"):
        run(repo, {"axes.model": "embedded"})
    with pytest.raises(UsageError, match="no metric is called 'speed'"):
        run(repo, {"gate.budget.speed": "≤ 1"})


def test_a_cancelled_job_leaves_no_process_and_no_worktree(repo):
    repo.write({**BASE, "side": "head", "hang": True})
    code = f"from d2obench.cli import main; main(['gate', '--command', {COMMAND!r}, '--base', 'HEAD'])"
    env = {**os.environ, "TMPDIR": str(repo.scratch), "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-P", "-c", code], cwd=repo.root, env=env, stderr=subprocess.PIPE)
    pid = int(wait_for((repo.scratch / "pid").exists, alive=lambda: process.poll() is None) and _read(repo))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert b"Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _read(repo: Repo) -> str:
    return wait_for((repo.scratch / "pid").read_text)


def test_a_second_gate_on_the_machine_waits_for_the_first_and_says_so(tmp_path):
    from d2obench.gate.exclusive import exclusive

    code = (
        "import sys; from pathlib import Path; from d2obench.gate.exclusive import exclusive\n"
        f"with exclusive(Path({str(tmp_path / 'lock')!r}), 'another gate measures', lambda s: print(s, flush=True)):\n"
        "    print('mine', flush=True)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with exclusive(tmp_path / "lock", "", str):
        other = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == f"another gate measures (pid {os.getpid()}): waiting for it\n"
    assert other.communicate(timeout=LIMIT_S)[0] == "mine\n"
