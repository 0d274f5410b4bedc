"""``query=unseen``: the context is compressed alone, and the question is read as a turn after that."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from test_tasks_loop import Bytes, ChatBytes, cell, quiet
from tiny_families import prompts, tiny_model

import d2obench
from d2obench.attention.interface import keyword
from d2obench.cache import Session
from d2obench.errors import DataError, UsageError
from d2obench.external import open_session
from d2obench.models import LoadedModel
from d2obench.policies import parse_choice
from d2obench.suite.definition import Quality
from d2obench.tasks import evaluate, parse_task, rescore
from d2obench.tasks.generate import Context, contexts_of, encode_all, generate, rounds_of
from d2obench.tasks.prompts import Example, Limits, encode, encode_unseen

POLICIES = [
    "full", "streaming", "h2o", "roco", "snapkv(window=4)", "tova", "d2o", "d2o(preset=mass)", "d2o(preset=released)",
    "h2o+quant(bits=8)",
]  # fmt: skip


@pytest.fixture
def model(tiny: LoadedModel) -> LoadedModel:
    return dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=4096)


def budget_of(policy: str) -> str | None:
    return "0.3" if parse_choice(policy).takes_budget else None


def by_hand(loaded: LoadedModel, policy: str, context: list[int], question: list[int], count: int) -> list[int]:
    """Feeds the context to a cache, compresses it, and lets transformers read the question and answer."""
    model: Any = loaded.model
    held = d2obench.cache(policy, budget_of(policy), model=model, max_new=count)
    with torch.inference_mode():
        model(torch.tensor([context]), **{keyword(model): held})
        held.compress()
        read = [*context]
        if policy == "d2o(preset=released)":  # compresses with the first token after the prompt
            model(torch.tensor([question[:1]]), **{keyword(model): held})
            read.append(question[0])
        out = model.generate(
            torch.tensor([[*context, *question]]), **{keyword(model): held}, max_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return [int(token) for token in out[0, len(context) + len(question) :]]


@pytest.mark.parametrize("policy", POLICIES)
def test_unseen_is_what_one_does_by_hand(model: LoadedModel, policy: str) -> None:
    context = "A ferry left the harbour at noon, and the mayor of Torvale spoke about the rope and the salt. " * 2
    questions = ["Who spoke? ", "What left the harbour? ", "When did? ", "Who spoke? Who? "]
    examples = [Example(str(i), "0", context + text, question=text) for i, text in enumerate(questions)]
    other = "Nobody in Fen Ketling had ever seen a boat that large. " * 3
    examples.append(Example("4", "1", other + questions[0], question=questions[0]))
    point = cell("gsm8k", policy, budget_of(policy))
    items = generate(model, point, examples, Limits(max_new=8), 2, quiet, unseen=True)
    for item, example in zip(items, examples, strict=True):
        expected = by_hand(model, policy, [*example.context.encode()], [*example.question.encode()], 8)
        assert item["text"] == model.tokenizer.decode(expected)
    assert len({item["context_digest"] for item in items}) == 2


@pytest.mark.parametrize("family", ["gemma3", "falcon", "gpt-neox", "qwen3"])
def test_a_turn_of_a_session_is_that_of_generate(family: str) -> None:
    """In families with sliding layers and in those whose own code attends; two sequences padded to one length."""
    loaded, texts, questions = tiny_model(family), prompts(40, 33), prompts(7, 7, seed=3)
    for policy in ("h2o", "full", "d2o"):
        session = Session(loaded, policy, budget_of(policy), max_new=4)
        session.prefill(texts)
        session.compress()
        logits = session.turn(questions)
        answers = [logits.argmax(-1)]
        for _ in range(3):
            answers.append(session.step(answers[-1]).argmax(-1))
        for row, found in enumerate(torch.stack(answers, 1).tolist()):
            assert found == by_hand(loaded, policy, texts[row], questions[row], 4)


@pytest.mark.parametrize("policy", ["h2o", "d2o", "full", "snapkv(window=4)", "hf-dynamic", "hf-static"])
def test_a_fork_is_independent(tiny: LoadedModel, policy: str) -> None:
    session = open_session(tiny, policy, budget_of(policy) if "hf-" not in policy else None, max_new=8)
    session.prefill(prompts(40, 33, 50))
    session.compress()
    first = session.fork([0, 2, 2])
    questions = prompts(5, 5, 5, seed=4)
    found = first.turn(questions)
    again = session.fork([0, 2, 2]).turn(questions)
    assert torch.equal(found, again), "the first fork left no trace"
    assert first.footprint().prompt_tokens == [45, 55, 55]
    assert session.footprint().prompt_tokens == [40, 33, 50]
    whole = session.turn([questions[0], questions[0], questions[1]])
    assert torch.allclose(whole[0], found[0], atol=1e-5)
    assert torch.allclose(whole[2], found[1], atol=1e-5)


@pytest.mark.parametrize("policy", ["expected(decode=slide)", "duo", "h2o"])
def test_a_fork_goes_on_with_the_statistics_of_its_own_sequences(tiny: LoadedModel, policy: str) -> None:
    """Its turn is compressed again, by what is known of the queries of its sequence from the prompt on."""
    texts, question = prompts(40, 40, 40), prompts(9, seed=4)
    several, alone = (Session(tiny, policy, budget_of(policy), max_new=8) for _ in range(2))
    for session, read in ((several, texts), (alone, texts[2:])):
        session.prefill(read)
        session.compress()
    forked, found = several.fork([2]), []
    for session in (forked, alone):
        logits = [session.turn(question)]
        logits += [session.step(torch.tensor([token])) for token in (3, 5, 7)]
        found.append(torch.stack(logits))
    assert torch.allclose(*found, atol=1e-5)
    assert forked.footprint().kept == alone.footprint().kept


def test_seen_and_unseen_have_the_same_tokens_and_differ_in_where_they_split(model: LoadedModel) -> None:
    chat = dataclasses.replace(model, tokenizer=ChatBytes())
    question = "\n\nQuestion: who?\nAnswer:"
    example = Example("0", "0", "Otto was there." + question, " It was", (" Otto",), question=question)
    seen = encode(chat, example, Limits())
    (unseen,) = encode_unseen(chat, [example], Limits())
    assert unseen.ids == seen.ids
    assert bytes(unseen.context) == b"<user>Otto was there."
    assert bytes(unseen.question) == b"\n\nQuestion: who?\nAnswer:</user>\nIt was"
    assert (seen.asked, seen.question) == (1, [*b"s"])
    assert unseen.candidates == seen.candidates


class Pairs(Bytes):
    """Joins two bytes to one token, so that a token can reach from the context into the question."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        data = text.encode()
        return {"input_ids": [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return b"".join(token.to_bytes(2, "big") if token > 255 else bytes([token]) for token in ids).decode("latin-1")


def test_a_token_that_reaches_into_the_question_belongs_to_it(model: LoadedModel) -> None:
    pairs = dataclasses.replace(model, tokenizer=Pairs())
    (prompt,) = encode_unseen(pairs, [Example("0", "0", "abcWho?!", question="Who?!")], Limits())
    assert pairs.tokenizer.decode(prompt.context) == "ab"
    assert pairs.tokenizer.decode(prompt.question) == "cWho?!"


def test_a_context_that_is_too_long_loses_its_middle_and_no_question_is_cut(model: LoadedModel) -> None:
    small = dataclasses.replace(model, context=160)
    context = "".join(f"{i:03d} " for i in range(100))
    examples = [Example(str(i), "0", context + q, question=q) for i, q in enumerate(("Who?", "Who was it then?"))]
    found = encode_all(small, examples, Limits(max_new=20), unseen=True)
    assert [prompt.truncated for prompt in found] == [True, True]
    assert found[0].context == found[1].context, "one context for both questions"
    assert len(found[1].ids) == 140
    assert [bytes(prompt.question).decode() for prompt in found] == ["Who?", "Who was it then?"]
    text = bytes(found[0].context).decode()
    assert text.startswith("000 001 ")
    assert text.endswith("098 099 ")
    long = "Who was it? " * 12
    for unseen in (True, False):
        with pytest.raises(
            UsageError, match=r"no room is left for the question of item 7: beside the answer there are"
        ):
            encode_all(small, [Example("7", "0", context + long, question=long)], Limits(max_new=20), unseen=unseen)


@pytest.mark.parametrize(("context", "question", "words"), [
    ("Some text.", "  ", "item 3 has no question"), ("\n", "Who?", "item 3 has no context"),
])  # fmt: skip
def test_what_is_empty_is_named(model: LoadedModel, context: str, question: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        encode_unseen(model, [Example("3", "0", context + question, question=question)], Limits())


def test_rounds_hold_questions_of_one_length() -> None:
    from d2obench.tasks.prompts import Prompt

    sizes = {0: 3, 1: 4, 2: 3, 3: 3, 4: 4, 5: 3}
    asked = [Prompt([*range(10)], [], False, sizes[i]) for i in range(6)]
    contexts = [Context([1], [0, 1, 2]), Context([2], [3, 4, 5])]
    found = rounds_of(contexts, asked)
    assert sorted(pair for pairs in found for pair in pairs) == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    for pairs in found:
        assert len(pairs) <= 2
        assert len({asked[i].asked for _, i in pairs}) == 1
        assert [row for row, _ in pairs] == sorted(row for row, _ in pairs)
    shared = contexts_of([Prompt([1, 2, 3], [], False, 1), Prompt([1, 2, 4, 5], [], False, 2)], shared=True)
    assert shared == [Context([1, 2], [0, 1])]


def stories(path: Path, count: int) -> str:
    story = "Mara kept a fox. The fox was red and ate salt. "
    record = {
        "story": story * 2,
        "questions": ["Who kept it?", "What colour?", "What did it eat?"],
        "answers": {"input_text": ["Mara", "red", "salt"]},
    }
    path.write_text("".join(json.dumps(record | {"story": story * (2 + i)}) + "\n" for i in range(count)))
    return str(path)


def test_coqa_compresses_a_story_once_for_all_its_questions(model: LoadedModel, tmp_path: Path) -> None:
    quality = Quality(data={"coqa": stories(tmp_path / "coqa.jsonl", 2)}, batch=2)
    text = "coqa(turns=all,query=unseen,max_new=4)"
    found = evaluate(model, cell(text, "h2o", "0.3"), quality, quiet)
    assert [item["id"] for item in found.items] == ["0.1", "0.2", "0.3", "1.1", "1.2", "1.3"]
    assert found.values["queries_per_context"].value == 3
    assert found.details["query"] == "unseen"
    assert len({item["context_digest"] for item in found.items}) == 2
    assert rescore(text, found.items) == found.values
    seen = evaluate(model, cell("coqa(turns=all,max_new=4)", "h2o", "0.3"), quality, quiet)
    assert [item["prompt_digest"] for item in seen.items] == [item["prompt_digest"] for item in found.items]
    assert "queries_per_context" not in seen.values


def test_a_compression_is_counted(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    prefill = Session.prefill

    def counted(self: Session, texts: list[list[int]]) -> torch.Tensor:
        read.append([len(text) for text in texts])
        return prefill(self, texts)

    monkeypatch.setattr(Session, "prefill", counted)
    quality = Quality(data={"coqa": stories(tmp_path / "coqa.jsonl", 3)}, batch=2)
    evaluate(model, cell("coqa(turns=all,query=unseen,max_new=4)", "h2o", "0.3"), quality, quiet)
    assert [len(batch) for batch in read] == [2, 1]


def test_every_needle_is_asked_for_from_one_text(model: LoadedModel) -> None:
    text = "needle(contexts=[900],depths=[0.2,0.6],needles=3,ask=each,query=unseen)"
    found = evaluate(model, cell(text, "streaming", "0.3"), Quality(batch=2), quiet)
    assert [item["id"] for item in found.items][:3] == ["900@0.2#0.1", "900@0.2#0.2", "900@0.2#0.3"]
    assert found.values["queries_per_context"].value == 3
    assert all(len(item["gold"]) == 1 and item["prompt_tokens"] <= 900 for item in found.items)
    assert len({item["document"] for item in found.items}) == 2


@pytest.mark.parametrize("task", ["recall(items=2,query=unseen)", "needle(contexts=[700],depths=[0.5],query=unseen)"])
def test_generated_tasks_ask_unseen(model: LoadedModel, task: str) -> None:
    shape = "700+16" if task.startswith("recall") else None
    found = evaluate(model, cell(task, "h2o", "0.3", shape), Quality(), quiet)
    seen = evaluate(model, cell(task.replace(",query=unseen", ""), "h2o", "0.3", shape), Quality(), quiet)
    assert [item["prompt_digest"] for item in found.items] == [item["prompt_digest"] for item in seen.items]
    full = [
        evaluate(model, cell(text, shape=shape), Quality(), quiet).items
        for text in (task, task.replace(",query=unseen", ""))
    ]
    assert [item["text"] for item in full[0]] == [item["text"] for item in full[1]], "the full cache forgets nothing"


def test_lambada_reads_the_last_sentence_unseen(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "lambada.jsonl"
    texts = [
        'It rained. "Who was it?" she asked Otto',
        "A single sentence about the salt",
        "One. Two! Then came the fox",
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    quality = Quality(data={"lambada": str(path)})
    examples = parse_task("lambada(query=unseen)").examples(model, cell("lambada"), quality)  # type: ignore[attr-defined]
    assert [(example.context, example.question) for example in examples] == [
        ('It rained. "Who was it?"', " she asked"), ("One. Two!", " Then came the"),
    ]  # fmt: skip
    path.write_text(json.dumps({"text": texts[1]}) + "\n")
    with pytest.raises(DataError, match="no passage has two sentences"):
        evaluate(model, cell("lambada(query=unseen)"), quality, quiet)


def test_a_set_without_a_question_says_so() -> None:
    with pytest.raises(UsageError, match=r"longbench/gov_report has no question that could be unseen"):
        parse_task("longbench/gov_report(query=unseen)")
    assert parse_task("longbench/qasper(query=unseen)")
    with pytest.raises(UsageError, match="can't use this value of query"):
        parse_task("recall(query=blind)")
    with pytest.raises(UsageError, match="has no parameter 'query'"):
        parse_task("gsm8k(query=unseen)")


def test_a_turn_that_does_not_fit_is_one_line() -> None:
    loaded = tiny_model("llama-gqa2")
    session = Session(loaded, "h2o", "0.3", max_new=8)
    session.prefill(prompts(490))
    session.compress()
    with pytest.raises(UsageError, match="520 prompt and 8 generated tokens are more than"):
        session.turn(prompts(30))
    with pytest.raises(UsageError, match="each needs a text of the same length"):
        session.turn(prompts(3, 3))
    assert tiny_families.VOCAB == 128
    with pytest.raises(UsageError, match="the token id 999 is outside the vocabulary"):
        session.turn([[999, 1]])
