"""The study of the timed rule: replays over a simulated recording, live gates of scripted workers, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_checkout import Checkout
from machine import rounds

from d2obench.errors import UsageError
from d2obench.gate.rules import tolerance
from d2obench.gate.verdict import Verdict
from d2obench.study import gate as study
from d2obench.study.gate import Outcome, Pairs, Rule, Study, Trial, as_markdown, read_study, replay, write_study
from d2obench.suite.definition import load_suite

SUITE = load_suite("ci", study.SUITE)
RULE = Rule(study.METRIC, tolerance(study.METRIC, SUITE.gate.tolerance), SUITE.gate)


@pytest.fixture(scope="module")
def recording() -> list[Pairs]:
    """Process pairs that differ by some percents for good, on a machine with jitter, drift and spikes."""
    rng = np.random.default_rng(0)
    return [
        Pairs(*rounds(rng, 16, float(rng.normal(0, 0.01)), jitter=0.02, drift=0.03, spikes=0.05)) for _ in range(40)
    ]


def test_the_parts_of_a_sitting_are_what_each_look_adds():
    assert RULE.lengths == [8, 8, 16]


def test_a_sitting_stops_at_the_first_look_that_decides():
    calm, slow = Pairs([1.0, 1.001] * 8, [1.0, 1.002] * 8), Pairs([1.0] * 16, [2.0] * 16)
    assert (RULE.sitting([calm, slow, slow]).verdict, RULE.sitting([calm, slow, slow]).n) == (Verdict.OK, 8)
    wild = Pairs([1.0] * 16, [0.8, 1.4] * 8)
    assert RULE.sitting([wild, wild, wild]).n == 32


def test_replays_of_equal_code_raise_no_alarm(recording):
    found = replay(recording, RULE, 60, 0.0)
    assert Verdict.REGRESSED not in found.counts
    assert found.total == 60


def test_replays_of_a_slower_head_find_it_and_never_call_it_ok(recording):
    assert replay(recording, RULE, 60, 0.2).counts[Verdict.REGRESSED] >= 57
    assert Verdict.OK not in replay(recording, RULE, 60, 0.1).counts


def test_a_replay_is_the_same_each_time(recording):
    assert replay(recording, RULE, 20, 0.05) == replay(recording, RULE, 20, 0.05)


def test_live_gates_start_their_own_processes_and_are_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_SCRATCH", str(tmp_path))
    repo = Checkout(tmp_path / "repo", tmp_path)
    repo.commit()
    monkeypatch.setattr(study, "root", lambda: repo.root)
    said: list[str] = []
    kept: list[Study] = []
    found = study.study(gates={0.0: 2}, replays=5, burn=True, watch=said.append, keep=kept.append)
    assert [(one.kind, one.change, one.total) for one in found.outcomes] == [
        ("live", 0.0, 2),
        ("replayed", 0.0, 5),
        ("replayed", 0.1, 5),
        ("replayed", 0.2, 5),
    ]
    assert found.outcomes[0].counts == {Verdict.OK: 2}
    assert found.outcomes[3].counts == {Verdict.REGRESSED: 5}
    assert len((repo.scratch / "pids").read_text().split()) == 2 * 2 * 3  # gates, arms, looks
    assert [len(part.base) for part in found.trials[0].parts] == [16] * 3
    assert repo.workers_alive() == []
    assert said[0].startswith("+0%, gate 1 of 2: OK")
    assert [len(one.trials) for one in kept] == [1, 2, 2]
    # it goes on where it was stopped: only what is missing is measured, and gates are replayed anew
    write_study(tmp_path / "out", kept[0])
    known = read_study(tmp_path / "out", Study)
    assert known == kept[0]
    again = study.study(gates={0.0: 2}, replays=5, burn=True, known=known, watch=said.append)
    assert again.trials[0] == found.trials[0]
    assert [one.total for one in again.outcomes] == [2, 5, 5, 5]
    assert len((repo.scratch / "pids").read_text().split()) == 3 * 2 * 3
    with pytest.raises(UsageError, match=r"another study.*load"):
        study.study(gates={0.0: 2}, known=known)
    other = msgspec.structs.replace(known, environment={"cpu": "another"})
    with pytest.raises(UsageError, match=r"another study.*machine"):
        study.study(gates={0.0: 2}, burn=True, known=other)


def test_the_files_say_how_often_and_how_sure(tmp_path: Path):
    part = Pairs([1.0], [1.1])
    trials = tuple(Trial(change=0.1, verdict=Verdict.REGRESSED, found="+10 %", parts=(part,)) for _ in range(12))
    outcome = Outcome("live", 0.1, {Verdict.REGRESSED: 11, Verdict.INCONCLUSIVE: 1})
    rule = {"cell": "c", "metric": "tpot_s", "limit": 0.05, "looks": [8], "level": 0.98}
    found = Study(rule, {"cpu": "<x>", "torch": "2"}, True, trials, (outcome,))
    write_study(tmp_path, found)
    stored = json.loads((tmp_path / "study.json").read_text())
    assert stored["trials"][0]["parts"] == [[[1.0], [1.1]]]
    assert stored["outcomes"][0]["counts"] == {"REGRESSED": 11, "INCONCLUSIVE": 1}
    text = (tmp_path / "README.md").read_text()
    assert text == as_markdown(found)
    assert "| +10% | live | 12 | 11 | 1 | 0 | 91.7% (61.5% … 99.8%) |" in text
    assert "one core busy" in text
    assert "--load" in text


def test_the_interval_of_a_share_is_the_published_one():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 5: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, n, lo, hi in [
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ]:
        found = Outcome("live", 0.1, {Verdict.OK: hits, Verdict.REGRESSED: n - hits}).share(Verdict.OK)
        assert found[0] == hits / n
        assert found[1:] == pytest.approx((lo, hi), abs=5e-5)


def test_an_outcome_in_words():
    outcome = Outcome("live", 0.1, {Verdict.OK: 1, Verdict.REGRESSED: 9})
    assert str(outcome) == "live, head +10%: 9 REGRESSED, 1 OK of 10"
