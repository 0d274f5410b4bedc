"""The shared loop of generative tasks, and fidelity, on a tiny random model, against transformers' own generate()."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from tiny_families import tiny_model

from d2obench.errors import DataError, ModelError, UsageError
from d2obench.models import LoadedModel
from d2obench.record import Axes, dump
from d2obench.suite.definition import Quality
from d2obench.tasks import evaluate, fidelity, read_cell, rescore
from d2obench.tasks.base import Cell
from d2obench.tasks.generate import end_tokens, generate
from d2obench.tasks.prompts import Example, Limits, encode


class Bytes:
    """A tokenizer of bytes; no byte ends a text unless ``eos_token_id`` says so."""

    chat_template: str | None = None

    def __init__(self, eos: int | None = None) -> None:
        self.eos_token_id = eos

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*text.encode()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("latin-1")


class ChatBytes(Bytes):
    chat_template = "x"

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> str:
        return f"<user>{turns[0]['content']}</user>\n"


@pytest.fixture
def model(tiny: LoadedModel) -> LoadedModel:
    return dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=4096)


def cell(task: str, policy: str = "full", budget: str | None = None, shape: str | None = None, seed: int = 0) -> Cell:
    return read_cell({"axes": Axes(task, "tiny", "float32", "cpu", policy, budget, shape, None, seed)})


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


PROMPTS = [
    "A ferry left the harbour at noon.",
    "Two.",
    "What did the mayor of Torvale say about the rope and the salt?",
]


def reference(model: LoadedModel, prompt: str, count: int) -> list[int]:
    ids = torch.tensor([[*prompt.encode()]])
    out = model.model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [int(token) for token in out[0, ids.shape[1] :]]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_full_cache_answers_are_those_of_generate(model: LoadedModel, batch: int) -> None:
    examples = [Example(str(i), str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    items = generate(model, cell("gsm8k"), examples, Limits(max_new=12), batch, quiet)
    assert [item["id"] for item in items] == ["0", "1", "2"]
    for item, prompt in zip(items, PROMPTS, strict=True):
        assert item["text"] == model.tokenizer.decode(reference(model, prompt, 12))
        assert (item["generated"], item["ended"]) == (12, "length")


def test_each_sequence_stops_for_itself(model: LoadedModel) -> None:
    ids = [reference(model, prompt, 12) for prompt in PROMPTS]
    end = ids[0][3]
    model.tokenizer.eos_token_id = end
    items = generate(model, cell("gsm8k"), [Example(p, p, p) for p in PROMPTS], Limits(max_new=12), 3, quiet)
    for item, tokens in zip(items, ids, strict=True):
        length = tokens.index(end) if end in tokens else 12
        assert item["generated"] == length
        assert item["text"] == model.tokenizer.decode(tokens[:length])
        assert item["ended"] == ("end" if end in tokens else "length")
    assert end_tokens(model) >= {end}


def test_stop_strings_cut_the_answer(model: LoadedModel) -> None:
    ids = reference(model, PROMPTS[0], 12)
    text = model.tokenizer.decode(ids)
    stop = text[4:6]
    (item,) = generate(model, cell("gsm8k"), [Example("0", "0", PROMPTS[0])], Limits(12, (stop,)), 1, quiet)
    assert item["text"] == text.lstrip()[: text.lstrip().index(stop)]
    assert item["ended"] == "stop"
    assert item["generated"] < 12


def test_gold_log_probability_is_the_models_own(model: LoadedModel) -> None:
    candidates = [("harbour", "sea!"), ("x",), ("a longer answer than the others",)]
    examples = [Example(p, p, p, "", c) for p, c in zip(PROMPTS, candidates, strict=True)]
    items = generate(model, cell("gsm8k"), examples, Limits(max_new=40), 3, quiet)
    for item, prompt, golds in zip(items, PROMPTS, candidates, strict=True):
        found = item.get("candidate_logprobs", [item["gold_logprob"]])
        for value, gold in zip(found, golds, strict=True):
            ids = torch.tensor([[*(prompt + gold).encode()]])
            with torch.no_grad():
                logp = model.model(ids, use_cache=False).logits[0].log_softmax(-1)
            first = len(prompt) - 1
            wanted = sum(float(logp[first + i, token]) for i, token in enumerate(gold.encode()))
            assert value == pytest.approx(wanted, abs=2e-3)
        assert item["gold_bpb"] == pytest.approx(-item["gold_logprob"] / math.log(2) / len(golds[0]))
        # Scoring candidates first leaves no trace in what is generated after.
        assert item["text"] == model.tokenizer.decode(reference(model, prompt, 40))


def test_a_long_prompt_loses_its_middle(model: LoadedModel) -> None:
    small = dataclasses.replace(model, context=120)
    body = "".join(f"{i:03d} " for i in range(100))
    prompt = encode(small, Example("0", "0", body, " stub", ("gold",)), Limits(max_new=20))
    text = small.tokenizer.decode(prompt.ids)
    assert prompt.truncated
    assert len(prompt.ids) == 100
    assert text.startswith("000 001 ")
    assert text.endswith("098 099  stub")
    assert "050" not in text
    assert not encode(model, Example("0", "0", body), Limits()).truncated
    with pytest.raises(UsageError, match="leaves 10 for the prompt"):
        encode(dataclasses.replace(model, context=30), Example("0", "0", body), Limits(max_new=20))


def test_chat_template_is_used_where_there_is_one(model: LoadedModel) -> None:
    chat = dataclasses.replace(model, tokenizer=ChatBytes())
    example = Example("0", "0", "Who?", " It was", (" Otto",))
    assert chat.tokenizer.decode(encode(chat, example, Limits()).ids) == "<user>Who?</user>\nIt was"
    assert chat.tokenizer.decode(encode(chat, example, Limits(chat=False)).ids) == "Who? It was"
    assert encode(chat, Example("0", "0", "Who?", "", (" Otto",)), Limits()).candidates == [[*b"Otto"]]


def test_fidelity_of_the_full_cache_is_perfect_and_its_nll_the_models(model: LoadedModel) -> None:
    found = evaluate(model, cell("fidelity(documents=2)", shape="96+8"), Quality(), quiet)
    assert found.values["kl"].value == 0
    assert found.values["top1"].value == 1
    assert [len(item["nll"]) for item in found.items] == [8, 8]
    from d2obench.texts.writer import token_ids

    ids = token_ids(0, 105, lambda text: [*text.encode()], "fidelity")
    with torch.no_grad():
        logp = model.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    wanted = [-float(logp[96 + i, ids[97 + i]]) for i in range(8)]
    assert found.items[0]["nll"] == pytest.approx(wanted, abs=1e-4)
    assert found.values["ppl"].value == pytest.approx(math.exp(found.values["nll"].value or 0))


def test_fidelity_sees_a_smaller_cache_and_needs_the_full_one_once(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity._FULL.clear()
    asked = []
    steps = fidelity._steps

    def counted(*args: Any) -> Any:
        asked.append(args[6:] or args[1].axes.policy)
        return steps(*args)

    monkeypatch.setattr(fidelity, "_steps", counted)
    kl = {}
    for budget in ("0.1", "0.5", "1.0"):
        point = cell("fidelity(documents=3)", "streaming", budget, "128+6")
        found = evaluate(model, point, Quality(batch=2), quiet)
        kl[budget] = found.values["kl"].value
    assert kl["0.1"] > kl["0.5"] > kl["1.0"] >= 0
    assert kl["1.0"] < 1e-5
    assert found.values["budget_effective"].value == 1
    assert asked.count(("full",)) == 2  # two batches, each once
    kept = evaluate(model, cell("fidelity(documents=3)", "streaming", "0.1", "128+6"), Quality(batch=2), quiet)
    fidelity._FULL.clear()
    monkeypatch.setattr(fidelity, "MEMORY", 0)
    lockstep = evaluate(model, cell("fidelity(documents=3)", "streaming", "0.1", "128+6"), Quality(batch=2), quiet)
    assert lockstep.values == kept.values
    assert not fidelity._FULL


@pytest.mark.parametrize("task", ["fidelity(documents=2)", "recall(items=2)"])
def test_what_was_kept_is_recorded(model: LoadedModel, task: str) -> None:
    found = evaluate(model, cell(task, "streaming", "0.25", "320+8"), Quality(), quiet)
    assert [item["kept"] for item in found.items] == pytest.approx([0.25, 0.25], abs=0.01)
    assert found.values["budget_effective"].value == pytest.approx(0.25, abs=0.01)


def test_fidelity_reads_the_users_text(model: LoadedModel, tmp_path: Any) -> None:
    path = tmp_path / "own.txt"
    path.write_text("One day the ferry came late. " * 20)
    quality = Quality(data={"fidelity": str(path)})
    found = evaluate(model, cell("fidelity", shape="64+4"), quality, quiet)
    assert len(found.items) == 4
    assert found.details["text"] == "own.txt"
    path.write_text("short")
    with pytest.raises(DataError, match=r"too short for this shape: it has 5 tokens and one document takes 69"):
        evaluate(model, cell("fidelity", shape="64+4"), quality, quiet)


@pytest.mark.parametrize("task", ["recall(items=3)", "needle(contexts=[700],depths=[0,0.5,1])"])
def test_generated_tasks_fill_their_prompt(model: LoadedModel, task: str) -> None:
    shape = "700+16" if task.startswith("recall") else None
    found = evaluate(model, cell(task, shape=shape), Quality(), quiet)
    assert len(found.items) == 3
    for item in found.items:
        assert 560 < item["prompt_tokens"] <= 700
        assert 0 <= item["score"] <= 1
        assert item["gold_bpb"] > 0
    assert found.values["score"].n == 3
    again = evaluate(model, cell(task, shape=shape), Quality(batch=1), quiet)
    assert [item["text"] for item in again.items] == [item["text"] for item in found.items]
    other = evaluate(model, cell(task, shape=shape, seed=1), Quality(limit=1), quiet)
    assert len(other.items) == 1
    assert other.items[0]["prompt_digest"] != found.items[0]["prompt_digest"]


def test_needles_stand_at_their_depth_and_in_the_heatmap(model: LoadedModel) -> None:
    from d2obench.tasks import parse_task

    task = parse_task("needle(contexts=[900,99999],depths=[0,0.5,1],needles=2,kind=word)")
    texts = [example.prompt for example in task.examples(model, cell("needle"), Quality())]
    assert len(texts) == 3
    for text, depth in zip(texts, (0, 0.5, 1), strict=True):
        body = text.partition("\n\n")[2].rpartition("\n\nQuestion")[0]
        places = [i for i in range(len(body)) if body.startswith("The secret word of", i)]
        assert len(places) == 2
        assert places[0] / len(body) == pytest.approx(depth, abs=0.25)
    found = evaluate(model, cell("needle(contexts=[900,99999],depths=[0,1])"), Quality(), quiet)
    assert found.details["left_out"] == [99999]
    assert [(point["context"], point["depth"]) for point in found.details["grid"]] == [(900, 0), (900, 1)]
    with pytest.raises(UsageError, match="no context of the task needle fits"):
        evaluate(model, cell("needle(contexts=[99999])"), Quality(), quiet)


def test_scores_are_made_again_from_what_is_recorded(model: LoadedModel, tmp_path: Any) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"How many are {i}?", "answer": f"#### {i}"}) + "\n" for i in range(5))
    )
    found = evaluate(model, cell("gsm8k(max_new=8)"), Quality(limit=4, data={"gsm8k": str(path)}), quiet)
    items = json.loads(dump(found.items))
    assert rescore("gsm8k(max_new=8)", items) == found.values
    items[0]["text"] = "#### 0"
    assert rescore("gsm8k", items)["score_strict"].value == pytest.approx(1 / 4)


def test_a_model_without_sense_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ModelError, match="random"):
        evaluate(tiny, cell("recall", shape="256+8"), Quality(), quiet)


@pytest.mark.parametrize(("task", "shape", "words"), [
    ("recall", "40+8", "too short for this task"),
    ("recall", "4096+8", "does not fit the context"),
    ("fidelity", "4096+8", "longer than the context"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_one_line(model: LoadedModel, task: str, shape: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate(model, cell(task, shape=shape), Quality(), quiet)


@pytest.mark.model
def test_the_real_model_answers_as_generate_does(embedded: LoadedModel) -> None:
    prompts = ["What is the capital of France?", "Name three colours of the rainbow.", "Write one sentence about tea."]
    examples = [Example(p, p, p, candidates=("Paris is.",)) for p in prompts]
    items = generate(embedded, cell("gsm8k"), examples, Limits(max_new=16), 3, quiet)
    for item, example in zip(items, examples, strict=True):
        ids = torch.tensor([encode(embedded, example, Limits(max_new=16)).ids])
        out = embedded.model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        assert item["text"] == embedded.tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("policy", "budget", "more"),
    [
        ("h2o", "0.4", False), ("d2o", "0.4", False), ("snapkv(window=4)", "0.4", True),
        ("snapkv(window=4,decode=slide)", "0.4", False), ("d2o(preset=released)", "0.4", True),
        ("snapkv", "1.0", False),
    ],
)  # fmt: skip
def test_keeping_more_than_asked_is_flagged(model: LoadedModel, policy: str, budget: str, more: bool) -> None:
    found = evaluate(model, cell("fidelity(documents=2)", policy, budget, "64+8"), Quality(), quiet)
    assert ("keeps more than asked" in found.details.get("flags", ())) is more


def test_a_policy_that_carries_thresholds_begins_each_cell_without_any() -> None:
    """The second cell of a process is the first one; the documents of one cell differ by what they carry."""
    model = dataclasses.replace(tiny_model("llama-deep"), tokenizer=Bytes(), has_sense=True, context=4096)
    found = [
        evaluate(model, cell("fidelity(documents=3)", policy, "0.3", "96+8"), Quality(batch=1), quiet)
        for policy in ("d2o(preset=released)", *2 * ["d2o(preset=released,carry_threshold=true)"])
    ]
    alone, first, second = ([item["kl"] for item in evaluation.items] for evaluation in found)
    assert first == second
    assert first[0] == alone[0] and first[1:] != alone[1:]
