"""Evaluation sets from files and from the hub: every format, and one clear line for everything that can be wrong."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from d2obench.errors import D2OBenchError, DataError, UsageError
from d2obench.models import LoadedModel
from d2obench.record import Axes
from d2obench.suite.definition import Quality
from d2obench.tasks import parse_task, read_cell
from d2obench.tasks.coqa import Story
from d2obench.tasks.data import Source, read_text, records
from d2obench.tasks.gsm8k import Problem
from d2obench.tasks.longbench import Sample
from d2obench.tasks.scoring import accuracy_package
from d2obench.tasks.truthfulqa import Question, from_csv

HUB = Source("owner/set", "0" * 40, "test")
ROWS = [{"question": "Wie viele Öfen?", "answer": "#### 2", "other": 1}, {"question": "两", "answer": "#### 3"}]


def write(folder: Path, suffix: str) -> str:
    path = folder / f"own{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", "utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}), "utf-8")
    elif suffix == ".csv":
        path.write_text('question,answer\n"Wie viele Öfen?",#### 2\n两,#### 3\n', "utf-8-sig")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    found = records("gsm8k", HUB, write(tmp_path, suffix), Problem)
    assert found == [Problem("Wie viele Öfen?", "#### 2"), Problem("两", "#### 3")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"question": "x", "answer": "y"}\n{"question": 3, "answer": "y"}\n', "line 2, field 'question'"),
        ("a.jsonl", '{"question": "x"}\n', "line 1 is malformed: .*`answer`"),
        ("a.jsonl", '\n{"question": \n', "line 2 is not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1 is malformed: Expected an object"),
        ("a.jsonl", "", "has no records"),
        ("a.json", '{\n"data": [1, }', "line 2 is not valid JSON"),
        ("a.json", '{"a": 1}', "holds no list of records"),
        ("a.json", '[{"question": "x", "answer": null}]', "record 1, field 'answer'"),
        ("a.csv", "question,answer\nx\n", "line 2 is malformed"),
        ("a.csv", "question,replies\nx,y\n", "line 2 is malformed: .*`answer`"),
        ("a.parquet", "not parquet", "can't read"),
        ("a.txt", "x", "can't tell the format"),
    ],
)
def test_a_malformed_file_names_file_line_and_field(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        records("gsm8k", HUB, str(path), Problem)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can't read .*none.jsonl: No such file"):
        records("gsm8k", HUB, str(tmp_path / "none.jsonl"), Problem)
    (tmp_path / "latin.csv").write_bytes(b"question,answer\n\xff,x\n")
    with pytest.raises(DataError, match="can't read"):
        records("gsm8k", HUB, str(tmp_path / "latin.csv"), Problem)


def test_a_set_that_can_not_be_had_says_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def fail(*args: Any, **kwargs: Any) -> Any:
        asked.update(args=args, **kwargs)
        raise ConnectionError("no route to host\nmore words")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        records("gsm8k", HUB, None, Problem)
    assert "huggingface.co" in str(caught.value)
    assert "--data gsm8k=FILE" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert asked["revision"] == "0" * 40


def test_hub_records_are_checked_like_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def give(*args: Any, **kwargs: Any) -> Any:
        asked.update(args=args, **kwargs)
        return [ROWS[0], {"question": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", give)
    with pytest.raises(DataError, match="owner/set record 2 is malformed"):
        records("gsm8k", HUB, None, Problem)


def test_a_set_in_an_archive_is_read_from_the_downloaded_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    asked: list[Any] = []

    def download(hub: str, name: str, **kwargs: Any) -> str:
        asked.append((hub, name, kwargs["revision"]))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source = Source("owner/set", "1" * 40, "test", archive="data.zip", member="data/a.jsonl")
    assert len(records("gsm8k", source, None, Problem)) == 2
    assert asked == [("owner/set", "data.zip", "1" * 40)]
    with pytest.raises(DataError, match="--data gsm8k=FILE"):
        records("gsm8k", dataclasses.replace(source, member="data/b.jsonl"), None, Problem)


def test_truthfulqa_reads_the_authors_csv(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'A,B,"Why, then?",Because,Because; It is so ; ,"No; never",x\n'
    )
    (found,) = records("truthfulqa", HUB, str(path), Question, prepare=from_csv)
    assert found.question == "Why, then?"
    assert [answer.strip() for answer in found.correct_answers] == ["Because", "It is so", ""]
    assert found.incorrect_answers == ["No", " never"]


def examples(task: str, path: Path, rows: list[dict[str, Any]], model: LoadedModel, limit: int = 0) -> list[Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = parse_task(task).name
    cell = read_cell({"axes": Axes(task, "tiny", "float32", "cpu", "full", None, None, None, 0)})
    task_of: Any = parse_task(task)
    found: list[Any] = task_of.examples(model, cell, Quality(limit=limit, data={name: str(path)}))
    return found


STORY = {
    "story": "Otto had a dog. It was old.",
    "questions": ["Who had a dog?", "Was it young?"],
    "answers": {"input_text": ["Otto", "no"], "answer_start": [0, 3]},
}


def test_coqa_asks_the_last_turn_or_all(tmp_path: Path, tiny: LoadedModel) -> None:
    (last,) = examples("coqa", tmp_path / "a.jsonl", [STORY], tiny)
    assert last.prompt.endswith("Q: Who had a dog?\nA: Otto\n\nQ: Was it young?\nA:")
    assert last.keep["references"] == ["no"]
    rows = [{**STORY, "references": [["Otto", "he"], ["no", "No.", "it was old"]]}] * 2
    found = examples("coqa(turns=all)", tmp_path / "a.jsonl", rows, tiny)
    assert [(item.id, item.document) for item in found] == [("0.1", "0"), ("0.2", "0"), ("1.1", "1"), ("1.2", "1")]
    assert found[1].keep["references"] == ["no", "No.", "it was old"]
    assert msgspec.convert(STORY, Story).references == []


def test_lambada_takes_the_last_word_off(tmp_path: Path, tiny: LoadedModel) -> None:
    (found,) = examples("lambada", tmp_path / "a.jsonl", [{"text": "He looked for the key "}], tiny)
    assert (found.prompt, found.candidates, found.keep["gold"]) == ("He looked for the", (" key",), "key")


def test_longbench_limits_and_schema(tmp_path: Path, tiny: LoadedModel) -> None:
    row = {"input": "Which {one}?", "context": "Text {x}.", "answers": ["b", "c"], "length": 3, "dataset": "qasper",
           "language": "en", "all_classes": None, "_id": "f00"}  # fmt: skip
    found = examples("longbench/qasper", tmp_path / "a.jsonl", [row] * 3, tiny, limit=2)
    assert len(found) == 2
    assert "Text {x}." in found[0].prompt
    assert "Which {one}?" in found[0].prompt
    assert found[0].document == "f00"
    assert found[0].keep["references"] == ["b", "c"]
    with pytest.raises(DataError, match=r"line 1, field 'answers'"):
        examples("longbench/qasper", tmp_path / "a.jsonl", [{**row, "answers": []}], tiny)


def test_lists_in_csv_are_json(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    context = "x" * 200_000
    path.write_text(f'input,context,answers,all_classes,_id\nq,{context},"[""a"", ""b""]",,7\n')
    (found,) = records("longbench/qasper", HUB, str(path), Sample)
    assert (found.answers, found.all_classes, found.key, len(found.context)) == (["a", "b"], None, "7", 200_000)
    path.write_text("input,context,answers,all_classes,_id\nq,c,a;b,,7\n")
    with pytest.raises(DataError, match=r"line 2, field 'answers' is malformed: Expected `array`, got `str`"):
        records("longbench/qasper", HUB, str(path), Sample)


def test_own_text_from_plain_and_structured_files(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("plain ö", "utf-8")
    assert read_text(str(tmp_path / "a.md")) == "plain ö"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"
    (tmp_path / "a.jsonl").write_text('{"txt": "one"}\n')
    with pytest.raises(DataError, match="line 1, field 'text'"):
        read_text(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="can't read"):
        read_text(str(tmp_path / "none.txt"))


def test_a_missing_score_package_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"needs the package no-such-package; install it: pip install 'd2obench\[acc"):
        accuracy_package("no_such_package.sub")
    assert issubclass(DataError, D2OBenchError)


LONG = {"input": "Which?", "context": "Text.", "answers": ["b"], "all_classes": None, "_id": "f00"}
GSM = {"question": "How many?", "answer": "2 + 2 = 4\n#### 4"}
TRUTH = {"question": "Why?", "best_answer": "So.", "correct_answers": ["So."], "incorrect_answers": ["No."]}


@pytest.mark.parametrize(
    ("task", "good", "bad", "field"),
    [
        (
            "longbench/passage_retrieval_en",
            {**LONG, "answers": ["Paragraph 7"]},
            {"answers": ["seventh"]},
            "answers",
        ),
        ("longbench/passage_retrieval_zh", {**LONG, "answers": ["段落7"]}, {"answers": ["Paragraph 7"]}, "answers"),
        ("longbench/passage_count", {**LONG, "answers": ["7"], "input": ""}, {"answers": ["seven"]}, "answers"),
        ("longbench/trec", {**LONG, "all_classes": ["b"]}, {"all_classes": None}, "all_classes"),
        ("longbench/trec", {**LONG, "all_classes": ["b"]}, {"all_classes": []}, "all_classes"),
        ("longbench/qasper", LONG, {"answers": "b"}, "answers"),
        ("longbench/qasper", LONG, {"answers": ["", " "]}, "answers"),
        ("longbench/qasper", LONG, {"input": " "}, "input"),
        ("longbench/qasper", LONG, {"context": ""}, "context"),
        ("longbench/gov_report", {**LONG, "input": ""}, {"context": ""}, "context"),
        ("gsm8k", GSM, {"answer": "It is four."}, "answer"),
        ("gsm8k", GSM, {"answer": "The answer is 4."}, "answer"),
        ("gsm8k", {**GSM, "answer": "$1,234"}, {"answer": ""}, "answer"),
        ("gsm8k", GSM, {"question": "\n"}, "question"),
        ("coqa", STORY, {"story": ""}, "story"),
        ("coqa", STORY, {"questions": ["Who?"]}, "answers.input_text"),
        ("coqa", STORY, {"questions": [], "answers": {"input_text": []}}, "questions"),
        ("coqa", STORY, {"questions": ["Who had a dog?", ""]}, "questions"),
        ("coqa", STORY, {"questions": "Who?"}, "questions"),
        ("coqa", STORY, {"answers": {"input_text": ["Otto", ""]}}, "answers.input_text"),
        ("coqa", STORY, {"references": [["Otto"]]}, "references"),
        ("coqa", STORY, {"references": [["Otto"], []]}, "references"),
        ("coqa", STORY, {"references": ["Otto", "no"]}, "references"),
        ("lambada", {"text": "Two words"}, {"text": "One"}, "text"),
        ("lambada", {"text": "Two words"}, {"text": " "}, "text"),
        ("truthfulqa", TRUTH, {"question": ""}, "question"),
        ("truthfulqa", TRUTH, {"best_answer": " "}, "best_answer"),
        ("truthfulqa", TRUTH, {"incorrect_answers": []}, "incorrect_answers"),
        ("truthfulqa", TRUTH, {"incorrect_answers": [" "]}, "incorrect_answers"),
        ("truthfulqa", TRUTH, {"correct_answers": "So."}, "correct_answers"),
        ("truthfulqa", {**TRUTH, "correct_answers": []}, {"best_answer": "\ud800"}, "best_answer"),
    ],
)
def test_a_record_that_can_not_be_scored_is_named_when_its_file_is_read(
    tmp_path: Path, tiny: LoadedModel, task: str, good: dict[str, Any], bad: dict[str, Any], field: str
) -> None:
    """A gold answer without a number ended a run in the middle; others scored 0 for every policy, in silence."""
    path = tmp_path / "own.jsonl"
    assert examples(task, path, [good, good], tiny)
    with pytest.raises(DataError) as caught:
        examples(task, path, [good, {**good, **bad}], tiny, limit=1)
    assert f"{path} line 2, field '{field}" in str(caught.value)
    assert "\n" not in str(caught.value)
