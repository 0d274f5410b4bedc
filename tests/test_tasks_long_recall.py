"""Long recall: the text between prompt and answer is decoded token by token."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from test_tasks_loop import Bytes, cell, quiet

from d2obench.cache import Session
from d2obench.errors import UsageError
from d2obench.models import LoadedModel
from d2obench.suite.definition import Quality, load_suite
from d2obench.tasks import evaluate, parse_task
from d2obench.tasks.long_recall import ASK, REPEAT

SUITE = Path(__file__).parent.parent / "suites" / "long-decoding.toml"


@pytest.fixture
def model(tiny: LoadedModel) -> LoadedModel:
    return dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=4096)


def test_a_fact_of_the_decoded_text_is_asked_for(model: LoadedModel) -> None:
    """The prompt and the decoded tokens are the whole text, and the fact is stated once in what is decoded."""
    task = parse_task("long-recall(items=4,steps=900)")
    batches = task.batches(model, cell("long-recall"), Quality(batch=3))
    assert [list(batch.places) for batch in batches] == [[0, 1, 2], [3]]
    depths = []
    for example, prompt in (pair for batch in batches for pair in batch.texts):
        text = bytes(prompt.ids).decode()
        read, decoded = text[:-900], text[-900:]
        assert read.startswith(ASK) and len(ASK) <= len(read) < len(ASK) + 200
        chronicle, _, stub = text.removeprefix(ASK).rpartition(REPEAT)
        sentence = f"{stub} {example.keep['gold']}."
        assert chronicle.count(sentence) == 1 and sentence in decoded
        depths.append(example.keep["depth"])
    assert min(depths) < 0.2 and max(depths) > 0.4


def test_decoding_it_by_hand_gives_the_same_figures(model: LoadedModel) -> None:
    """One sequence of a batch against a session of its own: prompt, compression, 300 steps, then the right answer."""
    point = cell("long-recall(items=2,steps=300)", "h2o(protect=prompt)", "0.25")
    found = evaluate(model, point, Quality(batch=2), quiet)
    (batch,) = parse_task("long-recall(items=2,steps=300)").batches(model, point, Quality(batch=2))
    for item, (example, prompt) in zip(found.items, batch.texts, strict=True):
        session = Session(model, "h2o(protect=prompt)", "0.25", max_new=310)
        session.prefill([prompt.ids[:-300]])
        session.compress()
        for token in prompt.ids[-300:]:
            logits = session.step(torch.tensor([token]))
        total = 0.0
        for token in f" {example.keep['gold']}".encode():
            total += float(logits[0].log_softmax(-1)[token])
            logits = session.step(torch.tensor([token]))
        assert item["gold_logprob"] == pytest.approx(total, abs=2e-3)
        assert item["gold_bpb"] == pytest.approx(-total / math.log(2) / item["gold_bytes"], abs=2e-3)
        assert (item["decoded"], item["prompt_tokens"], item["kept"]) == (300, len(prompt.ids) - 300, 1.0)
        held = session.footprint().held
        assert {layer[0] for layer in held} == {float(item["prompt_tokens"] + round(0.25 * 310))}
    assert "keeps more than asked" not in found.details.get("flags", ())


def test_steps_that_do_not_fit_say_how_many_do(model: LoadedModel) -> None:
    with pytest.raises(UsageError, match=r"for example long-recall\(steps=3\d\d\d\)"):
        parse_task("long-recall(steps=5000)").batches(model, cell("long-recall"), Quality())


def test_the_suite_protects_every_prompt() -> None:
    suite = load_suite(str(SUITE))
    assert all(policy == "full" or "protect=prompt" in policy for policy in suite.axes.policy)
    assert [parse_task(task).name for task in suite.axes.task] == ["long-recall"]
