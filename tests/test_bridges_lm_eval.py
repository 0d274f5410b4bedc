"""lm-evaluation-harness over our engine: the full cache against plain forward passes and transformers' generate()."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval", reason="needs the package lm_eval: pip install -e '.[test-all]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from d2obench.bridges.lm_eval import register
from d2obench.bridges.lm_eval_model import CompressedLM, batches, window
from d2obench.errors import D2OBenchError, UsageError
from d2obench.models import LoadedModel

pytestmark = pytest.mark.needs("lm_eval")  # so that -m needs finds it


class Bytes:
    """A tokenizer of bytes; 1 begins a text and 2 ends it."""

    bos_token, eos_token, bos_token_id, eos_token_id = "\x01", "\x02", 1, 2
    chat_template: str | None = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*text.encode("latin-1")]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("latin-1")


@pytest.fixture
def model(tiny: LoadedModel) -> LoadedModel:
    return dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=512)


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def log_probs(model: LoadedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def plain(model: LoadedModel, before: list[int], after: list[int]) -> tuple[float, bool]:
    """Log-probability of ``after`` behind ``before``, by one forward pass without a cache, and its greediness."""
    rows = log_probs(model, before + after)[len(before) - 1 : -1]
    total = sum(float(row[token]) for row, token in zip(rows, after, strict=True))
    return total, all(int(row.argmax()) == token for row, token in zip(rows, after, strict=True))


def generated(model: LoadedModel, text: str, count: int) -> list[int]:
    ids = torch.tensor([[*text.encode()]])
    out = model.model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


CONTEXTS = ["A ferry left the harbour at noon.", "Two", "What did the mayor of Torvale say about the rope?"]
PAIRS = [
    (CONTEXTS[0], " It came back."), (CONTEXTS[1], "!"), (CONTEXTS[0], " No"), (CONTEXTS[2], " Nothing at all"),
    (CONTEXTS[0], " It came back at last."), (CONTEXTS[2], " Salt"), ("x", "yz"), ("", "A text without a context."),
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_full_cache_likelihoods_are_those_of_a_plain_forward_pass(model: LoadedModel, batch: int) -> None:
    likely = bytes(generated(model, CONTEXTS[0], 5)).decode("latin-1")
    pairs = [(CONTEXTS[0], likely), *PAIRS]  # greedy and shorter than what it is batched with
    found = CompressedLM(model, batch_size=batch).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    wanted = [plain(model, [*before.encode()] or [1], [*after.encode("latin-1")]) for before, after in pairs]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=2e-3)
    assert [best for _, best in found] == [best for _, best in wanted]
    assert wanted[0][1] and not wanted[1][1]


def test_a_context_too_long_loses_its_beginning(model: LoadedModel) -> None:
    text, answer = "".join(f"{i:03d} " for i in range(60)), " end"
    lm = CompressedLM(model, max_length=100)
    ((found, _),) = lm.loglikelihood(ask("loglikelihood", (text, answer)), disable_tqdm=True)
    # The harness moves the context's last space to the continuation.
    tokens = [*(text + answer).encode()][-101:]
    assert found == pytest.approx(plain(model, tokens[:-5], tokens[-5:])[0], abs=2e-3)
    with pytest.raises(UsageError, match="longer than the context of 100"):
        lm.loglikelihood(ask("loglikelihood", ("a", "b" * 101)), disable_tqdm=True)


def test_rolling_likelihood_of_the_full_cache_covers_every_token_once(model: LoadedModel) -> None:
    texts = ["Short.", "", "a", "".join(f"{i} boats and {i * i} ropes, " for i in range(12))[:225]]
    lm = CompressedLM(model, max_length=100, batch_size=3)
    found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", *[(text,) for text in texts]), disable_tqdm=True)
    wanted = []
    for text in texts:
        tokens, total = [1, *text.encode()], 0.0
        for start in range(1, len(tokens), 100):
            end = min(start + 100, len(tokens))
            before = tokens[max(0, end - 101) : start]  # a full context for the last window too
            total += plain(model, before, tokens[start:end])[0]
        wanted.append(total)
    assert found == pytest.approx(wanted, abs=5e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_full_cache_answers_are_those_of_generate(model: LoadedModel, batch: int) -> None:
    ids = [generated(model, context, 24) for context in CONTEXTS]
    texts = [bytes(tokens).decode("latin-1").split("\x02")[0] for tokens in ids]
    stop = texts[0][5:7]
    asked = [
        *[(context, {"until": [], "max_gen_toks": 24}) for context in CONTEXTS],
        (CONTEXTS[0], {"until": [stop, ""], "max_gen_toks": 24}), (CONTEXTS[2], {"until": "never", "max_gen_toks": 7}),
        ("x", {"until": [], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}),
    ]  # fmt: skip
    lm = CompressedLM(model, batch_size=batch)
    found = lm.generate_until(ask("generate_until", *asked), disable_tqdm=True)
    single = bytes(generated(model, "x", 9)).decode("latin-1").split("\x02")[0]
    assert found == [*texts, texts[0].split(stop)[0], texts[2][:7], single]


def test_white_space_before_an_answer_is_the_harness_s_affair(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids, **_: "\n\n answer"[: len(ids)], raising=False)
    asked = ask("generate_until", (CONTEXTS[0], {"until": ["\n\n"], "max_gen_toks": 8}))
    assert CompressedLM(model).generate_until(asked, disable_tqdm=True) == [""]


@pytest.mark.parametrize(("policy", "budget"), [("streaming", "0.3"), ("d2o", 0.3), ("h2o", 12)])
def test_batches_and_forks_change_nothing(model: LoadedModel, policy: str, budget: Any) -> None:
    answers = [(context, {"until": [], "max_gen_toks": 10}) for context in CONTEXTS]
    rolling = [(context * 4,) for context in CONTEXTS]

    def all_of(lm: CompressedLM, *, alone: bool) -> tuple[list[float], list[bool], list[float], list[str]]:
        def run(kind: str, arguments: list[Any]) -> list[Any]:
            requests = ask(kind, *arguments)
            call = getattr(lm, kind)
            return [call([r], disable_tqdm=True)[0] for r in requests] if alone else call(requests, disable_tqdm=True)

        scores = run("loglikelihood", PAIRS)
        return (
            [value for value, _ in scores],
            [best for _, best in scores],
            run("loglikelihood_rolling", rolling),
            run("generate_until", answers),
        )

    single = all_of(CompressedLM(model, policy, budget), alone=True)
    together = all_of(CompressedLM(model, policy, budget, batch_size=3), alone=False)
    assert together[0] == pytest.approx(single[0], abs=2e-3)
    assert together[2] == pytest.approx(single[2], abs=5e-3)
    assert together[1::2] == single[1::2]


def test_the_budget_is_kept_and_felt(model: LoadedModel) -> None:
    pair = ("The ferry to Torvale carries salt and rope. " * 6, "And then it came back.")

    def score(policy: str, budget: str | None) -> tuple[float, dict[str, Any]]:
        lm = CompressedLM(model, policy, budget)
        ((value, _),) = lm.loglikelihood(ask("loglikelihood", pair), disable_tqdm=True)
        return value, lm.get_model_info()

    full, _ = score("full", None)
    assert score("streaming", "1.0")[0] == pytest.approx(full, abs=2e-3)
    value, info = score("streaming", "0.2")
    assert abs(value - full) > 0.01
    assert info["kept"] == pytest.approx(0.2, abs=0.01)
    assert (info["policy"], info["budget"]) == ("streaming", "0.2")
    assert score("full", "0.2")[1]["budget"] is None  # as in suites


def test_the_opening_of_a_text_is_scored_before_compression(model: LoadedModel) -> None:
    text = "A ferry left the harbour at noon and came back late."
    tokens = [1, *text.encode()]
    half = (len(tokens) + 1) // 2
    lm = CompressedLM(model, "streaming", "0.3")
    (whole,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)
    rest = lm._loglikelihood_tokens([(None, tokens[:half], tokens[half:])], disable_tqdm=True)[0][0]
    assert whole == pytest.approx(plain(model, [1], tokens[1:half])[0] + rest, abs=2e-3)


def test_local_tasks_run_under_a_policy(model: LoadedModel, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": f"{context} {i}", "choices": [" yes", " no"], "gold": i % 2} for i, context in enumerate(CONTEXTS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/rows.jsonl}}\n  cache_dir: {tmp_path}\n"
    )
    head += "test_split: test\ndoc_to_text: '{{question}}'\ntarget_delimiter: ''\n"
    (tmp_path / "choice.yaml").write_text(
        head + "task: local_choice\noutput_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: choices\n"
    )
    (tmp_path / "answer.yaml").write_text(
        head + "task: local_answer\noutput_type: generate_until\ndoc_to_target: '{{choices[gold]}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "text.yaml").write_text(
        head + "task: local_text\noutput_type: loglikelihood_rolling\ndoc_to_target: '{{question}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    results = lm_eval.simple_evaluate(
        model=CompressedLM(model, "d2o", 0.3, batch_size=2),
        tasks=["local_choice", "local_answer", "local_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        use_cache=str(tmp_path / "cache"),
        bootstrap_iters=0,
    )
    assert 0 <= results["results"]["local_choice"]["acc,none"] <= 1
    assert 0 <= results["results"]["local_answer"]["exact_match,none"] <= 1
    full = [plain(model, [1], [*row["question"].encode()])[0] for row in rows]
    bits = -sum(full) / sum(len(row["question"]) for row in rows) / 0.6931471805599453
    assert results["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=0.1)
    for row, sample in zip(rows, results["samples"]["local_choice"], strict=True):
        pairs = [(row["question"], choice) for choice in row["choices"]]
        alone = CompressedLM(model, "d2o", 0.3).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
        found = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert found == pytest.approx([value for value, _ in alone], abs=2e-3)


def test_the_name_is_registered_beside_the_harness_s_own() -> None:
    register()
    register()
    assert get_model("d2obench") is CompressedLM
    assert get_model("dummy").__name__ == "DummyLM"


@pytest.mark.parametrize(("settings", "words"), [
    ({"policy": "d2o"}, "needs a budget"),
    ({"policy": "d2o", "budget": 7.5}, "out of range"),
    ({"policy": "h20", "budget": 0.2}, "unknown policy"),
    ({"policy": "hf-dynamic"}, "policy=full"),
    ({"batch_size": "auto"}, "batch_size can't be 'auto'"),
    ({"max_length": 0}, "max_length can't be '0'"),
    ({"trust_remote_code": True}, "no argument 'trust_remote_code'"),
    ({"pretrained": "shape:tiny"}, "random"),
    ({"pretrained": "nowhere"}, "unknown model"),
])  # fmt: skip
def test_wrong_arguments_are_one_clear_line(model: LoadedModel, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(D2OBenchError, match=words) as caught:
        CompressedLM(**{"pretrained": model, **settings})
    assert "\n" not in str(caught.value)


def test_requests_that_can_not_be_met_are_one_clear_line(model: LoadedModel) -> None:
    lm = CompressedLM(model)
    for kwargs, words in (({"do_sample": True, "temperature": 0.8}, "greedily"), ({"max_gen_toks": 512}, "no room")):
        with pytest.raises(UsageError, match=words):
            lm.generate_until(ask("generate_until", ("x", kwargs)), disable_tqdm=True)
    with pytest.raises(D2OBenchError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.model
def test_the_real_model_scores_as_the_harness_s_own_does(embedded: LoadedModel) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=embedded.model, tokenizer=embedded.tokenizer, batch_size=1)
    ours = CompressedLM(embedded, batch_size=3)
    pairs = [("The capital of France is", " Paris"), ("The capital of France is", " Rome."), ("", "Tea is hot.")]
    texts = [("Water is made of hydrogen and oxygen. " * 3,), ("Two.",)]
    answers = [(text, {"until": ["\n", "."], "max_gen_toks": 8}) for text in ("A week has seven", "Tea is")]
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", texts), ("generate_until", answers)):
        wanted, found = (getattr(lm, kind)(ask(kind, *arguments), disable_tqdm=True) for lm in (theirs, ours))
        if kind == "loglikelihood":
            assert [best for _, best in found] == [best for _, best in wanted]
            wanted, found = [value for value, _ in wanted], [value for value, _ in found]
        assert found == (wanted if kind == "generate_until" else pytest.approx(wanted, abs=5e-3))


sizes = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 60)).filter(lambda s: sum(s) <= 100), max_size=12)


@given(sizes, st.integers(1, 5))
def test_batches_hold_everything_once_and_fit(found: list[tuple[int, int]], batch: int) -> None:
    parts = list(batches(found, batch, 100))
    assert sorted(i for part in parts for i in part) == list(range(len(found)))
    for part in parts:
        prompts, news = zip(*(found[i] for i in part), strict=True)
        assert len(part) <= batch
        assert max(prompts) - 1 + max(news) <= 100
        assert (1 in prompts) == (max(prompts) == 1)
    assert all(found[a[-1]][0] >= found[b[0]][0] for a, b in pairwise(parts))


@given(st.integers(1, 80), st.integers(0, 40), st.booleans())
def test_a_window_scores_the_whole_continuation_once(before: int, after: int, rolling: bool) -> None:
    context, continuation = list(range(before)), list(range(1000, 1000 + after))
    item = window(context, continuation, 60, rolling=rolling)
    assert [*item.prompt[item.opening :], *item.rest] == continuation
    assert len(item.prompt) + len(item.rest) <= 61
    assert item.prompt[: item.opening] == tuple(context[-item.opening :])
    if rolling:
        assert len(item.rest) <= len(item.prompt)
    elif item.opening > 1:
        assert len(item.prompt) == item.opening
