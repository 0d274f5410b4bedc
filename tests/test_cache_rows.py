"""Rows of a cache that move: beams, parallel samples, reordering, selection, copies, and tokens taken back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_families import plain_model, prompts, tiny_model
from transformers import DynamicCache

import d2obench
from d2obench.attention.interface import keyword
from d2obench.errors import PolicyError
from d2obench.policies import parse_choice

POLICIES = [
    "full", "quant(bits=8)", "quant(bits=4)", "local", "streaming", "h2o", "h2o+quant(bits=8)", "d2o",
    "d2o(interval=2)", "d2o(threshold=layer)", "d2o(merge=values,hosts=important)", "d2o(preset=released)", "roco",
    "d2o(preset=mass)", "d2o(preset=mass,interval=2)", "snapkv(window=4,merge=mass)",
    "tova", "cam", "random",
    "snapkv(window=4)", "snapkv(window=4,decode=slide)", "pyramidkv(window=4)",
    "d2o(preset=mass,heads=true)", "adakv(score=snapkv(window=4))", "adakv(score=h2o)",
    "adakv(score=snapkv(window=4))+quant",
]  # fmt: skip
TEXTS = prompts(30, 17)


def made(model: Any, policy: str) -> Any:
    budget = 0.4 if parse_choice(policy).takes_budget else None
    return d2obench.cache(policy, budget, model=model, max_new=40, seed=3)


def read(model: Any, held: Any, texts: list[list[int]]) -> None:
    """Feeds prompts, padded on the left."""
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], mask[row, width - len(text) :] = torch.tensor(text), 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        model(ids, attention_mask=mask, position_ids=positions, **{keyword(model): held})


def fed(model: Any, held: Any, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits ``[B, n, V]`` of decode steps; row b has ``lengths[b]`` tokens before."""
    out = []
    with torch.inference_mode():
        for i, column in enumerate(tokens.T):
            position = torch.tensor(lengths)[:, None] + i
            ids = column[:, None]
            out.append(model(ids, position_ids=position, **{keyword(model): held}).logits[:, -1])
    return torch.stack(out, 1)


def history(sources: list[int], steps: int, start: int = 3) -> torch.Tensor:
    """Tokens of rows that go on like those of other rows."""
    return torch.tensor([[(start + 11 * source + 5 * i) % 120 + 2 for i in range(steps)] for source in sources])


MOVES = [(0, [1, 0, 0, 1, 1]), (5, [1, 0]), (5, [0, 1, 1]), (5, [1])]
"""Tokens decoded before, and which sequence each new one continues: more of them, as many, and fewer."""
OTHER_MOVES = [(0, [1, 0]), (0, [1, 1]), (0, [0, 1, 1]), (0, [1]), (5, [1, 1]), (5, [1, 0, 0, 1, 1])]


@pytest.mark.parametrize(
    ("before", "sources"), [*MOVES, *(pytest.param(*move, marks=pytest.mark.slow) for move in OTHER_MOVES)]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_carry_all_that_is_known_of_them(policy: str, before: int, sources: list[int]) -> None:
    """Rows that are moved right after the prompt, or in the midst of decoding, go on as rows that were always there:
    their entries, scores, thresholds, biases, draws and pending merges come along.

    transformers #45811 reports beams whose cache does not follow them, #45510 quantised caches of which only the
    newest tokens, not quantised yet, are moved.
    """
    model = tiny_model("llama-gqa2").model
    moved, fresh = made(model, policy), made(model, policy)
    read(model, moved, TEXTS)
    read(model, fresh, [TEXTS[i] for i in sources])
    lengths = [len(TEXTS[i]) for i in sources]
    if before:
        fed(model, moved, history([0, 1], before), [30, 17])
        fed(model, fresh, history(sources, before), lengths)
    moved.batch_select_indices(torch.tensor(sources))
    assert moved.batch_size == fresh.batch_size == len(sources)
    after = history(list(range(len(sources))), 12, start=40)
    expected = fed(model, fresh, after, [length + before for length in lengths])
    found = fed(model, moved, after, [length + before for length in lengths])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.held(), fresh.held())


