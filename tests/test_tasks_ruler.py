"""RULER: generators against the published descriptions, files byte for byte, and the official string match."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tasks_loop import Bytes, cell, quiet

from d2obench.errors import DataError, UsageError
from d2obench.models import LoadedModel
from d2obench.suite.definition import Quality, load_suite
from d2obench.tasks import RULER, evaluate, parse_task
from d2obench.tasks.ruler import most_units, string_match
from d2obench.tasks.ruler_sets import NOISE, NOUNS, SETS, Sample, joined_words
from d2obench.texts.writer import Sentence

SUITE = Path(__file__).parent.parent / "suites" / "ruler.toml"
NEEDLE = re.compile(r"One of the special (\w+)s of (\S+) is (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Words(Bytes):
    """A tokenizer of words, which is fast and short."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in re.findall(r"\w+|[^\w\s]", text)]}


@pytest.fixture
def model(tiny: LoadedModel) -> LoadedModel:
    return dataclasses.replace(tiny, tokenizer=Words(), has_sense=True, context=8192)


def made(name: str, units: int, length: int = 4096, seed: int = 1) -> Sample:
    generate = SETS[name].generate
    assert generate is not None
    return generate(random.Random(seed), units, length)


@pytest.mark.parametrize(
    ("name", "keys", "values", "answers", "kind"),
    [
        ("niah_single_1", 1, 1, 1, "number"),
        ("niah_single_2", 1, 1, 1, "number"),
        ("niah_single_3", 1, 1, 1, "code"),
        ("niah_multikey_1", 4, 1, 1, "number"),
        ("niah_multikey_2", 61, 1, 1, "number"),
        ("niah_multikey_3", 61, 1, 1, "code"),
        ("niah_multivalue", 1, 4, 4, "number"),
        ("niah_multiquery", 4, 1, 4, "number"),
    ],
)
def test_needles_are_as_many_as_the_benchmark_has(name: str, keys: int, values: int, answers: int, kind: str) -> None:
    for seed in range(5):
        sample = made(name, 60, seed=seed)
        found = NEEDLE.findall(sample.context)
        by_key: dict[str, list[str]] = {}
        for what, key, value in found:
            assert what == kind
            assert re.fullmatch(r"[1-9]\d{6}", value) if kind == "number" else UUID.fullmatch(value)
            by_key.setdefault(key, []).append(value)
        assert len(by_key) == keys and all(len(each) == values for each in by_key.values())
        asked = [key for key in by_key if re.search(rf"(?<!\S){re.escape(key)}(?=[ ,])", sample.question)]
        assert len(asked) == answers // values
        assert sorted(sample.answers) == sorted(value for key in asked for value in by_key[key])
        assert sample.question.startswith("\n\nWhat ") and sample.prefix.startswith(" The special ")
        assert not any(answer in sample.question + sample.prefix for answer in sample.answers)


class Numbered:
    """A writer of numbered sentences."""

    def __init__(self, seed: int, theme: str) -> None:
        assert theme == "ruler"

    def sentences(self) -> Iterator[Sentence]:
        return (Sentence(f"S{number}.") for number in itertools.count())


