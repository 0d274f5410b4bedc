"""Counted instructions: the system call by an event that every kernel counts, a fake counter, and whole gates."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

import pytest
from fake_checkout import SUITE, Checkout

from d2obench.gate.gate import Side, gate
from d2obench.gate.verdict import Verdict, Verdicts
from d2obench.measure import instructions
from d2obench.measure.instructions import PAGE_FAULTS, SOFTWARE, counting, why_not

PAGES = 64


def test_the_kernel_counts_what_this_thread_does():
    """Each page that is touched for the first time is a fault."""
    with counting(SOFTWARE, PAGE_FAULTS) as count:
        if count is None:
            pytest.skip("this kernel lets nobody count")
        before = count()
        with mmap.mmap(-1, PAGES * mmap.PAGESIZE) as fresh:
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                fresh.madvise(mmap.MADV_NOHUGEPAGE)
            for page in range(PAGES):
                fresh[page * mmap.PAGESIZE] = 1
        assert PAGES <= count() - before < 10 * PAGES


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOENT, "virtual machines"), (errno.EACCES, "perf_event_paranoid"), (errno.ENOSYS, os.strerror(38))],
)
def test_without_a_counter_there_is_no_count_but_a_reason(monkeypatch, code, words):
    def refused(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(instructions, "open_counter", refused)
    with counting() as count:
        assert count is None
    assert words in why_not()


def test_a_counter_is_closed_and_an_empty_one_counts_nothing(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(instructions, "open_counter", lambda *_: reader)
    os.write(writer, (2**40).to_bytes(8, "little"))
    os.close(writer)
    with counting() as count:
        assert count is not None
        assert (count(), count()) == (2**40, 0)
    with pytest.raises(OSError, match="descriptor"):
        os.read(reader, 1)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("FAKE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    made = Checkout(tmp_path / "repo", tmp_path / "scratch")
    made.suite(SUITE.replace('["tpot_s", "speedup"]', '["instructions_step"]'))
    return made


def run(repo: Checkout, *kinds: str) -> Verdicts:
    return gate("fake", {}, Side(None), Side(None), folder=repo.root, watch=str, kinds=("timed", *kinds))


def test_a_gate_compares_instructions_where_they_are_counted(repo):
    repo.commit(instructions=1e6, tpot=0.010)
    repo.work(instructions=1.05e6, tpot=0.013)  # times are not asked for
    found = run(repo)
    assert {row.metric for row in found.of(Verdict.REGRESSED)} == {"instructions_step"}
    assert found.of(Verdict.REGRESSED)[0].effect == pytest.approx(0.05, abs=0.002)
    repo.work(instructions=1.01e6)
    assert {row.verdict for row in run(repo).rows} == {Verdict.OK}


def test_a_gate_says_where_they_are_not(repo):
    repo.commit(instructions=None)
    repo.work(instructions=1e6)
    found = run(repo, "exact")
    assert not found.of(Verdict.REGRESSED)
    assert any(note.startswith("instructions_step was not compared: ") for note in found.notes)
