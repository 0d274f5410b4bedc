"""The study of the first command, with scripted runs: what is false, what is not, and that loads end with it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
import pytest
import report_runs as made
from waiting import is_dead, wait_for

from d2obench.errors import RecordError, UsageError
from d2obench.record import Value
from d2obench.stats.claims import Claim
from d2obench.study import quick
from d2obench.study.quick import LOADS, SHORT, TRUTH, Said, excluded, loaded, plan, read, study

CELL, OTHER = "speed/d2o", "speed/h2o"


class Script:
    """Stands in for ``d2obench run quick``: a speed-up of 1.2, and ``lie`` under a load that it can't bear."""

    def __init__(self, lie: Claim | None = None, fail: str = "") -> None:
        self.lie, self.fail, self.dice, self.count = lie, fail, random.Random(0), 0

    def __call__(self, options: Sequence[str], place: Path) -> str:
        self.count += 1
        load = place.name.rpartition("-")[0]
        if load == self.fail:
            return "signal 9"
        value = 1.2 * self.dice.gauss(1, 0.01)
        claims = [Claim("better", CELL, "speedup", 1.0, lo=value - 0.1, hi=value + 0.1)]
        if self.lie and load == "one-core":
            claims.append(self.lie)
        place.mkdir(parents=True)
        (place / "report.html").touch()
        figures = [(CELL, "speedup", value), (OTHER, "speedup", 1.5 * value)]
        (place / "said.json").write_bytes(msgspec.json.encode((claims, figures)))
        return ""

    @staticmethod
    def read(place: Path) -> Said:
        """What it left."""
        if not (place / "said.json").is_file():
            raise RecordError(f"{place} is not a run folder")
        return msgspec.json.decode((place / "said.json").read_bytes(), type=Said)


def test_true_sentences_are_true_under_every_load(tmp_path: Path) -> None:
    script, said = Script(), list[str]()
    found = study(tmp_path, runs=8, truths=4, runner=script, reader=script.read, watch=said.append)
    assert script.count == len(said) == len(found.runs) == 12
    assert Counter(one.load for one in found.sentences) == dict.fromkeys(LOADS, 2)
    assert not any(one.false for one in found.sentences)
    text = (tmp_path / "README.md").read_text()
    assert "| all | 8 | 0 | 8 | 0 | 0.0% (0.0% … 36.9%) | 0 |" in text
    assert found.command == SHORT
    assert "False" not in text


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (Claim("worse", CELL, "speedup", most=1.0, lo=0.8, hi=0.95), "on the other side"),
        (Claim("better", CELL, "speedup", 1.0, lo=2.9, hi=4.5), "right side, figure far off"),
        (Claim("best", CELL, "speedup", others=(OTHER,)), "another is better"),
        (Claim("undominated", CELL, "speedup", others=(OTHER,)), "another of few bytes is better"),
        (Claim("met", CELL, "speedup", 1.4, lo=1.1, hi=1.6), "outside its target"),
        (Claim("missed", CELL, "speedup", 1.1, lo=1.0, hi=1.3), "inside its target"),
    ],
)
def test_a_false_sentence_is_found_and_shown(tmp_path: Path, lie: Claim, why: str) -> None:
    found = study(tmp_path, runs=8, truths=4, runner=Script(lie), reader=Script.read, watch=lambda words: None)
    false = [one for one in found.sentences if one.false]
    assert [(one.load, one.claim) for one in false] == [("one core", lie)] * 2
    text = (tmp_path / "README.md").read_text()
    assert "| one core | 2 | 0 | 4 | 2 | 100.0% (15.8% … 100.0%) | 0 |" in text
    assert f"{CELL}: decode, equal batch {lie.word}" in text
    assert sum(one["false"] for one in json.loads((tmp_path / "study.json").read_bytes())["sentences"]) == 2


def test_what_the_truth_does_not_exclude_is_not_called_false() -> None:
    truth = {(CELL, "speedup"): Value(1.0, 0.98, 1.02, 20, kind="interval"), (OTHER, "speedup"): Value(1.1)}
    assert not excluded(Claim("better", CELL, "speedup", 1.0, lo=1.01, hi=1.03), truth)
    assert not excluded(Claim("best", CELL, "speedup", others=(OTHER, "unknown")), truth)
    assert not excluded(Claim("undominated", CELL, "speedup"), truth)
    assert not excluded(Claim("better", "unknown", "speedup", 1.0, lo=5, hi=6), truth)
    assert not excluded(Claim("met", CELL, "speedup", 0.9, 1.1, lo=0.9, hi=1.1), truth)