@pytest.mark.parametrize("family", ["gemma3", "falcon", "qwen3"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beams_of_the_full_cache_are_transformers_own(family: str, options: dict[str, Any]) -> None:
    model = plain_model(family)
    model.generation_config.pad_token_id = 0
    ids, mask = torch.tensor([TEXTS[0], [0] * 13 + TEXTS[1]]), torch.ones(2, 30, dtype=torch.long)
    mask[1, :13] = 0

    def beams(held: Any) -> torch.Tensor:
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=10, do_sample=False, **options, **{keyword(model): held}
        )

    assert torch.equal(beams(d2obench.cache("full", model=model)), beams(DynamicCache(config=model.config)))


@pytest.mark.parametrize("policy", ["h2o", "d2o", "streaming", "quant(bits=8)", "d2o(preset=released)"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"do_sample": True, "num_return_sequences": 3}],
    ids=str,
)
def test_policies_run_with_beams_and_parallel_samples(policy: str, options: dict[str, Any]) -> None:
    model = tiny_model("llama-gqa2").model
    torch.manual_seed(0)
    held = made(model, policy)
    model.generate(torch.tensor([TEXTS[0]]), max_new_tokens=9, pad_token_id=0, **options, **{keyword(model): held})
    assert held.batch_size == options.get("num_return_sequences", options.get("num_beams"))
    if policy in ("h2o", "streaming"):
        assert held.held().max() <= 12


def test_a_cache_is_repeated_as_transformers_is() -> None:
    model = tiny_model("llama-gqa2").model
    ours, theirs = made(model, "full"), DynamicCache(config=model.config)
    for held in (ours, theirs):
        read(model, held, [TEXTS[0], TEXTS[0][::-1]])
        held.batch_repeat_interleave(2)
        held.reorder_cache(torch.tensor([3, 0, 2, 1]))
        held.batch_select_indices(torch.tensor([True, False, True, True]))
    tokens = history([0, 1, 2], 4)
    torch.testing.assert_close(
        fed(model, ours, tokens, [30] * 3), fed(model, theirs, tokens, [30] * 3), atol=1e-4, rtol=1e-4
    )


# --- tokens taken back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa2", "falcon"])
@pytest.mark.parametrize(("decoded", "cropped"), [(5, 3), (5, 5), (5, 9), (0, 4), (7, 25)])
def test_cropping_the_full_cache_is_as_if_the_tokens_had_never_come(family: str, decoded: int, cropped: int) -> None:
    model = tiny_model(family).model
    found = []
    for held in (made(model, "full"), DynamicCache(config=model.config)):
        read(model, held, [TEXTS[0], TEXTS[0][::-1]])
        if decoded:
            fed(model, held, history([0, 1], decoded), [30, 30])
        held.crop(-cropped)
        assert held.get_seq_length() == 30 + decoded - cropped
        more = torch.tensor(prompts(6, 6, seed=4))
        length = held.get_seq_length()
        with torch.inference_mode():
            block = model(more, position_ids=length + torch.arange(6)[None], **{keyword(model): held}).logits
        found.append(torch.cat((block, fed(model, held, history([0, 1], 4, 60), [length + 6] * 2)), 1))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_what_can_not_be_taken_back_is_one_line() -> None:
    model = tiny_model("llama-gqa2").model
    held = made(model, "h2o")
    read(model, held, TEXTS)
    fed(model, held, history([0, 1], 3), [30, 17])
    assert not held.is_croppable and made(model, "full").is_croppable and not made(model, "quant(bits=8)").is_croppable
    with pytest.raises(PolicyError, match="'h2o' can't be cropped: what was evicted"):
        held.crop(-1)
    held.crop(0)


def assisted(way: str) -> dict[str, Any]:
    """The arguments of ``generate`` for a kind of decoding that takes tokens back."""
    if way == "prompt lookup":
        return {"prompt_lookup_num_tokens": 3}
    if way == "early exit":
        return {"assistant_early_exit": 1}
    return {"assistant_model": plain_model("llama-deep")}


