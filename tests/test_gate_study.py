"""The study of the timed rule: replays over a simulated recording, and a recording of scripted workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from d2obench.runner import study
from d2obench.stats.verdict import Verdict
from d2obench.suite import load_suite
from tests.fake_checkout import Checkout
from tests.machine import rounds

SUITE = load_suite("ci", study.SUITE)


@pytest.fixture(scope="module")
def recording() -> study.Pairs:
    return study.Pairs(*rounds(np.random.default_rng(0), 320, 0.0, jitter=0.02, drift=0.03, spikes=0.05))


def test_replays_of_equal_code_raise_no_alarm(recording):
    found = study.replay(recording, SUITE, 60, 0.0)
    assert found[Verdict.REGRESSED] == 0
    assert found.total() == 60


def test_replays_of_a_slower_head_find_it_and_never_call_it_ok(recording):
    found = study.replay(recording, SUITE, 60, 0.2)
    assert found[Verdict.REGRESSED] >= 57
    assert study.replay(recording, SUITE, 60, 0.1)[Verdict.OK] == 0


def test_a_replay_is_the_same_each_time(recording):
    assert study.replay(recording, SUITE, 20, 0.05) == study.replay(recording, SUITE, 20, 0.05)


def test_the_study_records_then_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_SCRATCH", str(tmp_path))
    repo = Checkout(tmp_path / "repo", tmp_path)
    repo.commit()
    monkeypatch.setattr(study, "root", lambda: repo.root)
    said: list[str] = []
    found = study.study(live=2, replays=5, trials=0, burn=True, watch=said.append)
    assert [(outcome.what, outcome.change) for outcome in found] == [
        ("live sittings", 0.0),
        ("replayed gates", 0.0),
        ("replayed gates", 0.1),
        ("replayed gates", 0.2),
    ]
    assert found[0].counts == {Verdict.OK: 2}
    assert found[3].counts == {Verdict.REGRESSED: 5}
    assert repo.workers_alive() == []
    assert said[0] == "2 sittings of equal code"


def test_an_outcome_in_words():
    outcome = study.Outcome("live gates", 0.1, Counter({Verdict.OK: 1, Verdict.REGRESSED: 9}))
    assert str(outcome) == "live gates, head +10%: 9 REGRESSED, 1 OK of 10"