def test_failed_runs_are_counted_and_say_nothing(tmp_path: Path) -> None:
    found = study(
        tmp_path, runs=4, truths=3, runner=Script(fail="bursts"), reader=Script.read, watch=lambda words: None
    )
    assert [one.load for one in found.runs if one.failed] == ["bursts"]
    text = (tmp_path / "README.md").read_text()
    assert "| bursts | 1 | 1 | 0 | 0 | – | 0 |" in text
    assert "* bursts-01: `signal 9`" in text


def test_a_stopped_study_goes_on_and_one_out_of_time_is_smaller(tmp_path: Path) -> None:
    first = Script()
    part = study(tmp_path, runs=8, truths=4, minutes=0, runner=first, reader=first.read, watch=lambda words: None)
    assert part.runs == ()
    killed = tmp_path / "runs" / "quiet-01"
    killed.mkdir(parents=True)
    (killed / "run.json").touch()
    whole = study(tmp_path, runs=8, truths=4, runner=first, reader=first.read, watch=lambda words: None)
    assert not (killed / "run.json").exists()
    stored = tmp_path / "study.json"
    stored.write_bytes(
        msgspec.json.encode(
            msgspec.structs.replace(whole, runs=tuple(msgspec.structs.replace(one, seconds=40.0) for one in whole.runs))
        )
    )
    again = study(tmp_path, runs=8, truths=4, minutes=0, runner=first, reader=first.read, watch=lambda words: None)
    assert first.count == 12
    assert [one.claims for one in again.runs] == [one.claims for one in whole.runs]
    assert {one.seconds for one in again.runs} == {40.0}


def test_all_kinds_take_turns() -> None:
    names = plan(40, 20)
    assert Counter(load for _, load in names) == {TRUTH: 20} | dict.fromkeys(LOADS, 10)
    assert len({name for name, _ in names}) == 60
    for start in range(0, 60, 12):
        assert Counter(load for _, load in names[start : start + 12])[TRUTH] in (3, 4, 5)


def test_too_few_runs_are_one_line() -> None:
    with pytest.raises(UsageError, match="too few"):
        study(Path(), runs=3)


def test_loads_are_children_that_end(tmp_path: Path) -> None:
    me = psutil.Process()
    before = set(me.children())  # other tests of this process may have left some
    with loaded("all cores"):
        started = set(me.children()) - before
        assert len(started) == os.cpu_count()
    assert not started & set(me.children())


def test_a_load_ends_with_a_study_that_is_killed() -> None:
    code = "from d2obench.study.quick import loaded\nwith loaded('one core'):\n print(1, flush=True)\n input()\n"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout and parent.stdout.readline() == b"1\n"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    wait_for(lambda: is_dead(child.pid))


def test_a_run_is_read_as_its_report_says_it(tmp_path: Path) -> None:
    where: dict[str, object] = {"shape": "256+16", "batch": 2}
    rates = {"full": 10.0, "h2o": 14.0}
    cells = [
        made.record(
            made.axes("speed", policy, None if policy == "full" else "0.2", **where),
            values={"decode_tok_s": Value(rate, rate - 0.1, rate + 0.1, 9, kind="interval", df=8)},
            details={"processes": 2},
        )
        for policy, rate in rates.items()
    ]
    found = read(made.write_run(tmp_path, "made", cells))
    assert [(claim.word, claim.cell, claim.others) for claim in found.claims] == [("best", cells[1].id, (cells[0].id,))]
    assert (cells[0].id, "decode_tok_s", 10.0) in found.figures


def test_the_command_is_the_one_a_user_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def record(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 2, "", "Error: no such option\n")

    monkeypatch.setattr(quick.subprocess, "run", record)
    assert quick.run(["--batch", "2"], tmp_path / "a") == "Error: no such option"
    assert seen[0][1:] == ["-P", "-m", "d2obench", "run", "quick", "--batch", "2", "--out", str(tmp_path / "a")]
