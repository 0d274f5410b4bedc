"""Official prompts and truncation of LongBench, LongBench-E and v2, and switches of chat templates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_tasks_loop import Bytes, ChatBytes, cell, quiet

from d2obench.cli.options import overrides
from d2obench.errors import DataError, UsageError
from d2obench.models import LoadedModel
from d2obench.run.check import check_suite
from d2obench.run.plan import cells
from d2obench.suite.definition import Quality, load_suite
from d2obench.tasks import evaluate, parse_task
from d2obench.tasks.longbench_prompts import cut_middle, official_prompt
from d2obench.tasks.longbench_v2 import chosen_letter

RECORD = {"input": "Who paid?", "context": "Otto paid for the {rope}.", "answers": ["Otto"], "length": 5}


def rows(folder: Path, name: str, *records: dict[str, Any]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prompts(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def model(tiny: LoadedModel) -> LoadedModel:
    return dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=4096)


def shown(model: LoadedModel, task: str, quality: Quality) -> list[str]:
    """The prompts of a task, as text."""
    asked = parse_task(task)
    return [example.prompt for example in asked.examples(model, cell(task), quality)]  # type: ignore[attr-defined]


def test_the_users_prompts_and_lengths_take_the_place_of_ours(tmp_path: Path, model: LoadedModel) -> None:
    data = {
        "longbench/qasper": rows(tmp_path, "qasper.jsonl", RECORD),
        "prompts": prompts(
            tmp_path, "dataset2prompt.json", {"qasper": "Read:\n{context}\nQ: {input} {{A}}:", "lcc": "x"}
        ),
        "prompts-2": prompts(tmp_path, "dataset2maxlen.json", {"qasper": 7, "lcc": 64}),
    }
    quality = Quality(data=data)
    assert shown(model, "longbench/qasper", quality) == ["Read:\nOtto paid for the {rope}.\nQ: Who paid? {A}:"]
    found = evaluate(model, cell("longbench/qasper"), quality, quiet)
    assert [item["generated"] for item in found.items] == [7]
    assert [
        item["generated"] for item in evaluate(model, cell("longbench/qasper(max_new=3)"), quality, quiet).items
    ] == [3]
    ours = shown(model, "longbench/qasper", Quality(data={"longbench/qasper": data["longbench/qasper"]}))
    assert ours[0] != "Read:\nOtto paid for the {rope}.\nQ: Who paid? {A}:"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"lcc": "{context}"}, "no prompt for 'qasper'"),
        ({"qasper": "{context} {question}"}, "field 'qasper' is malformed: a record has no field 'question'"),
        ({"qasper": "{context"}, "field 'qasper' is malformed"),
        ({"qasper": "{context} {}"}, "field 'qasper' is malformed"),
        ({"qasper": "{input}"}, r"no place \{context\}"),
        ({"qasper": ["{context}"]}, "neither a prompt nor a number"),
        ({"qasper": 0}, "neither a prompt nor a number"),
        ([1], "holds no prompts"),
        ("{", "line 1 is not valid JSON"),
    ],
)
def test_a_malformed_file_of_prompts_is_one_line(tmp_path: Path, content: Any, words: str) -> None:
    path = prompts(tmp_path, "p.json", content)
    with pytest.raises(DataError, match=words) as caught:
        official_prompt("qasper", {"prompts": path, "gsm8k": "other.jsonl"})
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_that_nothing_uses_are_refused_and_those_used_decide_the_cells(tmp_path: Path) -> None:
    path = prompts(tmp_path, "p.json", {"qasper": "{context}"})
    with pytest.raises(UsageError, match="no task of the suite uses them"):
        check_suite(load_suite("quick", overrides({}, prompts=[path])))
    with pytest.raises(DataError, match="not there"):
        check_suite(load_suite("longbench", overrides({}, prompts=[str(tmp_path / "none.json")])))
    suite = load_suite("longbench", overrides({}, prompts=[path, path]))
    check_suite(suite)
    assert list(suite.quality.data) == ["prompts", "prompts-2"]
    plain = [one.hash for one in cells(load_suite("longbench"))]
    assert not set(plain) & {one.hash for one in cells(suite)}


def test_truncation_is_the_benchmarks(model: LoadedModel) -> None:
    """``tokens[:n // 2]`` and ``tokens[-(n // 2):]``, before the chat template."""
    text = "".join(f"{i:03d} " for i in range(100))
    assert cut_middle(Bytes(), text, 400) == (text, False)
    assert cut_middle(Bytes(), text, 41) == (text[:20] + text[-20:], True)


def test_max_length_cuts_before_the_template(tmp_path: Path, model: LoadedModel) -> None:
    chat = dataclasses.replace(model, tokenizer=ChatBytes())
    long = rows(tmp_path, "a.jsonl", {**RECORD, "context": "x" * 500}, {**RECORD, "context": "y"})
    data = {"longbench/qasper": long, "prompts": prompts(tmp_path, "p.json", {"qasper": "<{context}|{input}>"})}
    found = evaluate(chat, cell("longbench/qasper(max_length=60,max_new=2)"), Quality(data=data), quiet)
    around = len("<user></user>\n")
    assert [item["prompt_tokens"] for item in found.items] == [60 + around, len("<y|Who paid?>") + around]
    assert [item["truncated"] for item in found.items] == [True, False]
    assert found.details["truncated"] == 1


def test_longbench_e_is_scored_by_length(tmp_path: Path, model: LoadedModel) -> None:
    lengths = [3999, 4000, 7999, 8000]
    path = rows(tmp_path, "a.jsonl", *({**RECORD, "length": length} for length in lengths))
    found = evaluate(model, cell("longbench/qasper_e(max_new=2)"), Quality(data={"longbench/qasper_e": path}), quiet)
    for item, score in zip(found.items, (1.0, 0.5, 0.0, 0.25), strict=True):
        item["score"] = score
    task = parse_task("longbench/qasper_e")
    assert task.details(found.items)["by_length"] == {"0-4k": 1.0, "4-8k": 0.25, "8k+": 0.25}  # type: ignore[attr-defined]
    assert "by_length" not in parse_task("longbench/qasper").details(found.items)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("**The correct answer is (C)**, because D is wrong", "C"),
        ("So: The correct answer is D.", "D"),
        ("The correct answer is (E). The correct answer is A", "A"),
        ("the correct answer is (B)", ""),
        ("B", ""),
        ("", ""),
    ],
)
def test_v2_takes_the_letter_as_the_benchmark_does(text: str, letter: str) -> None:
    assert chosen_letter(text) == letter


