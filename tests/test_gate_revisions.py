"""``d2obench gate --suite``: two revisions of a throw-away repository, with real worktrees, workers and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_checkout import SUITE, Checkout
from typer.testing import CliRunner
from waiting import LIMIT_S, wait_for

from d2obench.cli import app
from d2obench.errors import SuiteError, UsageError, WorkerError
from d2obench.gate.gate import Side, gate
from d2obench.gate.verdict import KINDS, Row, Verdict, Verdicts
from d2obench.gate.worktree import Repository


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("FAKE_SCRATCH", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    made = Checkout(tmp_path / "repo", scratch)
    made.commit()
    yield made
    assert made.worktrees == 1
    assert made.workers_alive() == []
    assert not list(scratch.glob("d2obench-*"))


def run(
    repo: Checkout, base: str | None = None, head: str | None = None, suite: str = "fake", kinds: Sequence[str] = KINDS
) -> Verdicts:
    return gate(suite, {}, Side(base), Side(head), folder=repo.root, watch=lambda words: None, kinds=kinds)


def find(verdicts: Verdicts, metric: str, policy: str = "h2o") -> Row:
    return next(row for row in verdicts.rows if row.metric == metric and (policy in row.cell or row.cell == "*"))


def test_the_same_code_is_ok(repo):
    found = run(repo)
    assert set(found.counts) == {Verdict.OK}
    assert {row.kind for row in found.rows} == {"exact", "bounded", "timed", "ratio"}
    assert "same code" in found.notes[0]


def test_a_slower_head_is_regressed_and_confirmed_by_fresh_processes(repo):
    repo.work(tpot=0.012)
    found = run(repo)
    row = find(found, "tpot_s")
    assert row.verdict is Verdict.REGRESSED
    assert row.effect == pytest.approx(0.2, abs=0.02)
    assert "confirmed by fresh processes" in row.reason
    assert len((repo.scratch / "pids").read_text().split()) == 4
    assert find(found, "speedup").verdict is Verdict.OK  # full became slower as well


def test_a_regression_that_fresh_processes_do_not_see_is_inconclusive(repo):
    repo.work(slow_once=1.3)
    row = find(run(repo), "tpot_s")
    assert row.verdict is Verdict.INCONCLUSIVE
    assert "not confirmed" in row.reason


def test_a_faster_head_is_improved(repo):
    repo.work(tpot=0.008)
    assert find(run(repo), "tpot_s").verdict is Verdict.IMPROVED


@pytest.mark.parametrize(
    ("fault", "metric"),
    [
        ({"kept": [[21.0, 21.0], [23.0, 23.0]]}, "kept_layers"),
        ({"kv_bytes": 4160}, "kv_bytes"),
        ({"counts": {"ops_step": 101, "live_bytes": 5000}}, "ops_step"),
        ({"counts": {"ops_step": 100, "live_bytes": 9000}}, "live_bytes"),
        ({"digest": "cd"}, "tokens_digest"),
        ({"rss": 600_000_000}, "rss_decode_bytes"),
    ],
)
def test_each_fault_is_caught_by_the_figure_meant_for_it(repo, fault, metric):
    repo.work(**fault)
    found = run(repo)
    assert find(found, metric).verdict is Verdict.REGRESSED
    assert found.exit_code() == 1


def test_kinds_that_are_not_asked_for_are_neither_measured_nor_shown(repo):
    repo.work(tpot=0.02, kv_bytes=5000)
    found = run(repo, kinds=("exact",))
    assert {row.kind for row in found.rows} == {"exact"}
    assert {row.metric for row in found.of(Verdict.REGRESSED)} == {"kv_bytes", "kv_prompt_bytes"}
    assert len((repo.scratch / "pids").read_text().split()) == 2  # no second sitting, no further look
    repo.work(tpot=0.02, kv_bytes=5000)
    assert {row.metric for row in run(repo, kinds=("timed",)).of(Verdict.REGRESSED)} == {"tpot_s"}


@pytest.mark.parametrize(("kinds", "task"), [(("timed", "ratio"), "speed"), (("sampled",), "fidelity")])
def test_cells_that_have_no_such_figure_are_not_run(repo, kinds, task):
    repo.suite(SUITE.replace('"speed"', '"speed", "fidelity"').replace("shape:tiny", "embedded"))
    found = run(repo, repo.commit(), kinds=kinds)
    assert {row.cell.split("/")[0] for row in found.rows} == {task}


def test_a_cell_that_fails_is_shown_whatever_kinds_are_asked_for(repo):
    repo.work(fail="OutOfMemory")
    assert find(run(repo, kinds=("sampled", "bounded")), "status").verdict is Verdict.REGRESSED


def test_a_fact_that_only_one_side_can_tell_does_not_part_them(repo):
    """A commit may teach the fingerprint something new."""
    worker = repo.root / "d2obench/run/worker.py"
    worker.write_text(worker.read_text().replace('"environment": lambda args: {}', '"environment": lambda args: NEW'))
    worker.write_text('NEW = {"triton": "3"}\n' + worker.read_text())
    assert run(repo).worst is Verdict.OK


def test_a_worse_kl_is_caught_item_by_item(repo):
    repo.suite(SUITE.replace('"speed"', '"fidelity"').replace("shape:tiny", "embedded"))
    base = repo.commit()
    repo.work(kl=[0.2, 0.23, 0.19, 0.2, 0.18, 0.23, 0.21, 0.16])
    row = find(run(repo, base), "kl")
    assert row.verdict is Verdict.REGRESSED
    assert row.effect == pytest.approx(0.1)


def test_a_head_that_runs_out_of_memory_is_regressed_with_its_words(repo):
    repo.work(fail="OutOfMemory")
    row = find(run(repo), "status")
    assert (row.verdict, row.base, row.head) == (Verdict.REGRESSED, "ok", "oom")
    assert "it fell over" in row.reason


def test_two_named_revisions_leave_the_work_tree_out(repo):
    base = repo.git("rev-parse", "HEAD")
    head = repo.commit(kv_bytes=8192)
    repo.work(kv_bytes=1)
    row = find(run(repo, base, head), "kv_bytes")
    assert (row.base, row.head) == (4096, 8192)


def test_the_default_base_is_where_the_branch_left_the_trunk(repo):
    left = repo.git("rev-parse", "HEAD")
    repo.git("checkout", "-q", "-b", "topic")
    repo.commit(kv_bytes=5000)
    repo.git("checkout", "-q", "main")
    repo.commit(kv_bytes=6000)
    repo.git("checkout", "-q", "topic")
    assert Repository(repo.root).merge_base() == left
    assert find(run(repo), "kv_bytes").effect == pytest.approx(5000 / 4096 - 1)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("128+8", "128+16", "axes.shape"),
        ("shape:tiny", "shape:llama-3-8b", "axes.model"),
        ("[axes]", '[axes]\ndtype = ["bfloat16"]', "axes.dtype"),
        ("[axes]", '[axes]\ndevice = ["cpu"]', "axes.device"),
    ],
)
def test_unlike_suites_are_incomparable_and_name_the_keys(repo, old, new, key):
    repo.suite(SUITE.replace(old, new))
    found = run(repo)
    assert found.worst is Verdict.INCOMPARABLE
    assert key in found.rows[0].reason
    assert found.exit_code() == 2


def test_other_libraries_are_incomparable(repo):
    repo.work(torch="2.1")
    found = run(repo)
    assert [row.verdict for row in found.rows] == [Verdict.INCOMPARABLE]
    assert "torch" in found.rows[0].reason


def test_a_base_that_does_not_build_is_said_with_its_log(repo, capsys):
    worker = repo.root / "d2obench/run/worker.py"
    good = worker.read_text()
    worker.write_text("def broken(:\n")
    bad = repo.commit()
    worker.write_text(good)
    with pytest.raises(WorkerError, match="the base does not build: SyntaxError") as problem:
        run(repo, bad)
    assert problem.value.exit_code == 2
    assert "def broken(:" in capsys.readouterr().err


def test_a_checkout_without_the_package_is_never_compared_with_another_copy(repo):
    repo.git("rm", "-rqf", "d2obench")
    bare = repo.commit()
    repo.git("checkout", "-q", "HEAD~1", "--", "d2obench")
    with pytest.raises(WorkerError):
        run(repo, bare)


def test_wrong_words_are_one_clear_line(repo, tmp_path):
    with pytest.raises(UsageError, match="no revision 'nowhere'"):
        run(repo, "nowhere")
    with pytest.raises(UsageError, match="no revision '--exec=x'"):
        run(repo, "--exec=x")
    with pytest.raises(SuiteError, match="no suite 'other'"):
        run(repo, suite="other")
    with pytest.raises(UsageError):
        Repository(tmp_path)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_no_worker_and_no_worktree(repo, sign):
    repo.work(hang=True)
    code = "from d2obench.cli import main; main(['gate', '--suite', 'fake'])"
    env = {**os.environ, "TMPDIR": str(repo.scratch), "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-P", "-c", code], cwd=repo.root, env=env, stderr=subprocess.PIPE)
    wait_for((repo.scratch / "hanging").exists, alive=lambda: process.poll() is None)
    assert repo.worktrees == 2
    process.send_signal(sign)
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert b"Traceback" not in said


def test_exit_codes_of_the_command(repo, monkeypatch):
    monkeypatch.chdir(repo.root)

    def code(*words: str) -> int:
        return CliRunner().invoke(app, ["gate", "--suite", "fake", *words]).exit_code

    assert code() == 0
    wrong = CliRunner().invoke(app, ["gate", "--suite", "fake", "--kind", "speed"])
    assert isinstance(wrong.exception, UsageError)
    assert "exact, bounded" in str(wrong.exception)
    repo.work(kv_bytes=5000)
    assert code() == 1
    assert code("--exit-zero") == 0
    repo.work(slow_once=1.3)
    (repo.scratch / "second").unlink()
    assert code("--strict") == 3
    repo.work(torch="2.1")
    assert code() == 2


def test_budgets_bound_the_heads_own_figures(repo):
    budget = '[gate.budget]\ntpot_s = "≤ 9 ms"\nkv_bytes = "≤ 4 KiB"\nttft_s = "≤ 0.2 s"\nkl = "≤ 0.3"\n'
    repo.suite(SUITE + budget)
    found = run(repo, repo.commit())
    rows = {row.metric: row for row in found.rows if row.kind == "budget" and ("h2o" in row.cell or row.cell == "*")}
    assert rows["tpot_s"].verdict is Verdict.REGRESSED
    assert rows["kv_bytes"].verdict is Verdict.OK
    assert rows["ttft_s"].verdict is Verdict.OK
    assert rows["kl"].verdict is Verdict.INCOMPARABLE and "no cell" in rows["kl"].reason
    assert rows["tpot_s"].base == "≤ 9 ms" and rows["tpot_s"].head == pytest.approx(0.01, abs=0.001)
    assert {row.verdict for row in found.rows if row.kind != "budget"} == {Verdict.OK}
    found = run(repo, kinds=("exact",))
    assert {row.metric for row in found.rows if row.kind == "budget"} == {"kv_bytes"}


def test_a_noisy_machine_is_said_before_anything_is_timed(repo):
    repo.work(noise={"8": 0.4})
    said: list[str] = []
    found = gate("fake", {}, Side(None), Side(None), folder=repo.root, watch=said.append)
    assert any(note.startswith("a noisy machine: a slowdown of 47%") for note in found.notes)
    first = next(i for i, words in enumerate(said) if "told from noise" in words)
    assert first < next(i for i, words in enumerate(said) if words.startswith("rounds"))
    assert "noisy" in said[first + 1]


def test_a_gate_that_can_not_compare_leaves_its_reason_where_people_read(repo, monkeypatch, tmp_path):
    monkeypatch.chdir(repo.root)
    words = ["gate", "--suite", "fake", "--base", "nowhere", "--output", str(tmp_path / "out"), "--format", "junit"]
    assert isinstance(CliRunner().invoke(app, words).exception, UsageError)
    comment = (tmp_path / "out/comment.md").read_text()
    assert comment.startswith("<!-- d2obench out -->\n# gate: INCOMPARABLE")
    assert "there is no revision 'nowhere'" in comment
    assert 'errors="1"' in (tmp_path / "out/junit.xml").read_text()