@pytest.mark.parametrize("name", ["niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery"])
def test_needles_in_prose_stand_at_different_ones_of_forty_depths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``int(sentences · depth / 100)`` sentences; the depths are 40 from 0 to 100."""
    monkeypatch.setattr("d2obench.tasks.ruler_sets.Writer", Numbered)
    depths = np.round(np.linspace(0, 100, 40)).astype(int).tolist()
    seen: set[int] = set()
    for seed in range(40):
        text = made(name, 120, seed=seed).context.partition("\n\n")[2]
        parts = [re.findall(r"S(\d+)\.", part) for part in NEEDLE.sub("\0", text).split("\0")]
        assert [int(number) for part in parts for number in part] == list(range(120))
        places = np.cumsum([len(part) for part in parts])[:-1].tolist()
        assert len(places) in (1, 4) and set(places) <= {int(120 * depth / 100) for depth in depths}
        assert len(set(places)) == len(places)
        seen.update(places)
    assert len(seen) > 20 and {0, 120} & seen


def test_noise_and_needles_are_lines() -> None:
    noise = made("niah_single_1", 30).context.split("\n\n")[1].split("\n")
    assert Counter(line == NOISE for line in noise) == {True: 30, False: 1}
    lines = made("niah_multikey_3", 30).context.split("\n\n")[1].split("\n")
    assert len(lines) == 31 and all(NEEDLE.fullmatch(line) for line in lines)
    every = [made("niah_single_1", 30, seed=seed).context.split("\n") for seed in range(30)]
    assert len({i for text in every for i, line in enumerate(text) if NEEDLE.fullmatch(line)}) > 10


def test_variables_form_one_chain_in_order() -> None:
    for seed in range(5):
        sample = made("vt", 40, seed=seed)
        example, _, rest = sample.context.partition("\n\n\n")
        text = rest.partition("\n\n")[2]
        found = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+)$", text, re.MULTILINE)
        assert len(found) == 5 and text.count(NOISE) == 40
        assert re.fullmatch(r"[1-9]\d{4}", found[0][1])
        assert [value for _, value in found[1:]] == [name for name, _ in found[:-1]]
        assert sample.answers == tuple(name for name, _ in found)
        assert found[0][1] in sample.question and len(set(sample.answers)) == 5
        shown = re.findall(r"^VAR ([A-Z]{3}) = ", example, re.MULTILINE)
        assert len(shown) == 5 and example.endswith(" ".join(shown))


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(4096, 30, 3, (40, 10, 3)), (2048, 6, 1, (20, 3, 1))])
def test_common_words_are_counted_as_in_the_benchmark(
    length: int, often: int, seldom: int, shown: tuple[int, int, int]
) -> None:
    for units in (50, 400):
        sample = made("cwe", units, length)
        example, _, rest = sample.context.partition("\n\n\n")
        for text, (different, high, low), common in (
            (rest, (units, often, seldom), sample.answers),
            (example.partition("\n\nQuestion")[0], shown, re.findall(r"\d+\. (\S+)", example.rpartition(":")[2])),
        ):
            counted = Counter(re.findall(r"\d+\. (\S+)", text))
            assert len(counted) == different and len(common) == 10
            assert sorted(counted.values()) == sorted([high] * 10 + [low] * (different - 10))
            assert {word for word, count in counted.items() if count == high} == set(common)
        numbers = [int(number) for number in re.findall(r"(\d+)\. ", rest)]
        assert numbers == list(range(1, 10 * often + (units - 10) * seldom + 1))


def test_frequent_words_follow_zipfs_law() -> None:
    sample = made("fwe", 3000)
    counted = Counter(sample.context.partition("\n\n")[2].split())
    ranked = counted.most_common()
    assert ranked[0][0] == "...." and tuple(word for word, _ in ranked[1:4]) == sample.answers
    zeta = sum(k**-2 for k in range(1, 200_000))
    assert [count for _, count in ranked[:20]] == pytest.approx([3000 / (k * k) / zeta for k in range(1, 21)], abs=1)
    assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked[1:])
    assert len(counted) <= 4096 // 50


def test_joined_words_differ_and_grow_a_third_part() -> None:
    draw = random.Random(0)
    two = joined_words(draw, 3000)
    assert len(set(two)) == 3000 and all(word.count("-") == 1 for word in two)
    many = joined_words(draw, len(NOUNS) * 40)
    assert len(set(many)) == len(many) and many[0].count("-") == 2


@pytest.mark.parametrize("name", [name for name in RULER if not name.startswith("qa")])
def test_prompts_have_nearly_the_length_and_separate_questions(name: str, model: LoadedModel) -> None:
    task = parse_task(f"ruler/{name}(length=1500,items=3)")
    first = task.examples(model, cell(f"ruler/{name}"), Quality())  # type: ignore[attr-defined]
    again = task.examples(model, cell(f"ruler/{name}"), Quality())  # type: ignore[attr-defined]
    assert [example.prompt for example in first] == [example.prompt for example in again]
    assert len({example.prompt for example in first}) == 3
    room = 1500 - SETS[name].max_new
    for example in first:
        tokens = len(Words()(example.prompt + example.stub)["input_ids"])
        assert room - 60 < tokens <= room
        assert example.prompt.endswith(example.question) and example.question.startswith("\n")
    other = task.examples(model, cell(f"ruler/{name}", seed=1), Quality(limit=1))  # type: ignore[attr-defined]
    assert len(other) == 1 and other[0].prompt != first[0].prompt


@pytest.mark.parametrize("room", [3, 10, 57, 1000, 12345])
@pytest.mark.parametrize("guess", [1, 9, 500, 10**6])
@pytest.mark.parametrize("most", [None, 40])
def test_most_units_finds_the_largest_number_that_fits(room: int, guess: int, most: int | None) -> None:
    asked: list[int] = []

    def tokens(units: int) -> int:
        asked.append(units)
        return 2 + 7 * units + units // 10

    found = most_units(tokens, room, 1, most, guess)
    fits = [units for units in range(1, (most or 3000) + 1) if 2 + 7 * units + units // 10 <= room]
    if not fits:
        assert found is None
    else:
        assert found is not None and fits[-1] * 0.99 - 1 <= found <= fits[-1]
    assert len(asked) < 40


def official(text: str, references: list[str], part: bool) -> float:
    """The benchmark's rule, from its description: case-insensitive containment; the mean or best over references."""
    cleaned = "".join("\n" if ord(char) < 32 else char for char in text.strip()).strip()
    found = [1.0 if reference.lower() in cleaned.lower() else 0.0 for reference in references]
    return max(found) if part else sum(found) / len(found)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (" 1234567 and 7654321.", ["1234567", "7654321", "1111111"]),
        ("", ["x"]),
        ("ABCDE\tFGHIJ", ["abcde", "fghij"]),
        ("the Eiffel TOWER", ["eiffel tower", "Tower"]),
        ("no\x07thing", ["nothing", "no\nthing"]),
    ],
)
def test_fixed_answers_score_as_the_official_rule(text: str, answers: list[str]) -> None:
    for part in (False, True):
        assert string_match(text, answers, part=part) == official(text, answers, part)
    for name, rule in SETS.items():
        assert rule.part == name.startswith("qa_")
        item = {"text": text, "answers": answers}
        assert parse_task(f"ruler/{name}").scores(item) == {"score": official(text, answers, rule.part)}  # type: ignore[attr-defined]