def decoded(model: Any, held: Any, **options: Any) -> torch.Tensor:
    ids = torch.tensor([TEXTS[0] * 2])
    return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **options, **{keyword(model): held})


@pytest.mark.parametrize(("way", "family"), [
    ("assistant", "llama-gqa2"), ("early exit", "llama-gqa2"), ("prompt lookup", "llama-gqa2"),
    ("prompt lookup", "qwen3"), ("prompt lookup", "gemma3"), ("assistant", "gemma3"),
])  # fmt: skip
@pytest.mark.parametrize(("policy", "budget"), [("full", None), ("h2o", "1.0")])
def test_assisted_decoding_on_the_full_cache_gives_greedy_tokens(
    policy: str, budget: str | None, way: str, family: str
) -> None:
    model = plain_model(family)
    held = d2obench.cache(policy, budget, model=model, max_new=40)
    assert torch.equal(decoded(model, held, **assisted(way)), decoded(model, DynamicCache(config=model.config)))
    assert all(layer.keys.shape[2] < layer.sliding_window for layer in held.layers if layer.is_sliding)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_assisted_decoding_is_refused_before_anything_is_computed(policy: str) -> None:
    """Whatever is evicted, merged or quantised: one line, and neither the model nor its assistant has run."""
    model, ran = plain_model("llama-gqa2"), []
    held = made(model, policy)
    for way in ("assistant", "early exit", "prompt lookup"):
        options = assisted(way)
        for one in {model, options.get("assistant_model", model)}:
            one.register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(PolicyError, match="can't be cropped: what was evicted") as problem:
            decoded(model, held, **options)
        assert "\n" not in str(problem.value)
        assert not ran and held.seen == 0


@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_contrastive_search_is_refused_before_anything_is_computed(policy: str) -> None:
    """transformers has it in code of the hub, which is not loaded unless it is trusted."""
    model = plain_model("llama-gqa2")
    held = made(model, policy)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        decoded(model, held, penalty_alpha=0.6, top_k=4)
    assert held.seen == 0


# --- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["empty", "prompt", "decoding"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_copy_goes_on_by_itself(policy: str, when: str) -> None:
    """As a prefix that several texts share is used: neither the copy nor what it was made of changes the other."""
    model = tiny_model("llama-gqa2").model

    def begun() -> Any:
        held = made(model, policy)
        if when != "empty":
            read(model, held, TEXTS)
        if when == "decoding":
            fed(model, held, history([0, 1], 5), [30, 17])
        return held

    def went_on(held: Any, start: int) -> torch.Tensor:
        if when == "empty":
            read(model, held, TEXTS)
        done = 5 if when == "decoding" else 0
        return fed(model, held, history([0, 1], 8, start), [30 + done, 17 + done])

    source = begun()
    copied = copy.deepcopy(source)
    first, second = went_on(copied, 40), went_on(source, 77)
    torch.testing.assert_close(first, went_on(begun(), 40), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second, went_on(begun(), 77), atol=1e-4, rtol=1e-4)


def test_what_transformers_asks_of_a_cache() -> None:
    model = tiny_model("gemma3").model
    held = made(model, "h2o")
    asked: dict[str, Callable[[], Any]] = {
        "is_initialized": lambda: held.is_initialized,
        "get_seq_length": lambda: held.get_seq_length(),
        "max_batch_size": lambda: held.max_batch_size,
        "max_cache_len": lambda: held.max_cache_len,
        "get_max_length": lambda: held.get_max_length(),
        "is_compileable": lambda: held.is_compileable,
        "len": lambda: len(held),
    }
    assert {name: ask() for name, ask in asked.items()} == {
        "is_initialized": False, "get_seq_length": 0, "max_batch_size": -1, "max_cache_len": -1, "get_max_length": -1,
        "is_compileable": False, "len": 4,
    }  # fmt: skip
    read(model, held, TEXTS)
    assert held.is_initialized and held.get_seq_length() == 30 and held.max_batch_size == 2
    held.reset()
    assert not held.is_initialized and held.get_seq_length() == 0
