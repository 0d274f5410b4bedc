"""Tasks with long answers: boxes, equality of values, repetition, and length relative to the full cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_tasks_loop import Bytes, cell, quiet

from d2obench.errors import DataError, UsageError
from d2obench.models import LoadedModel
from d2obench.report.derive import _length_drift
from d2obench.suite.definition import Quality
from d2obench.tasks import evaluate, parse_task, rescore
from d2obench.tasks.boxed import equal_answers, last_boxed, plainly
from d2obench.tasks.long_answers import repeated


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{12}. No, \boxed{\frac{1}{2}} it is.", r"\frac{1}{2}"),
        (r"\boxed{ \left\{ 1, 2 \right\} }", r"\left\{ 1, 2 \right\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{4} and then \boxed{5", "4"),
        (r"boxed{4}", None),
        ("the answer is 4", None),
        ("", None),
    ],
)
def test_the_last_box_that_closes_holds_the_answer(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\dfrac{3}{4}", r"\frac{3}{4}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("1,234", "1234"),
        ("10{,}000", "10000"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"90^\circ", "90"),
        ("$5$.", "5"),
        (r"x \in [-2,7]", r"x\in[-2,7]"),
    ],
)
def test_what_is_written_alike_is_equal_without_any_package(answer: str, gold: str) -> None:
    assert plainly(answer) == plainly(gold) and equal_answers(answer, gold)


@pytest.mark.needs("math_verify")
@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("0.75", r"\frac{3}{4}", True),
        ("033", "33", True),
        (r"\frac{6}{8}", r"\frac{3}{4}", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        ("x = 5", "5", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        ("(-1, 1)", "(-1, 2)", False),
        ("3", "4", False),
        (r"\text{odd}", r"\text{even}", False),
        (r"\frac{1}{", "1", False),
        ("x^2", "y^2", False),
        ("", "4", False),
    ],
)
def test_values_are_compared_and_not_letters(answer: str, gold: str, equal: bool) -> None:
    assert equal_answers(answer, gold) is equal


def test_a_missing_package_is_said_before_any_work(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UsageError, match=r"needs the package math-verify.*d2obench\[accuracy\]"):
        parse_task("math500").examples(model, cell("math500"), Quality(data={"math500": "none.jsonl"}))  # type: ignore[attr-defined]


@pytest.fixture
def model(tiny: LoadedModel) -> LoadedModel:
    return dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=4096)


def written(folder: Path, *rows: Any) -> str:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.needs("math_verify")
def test_problems_are_asked_and_scored_from_the_box(tmp_path: Path, model: LoadedModel) -> None:
    path = written(tmp_path, {"problem": "What is 1+1?", "answer": "2"}, {"problem": "And {2}?", "answer": 4})
    quality = Quality(data={"aime": path})
    task = parse_task("aime(max_new=24)")
    first, second = task.examples(model, cell("aime"), quality)  # type: ignore[attr-defined]
    assert first.prompt.endswith("What is 1+1?") and "\\boxed{…}" in first.prompt
    assert second.prompt.endswith("And {2}?") and second.keep == {"gold": "4"}
    found = evaluate(model, cell("aime(max_new=24)"), quality, quiet)
    assert [item["cut"] for item in found.items] == [1.0, 1.0] and found.values["cut"].value == 1
    items = [{**found.items[0], "text": r"\boxed{2}", "ended": "end"}, {**found.items[1], "text": r"so \boxed{5}"}]
    again = rescore("aime(max_new=24)", items)
    assert (again["score"].value, again["cut"].value) == (0.5, 0.5)


@pytest.mark.needs("math_verify")
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": " ", "answer": "2"}, "field 'problem' is malformed: it is empty"),
        ({"problem": "x", "answer": ""}, "line 1.*answer"),
        ({"problem": "x", "answer": ["2"]}, "field 'answer'"),
        ({"problem": "x", "answer": True}, "field 'answer'"),
    ],
)
def test_a_malformed_problem_names_its_field(tmp_path: Path, model: LoadedModel, row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse_task("math500").examples(model, cell("math500"), Quality(data={"math500": written(tmp_path, row)}))  # type: ignore[attr-defined]


def test_years_of_aime_are_different_sets() -> None:
    assert parse_task("aime").source() != parse_task("aime(year=2025)").source()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="year"):
        parse_task("aime(year=2000)")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("a b c d e f", 0.0),
        ("a b c d a b c d", 1 / 5),
        ("x " * 20, 16 / 17),
    ],
)
def test_repetition_is_the_share_of_word_sequences_seen_before(text: str, share: float) -> None:
    assert repeated(text) == pytest.approx(share)


def test_length_relative_to_the_full_cache_is_that_of_sums() -> None:
    full = [{"id": str(i), "generated": n, "repeated": 0.0} for i, n in enumerate([100, 200, 300, 400, 500, 600, 700])]
    mine = [{**item, "generated": int(item["generated"]) * 2 + i % 2} for i, item in enumerate(full)]
    found = _length_drift({"items": mine}, {"items": full})["length_drift"]
    assert found.value == pytest.approx((2 * 2800 + 3) / 2800)
    assert found.kind == "interval" and found.lo is not None and found.hi is not None
    assert 1.98 < found.lo < 2.0011 < found.hi < 2.02
    assert _length_drift({"items": [{"id": "0", "generated": 3}]}, {"items": full}) == {}
    assert _length_drift({"items": mine}, {"items": []}) == {}