def test_answer_lengths_are_the_benchmarks() -> None:
    assert {name: one.max_new for name, one in SETS.items()} == {
        **dict.fromkeys((name for name in RULER if name.startswith("niah")), 128),
        "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32,
    }  # fmt: skip


# files

NIAH = (
    "Some special magic numbers are hidden within the following text.\nA. B.\nWhat are all the special magic numbers "
    "for x mentioned in the provided text? The special magic numbers for x mentioned in the provided text are"
)
QA = (
    "Answer the question based on the given documents.\n\nDocument 1:\nZ\n\nAnswer the question based on the given "
    "documents. Only give me the answer.\n\nQuestion: Who? Answer:"
)


def written(folder: Path, *rows: Any, name: str = "validation.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def examples(model: LoadedModel, task: str, path: str, limit: int = 0) -> list[Any]:
    quality = Quality(limit=limit, data={task.partition("(")[0]: path})
    found: list[Any] = parse_task(task).examples(model, cell(task), quality)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("task", "text", "question"),
    [("ruler/niah_single_1", NIAH, "\nWhat are all"), ("ruler/qa_1", QA, "\n\nAnswer the question")],
)
def test_the_benchmarks_prompts_are_used_byte_for_byte(
    tmp_path: Path, model: LoadedModel, task: str, text: str, question: str
) -> None:
    prefix = text[text.rindex(" The special" if "niah" in task else " Answer:") :]
    rows = [
        {"index": 0, "input": text, "outputs": ["7"], "length": 40},
        {"index": 1, "input": text[: -len(prefix)], "outputs": ["7", "8"], "answer_prefix": prefix},
        {"index": 2, "input": "No mark at all", "outputs": ["7"]},
    ]
    joined, apart, bare = examples(model, task, written(tmp_path, *rows))
    for example in (joined, apart):
        assert example.prompt + example.stub == text
        assert example.question.startswith(question) and example.stub == prefix
    assert (bare.prompt, bare.question, bare.stub) == ("No mark at all", "", "")
    assert [example.keep["answers"] for example in (joined, apart)] == [["7"], ["7", "8"]]


def test_the_leaderboards_form_is_read_for_its_own_task(tmp_path: Path, model: LoadedModel) -> None:
    row = {"context": "A. B.", "question": "Which?\n", "answer_prefix": "It is", "answer": ["7"], "task": "vt"}
    path = written(tmp_path, row, row | {"task": "cwe"}, row | {"context": "C.\n"})
    first, second = examples(model, "ruler/vt", path)
    assert (first.prompt, first.question, first.stub) == ("A. B.\nWhich?\n", "Which?\n", "It is")
    assert second.prompt == "C.\nWhich?\n"
    with pytest.raises(DataError, match="no records of the task 'fwe'"):
        examples(model, "ruler/fwe", path)