CHOICE = {
    "_id": "7", "context": "A rope.", "question": "What?", "choice_A": "rope", "choice_B": "b", "choice_C": "c",
    "choice_D": "d", "answer": "A", "difficulty": "easy", "length": "short", "domain": "x",
}  # fmt: skip


def test_v2_asks_with_its_choices(tmp_path: Path, model: LoadedModel) -> None:
    quality = Quality(data={"longbench-v2": rows(tmp_path, "v2.jsonl", CHOICE, {**CHOICE, "difficulty": "hard"})})
    (first, _) = shown(model, "longbench-v2", quality)
    assert "A rope.\n\nQuestion: What?\n\n(A) rope\n(B) b\n(C) c\n(D) d\n\n" in first
    found = evaluate(model, cell("longbench-v2(max_new=4)"), quality, quiet)
    assert found.details["by_difficulty"] == {"easy": 0.0, "hard": 0.0}
    assert found.details["by_length"] == {"short": 0.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": "E"}, "field 'answer'"),
        ({"question": " "}, "field 'question' is malformed: it is empty"),
        ({"choice_C": ""}, "field 'choice_C'"),
        ({"choice_B": ["b"]}, "field 'choice_B'"),
    ],
)
def test_a_malformed_record_of_v2_names_its_field(
    tmp_path: Path, model: LoadedModel, change: dict[str, Any], words: str
) -> None:
    quality = Quality(data={"longbench-v2": rows(tmp_path, "v2.jsonl", CHOICE | change)})
    with pytest.raises(DataError, match="line 1, " + words):
        shown(model, "longbench-v2", quality)


class Thinking(ChatBytes):
    chat_template = "{% if enable_thinking %}<think>{% endif %}"

    def apply_chat_template(self, turns: list[dict[str, str]], **given: Any) -> str:
        return f"<user>{turns[0]['content']}</user>{'<think>' if given.get('enable_thinking', True) else ''}"


def test_switches_reach_the_chat_template(tmp_path: Path, model: LoadedModel) -> None:
    chat = dataclasses.replace(model, tokenizer=Thinking())
    data = {"longbench/qasper": rows(tmp_path, "a.jsonl", RECORD)}
    sizes = []
    for task in ("longbench/qasper(max_new=1)", "longbench/qasper(max_new=1,template=[enable_thinking=false])"):
        (item,) = evaluate(chat, cell(task), Quality(data=data), quiet).items
        sizes.append(item["prompt_tokens"])
    assert sizes[0] - sizes[1] == len("<think>")


@pytest.mark.parametrize(
    ("task", "tokenizer", "words"),
    [
        ("longbench/qasper(template=[thinking=true])", Thinking(), "has no switch 'thinking'"),
        ("longbench/qasper(template=[enable_thinking=false])", Bytes(), "has no chat template"),
        ("longbench/lcc(template=[enable_thinking=false])", Thinking(), "continues plain text"),
        ("longbench/qasper(template=[enable_thinking])", Thinking(), "key=value"),
    ],
)
def test_a_switch_that_would_change_nothing_is_refused(
    tmp_path: Path, model: LoadedModel, task: str, tokenizer: Any, words: str
) -> None:
    chat = dataclasses.replace(model, tokenizer=tokenizer)
    name = task.partition("(")[0]
    with pytest.raises(UsageError, match=words):
        evaluate(chat, cell(task), Quality(data={name: rows(tmp_path, "a.jsonl", RECORD)}), quiet)
