"""The study of whole gates: what counts as right, undecided and wrong, on scripted gates of the template repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from repository import TEMPLATE

from d2obench.errors import D2OBenchError, UsageError, WorkerError
from d2obench.gate.verdict import Row, Verdict, Verdicts, gather
from d2obench.study import repository
from d2obench.study.gate import read_study
from d2obench.study.repository import Change, Study, as_markdown, judge, read_changes, study, write_study

CHANGES = read_changes(TEMPLATE)
OK, BAD, OPEN, NONE = Verdict.OK, Verdict.REGRESSED, Verdict.INCONCLUSIVE, Verdict.INCOMPARABLE


def verdicts(**found: Verdict) -> Verdicts:
    return gather("gate", "a", "b", [Row("cell", name, verdict, "") for name, verdict in found.items()])


@pytest.mark.parametrize(
    ("change", "found", "word"),
    [
        ("clean", verdicts(tpot_s=OK, kl=OK), "right"),
        ("clean", verdicts(tpot_s=OPEN, kl=OK), "undecided"),  # it does not know, and does not fail
        ("clean", verdicts(tpot_s=OPEN, kl=BAD), "wrong"),
        ("clean", verdicts(tpot_s=BAD), "wrong"),
        ("clean", verdicts(tpot_s=NONE), "wrong"),
        ("slower", verdicts(tpot_s=BAD), "right"),
        ("slower", verdicts(tpot_s=OPEN), "undecided"),
        ("slower", verdicts(tpot_s=OK), "wrong"),
        ("slower", verdicts(tpot_s=OPEN, kv_bytes=BAD), "wrong"),
        ("slower", verdicts(tpot_s=BAD, kv_bytes=BAD), "wrong"),
        ("extra-slot", verdicts(kept_layers=BAD, kv_bytes=BAD), "right"),
        ("extra-slot", verdicts(kept_layers=OPEN), "wrong"),  # a count is never undecided
        ("worse-kl", verdicts(kl=BAD), "right"),
        ("worse-kl", verdicts(kl=OPEN, tokens_digest=BAD), "undecided"),
        ("worse-kl", verdicts(kl=OK, tokens_digest=BAD), "wrong"),
        ("broken", WorkerError("the head does not build"), "right"),
        ("broken", verdicts(tpot_s=OK), "wrong"),
        ("clean", WorkerError("x"), "wrong"),
    ],
)
def test_what_is_right(change: str, found: Verdicts | D2OBenchError, word: str) -> None:
    assert judge(CHANGES[change], found) == word


def test_the_template_has_the_files_of_each_change_and_differs_by_them() -> None:
    for name in CHANGES:
        files = [*(TEMPLATE / "changes" / name).iterdir()]
        assert files, name
        for file in files:
            before = TEMPLATE / "repository" / file.name
            assert not before.exists() or before.read_bytes() != file.read_bytes()


def test_changes_take_turns_and_each_begins_from_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def scripted(root: Path) -> Verdicts:
        status = {path.name for path in root.iterdir() if path.name != ".git"}
        slow = "slow(0.1)" in (root / "strided.py").read_text()
        seen.append(status)
        (root / "rubbish").write_text("")
        return verdicts(tpot_s=BAD if slow else OK)

    monkeypatch.setattr(repository, "_gate", scripted)
    kept: list[int] = []
    said: list[str] = []
    found = study(
        TEMPLATE, gates=3, only=["clean", "slower"], watch=said.append, keep=lambda part: kept.append(len(part.trials))
    )
    assert [trial.change for trial in found.trials] == ["clean", "slower"] * 3
    assert {trial.word for trial in found.trials} == {"right"}
    assert kept == [1, 2, 3, 4, 5, 6]
    assert all("rubbish" not in names for names in seen)
    assert ["NOTES.txt" in names for names in seen] == [True, False] * 3
    write_study(tmp_path, found)
    text = (tmp_path / "README.md").read_text()
    assert "| slower: a decode step takes 10 % longer | REGRESSED in tpot_s | 3 | 3 | 0 | 0 |" in text
    assert "| all |  | 6 | 6 | 0 | 0 | 0.0% (0.0% … 45.9%) |" in text  # 1 - 0.025 ** (1 / 6)
    assert "broken" not in text
    assert len(json.loads((tmp_path / "study.json").read_text())["trials"]) == 6
    # it goes on where it was stopped, also within a turn
    part = msgspec.structs.replace(found, trials=found.trials[:5], note="tests ran beside it")
    write_study(tmp_path, part)
    seen.clear()
    again = study(TEMPLATE, gates=4, only=["clean", "slower"], known=read_study(tmp_path, Study), watch=said.append)
    assert [trial.change for trial in again.trials] == ["clean", "slower"] * 4
    assert len(seen) == 3
    assert "; tests ran beside it. 8 gates took" in as_markdown(again)


def test_a_study_is_not_continued_with_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"cpu": "a"}
    monkeypatch.setattr(repository, "_gate", lambda root: msgspec.structs.replace(verdicts(tpot_s=OK), about=machine))
    assert read_study(tmp_path, Study) is None
    write_study(tmp_path, study(TEMPLATE, gates=1, only=["clean"], watch=str))
    known = read_study(tmp_path, Study)
    assert known is not None and known.environment == machine
    with pytest.raises(UsageError, match=r"another study.*load"):
        study(TEMPLATE, gates=2, burn=True, known=known, watch=str)
    machine["cpu"] = "b"
    with pytest.raises(UsageError, match=r"another study.*machine"):
        study(TEMPLATE, gates=2, only=["clean"], known=known, watch=str)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UsageError, match="another study"):
        read_study(tmp_path, Study)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: None,
        lambda folder: (folder / "changes.toml").write_text("[a]\nverdict = 3\n"),
        lambda folder: (folder / "changes.toml").write_text('[a]\nabout = "x"\nverdict = "OK"\n'),
    ],
)
def test_a_folder_without_a_repository_and_changes_is_one_clear_line(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(tmp_path)
    with pytest.raises(UsageError, match=r"no changes to study|has no gate"):
        read_changes(tmp_path)


def test_a_change_says_what_must_be_found() -> None:
    assert Change("about", "OK").metric == ""
    assert {change.verdict for change in CHANGES.values()} == {"OK", "REGRESSED", "error"}