SQUAD = {
    "version": "v2.0",
    "data": [
        {"title": f"T{n}", "paragraphs": [
            {"context": f"Text {n}.{p}", "qas": [
                {"id": "a", "question": f"Q {n}.{p}?", "answers": [{"text": f"A{n}{p}", "answer_start": 0}],
                 "is_impossible": False},
                {"id": "b", "question": "None?", "answers": [], "is_impossible": True},
            ]} for p in range(3)
        ]} for n in range(4)
    ],
}  # fmt: skip


def test_squad_takes_the_articles_own_paragraphs_first(tmp_path: Path, model: LoadedModel) -> None:
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(SQUAD))
    found = examples(model, "ruler/qa_1(length=110,items=20)", str(path))
    assert len(found) == 12
    for number, example in enumerate(found):
        article, paragraph = divmod(number, 3)
        told = re.findall(r"Text (\d)\.(\d)", example.prompt)
        assert (str(article), str(paragraph)) in told and len(set(told)) == len(told)
        others = [each for each in told if each[0] != str(article)]
        assert not others or len(told) - len(others) == 3
        assert example.keep["answers"] == [f"A{article}{paragraph}"]
        assert example.question.endswith(f"Question: Q {article}.{paragraph}?")
    everything = examples(model, "ruler/qa_1(length=4000,items=1)", str(path))[0].prompt
    assert sorted(re.findall(r"Document (\d+):", everything), key=int) == [str(i) for i in range(1, 13)]


def test_hotpotqa_keeps_all_paragraphs_of_a_question(tmp_path: Path, model: LoadedModel) -> None:
    rows = [
        {"_id": str(n), "question": f"Q{n}?", "answer": f"A{n}", "supporting_facts": [["P", 0]],
         "context": [[f"P{n}{i}", ["One. ", "Two."]] for i in range(10)]}
        for n in range(3)
    ]  # fmt: skip
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(rows))
    for number, example in enumerate(examples(model, "ruler/qa_2(length=260)", str(path))):
        told = re.findall(r"Document \d+:\nP(\d)(\d)\nOne\. Two\.", example.prompt)
        assert {place for own, place in told if own == str(number)} == set("0123456789")
        assert len(told) > 10


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"input": NIAH, "outputs": "7"}], "line 1, field 'outputs'"),
        ([{"input": NIAH, "outputs": []}], "line 1, field 'outputs'"),
        ([{"input": NIAH, "outputs": ["7", " "]}], "line 1, field 'outputs' is malformed: it holds an empty answer"),
        ([{"input": NIAH, "outputs": ["7"]}, {"input": " ", "outputs": ["7"]}], "line 2, field 'input'.*empty"),
        ([{"input": "x " * 9000, "outputs": ["7"]}], "line 1, field 'input'.*its prompt has 9000 tokens"),
        ([{"context": "C", "question": " ", "answer": ["7"]}], "line 1, field 'question' is malformed: it is empty"),
        ([{"context": "C", "question": "Q", "answer": "7"}], "line 1, field 'answer'"),
        ([{"prompt": "C"}], "in no form that ruler/vt knows"),
        ([], "has no records"),
    ],
)
def test_a_malformed_file_names_line_and_field(tmp_path: Path, model: LoadedModel, rows: list[Any], words: str) -> None:
    path = written(tmp_path, *rows)
    with pytest.raises(DataError, match=words) as caught:
        examples(model, "ruler/vt", path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_fit_is_said(tmp_path: Path, model: LoadedModel) -> None:
    for task, error, words in (
        ("ruler/qa_1", DataError, "needs a file.*--data ruler/qa_1=FILE"),
        ("ruler/vt(length=9000)", UsageError, r"does not fit .*ruler/vt\(length=8192\)"),
        ("ruler/vt(length=200)", UsageError, "the length 200 is too short for ruler/vt"),
    ):
        with pytest.raises(error, match=words):
            parse_task(task).examples(model, cell(task), Quality())  # type: ignore[attr-defined]


def test_the_whole_task_runs_and_its_suite_names_known_tasks(model: LoadedModel) -> None:
    small = dataclasses.replace(model, tokenizer=Bytes(), context=4096)
    found = evaluate(small, cell("ruler/vt(length=2200,items=2)", "streaming", "0.25"), Quality(batch=2), quiet)
    assert found.values["score"].value == 0 and len(found.items) == 2
    assert found.values["gold_bpb"].value is not None
    assert all(parse_task(task).name.startswith("ruler/") for task in load_suite(str(SUITE)).axes.task)
