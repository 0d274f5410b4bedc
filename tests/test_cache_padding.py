"""Padding and chunks: each row of a batch gets what its prompt gets alone, and what transformers' own cache gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import plain_model, prompts, tiny_model
from transformers import DynamicCache

import d2obench
from d2obench.attention.interface import keyword
from d2obench.cache import Session
from d2obench.errors import PolicyError
from d2obench.external import open_session
from d2obench.policies import parse_choice

STEPS = 8
BOUNDED = ["streaming", "h2o", "d2o", "roco", "tova", "snapkv(window=4)", "d2o(preset=released)"]
GROWING = ["full", "quant(bits=8)", "snapkv(window=4,decode=grow)"]


def budget_of(policy: str, budget: float | str = 0.4) -> Any:
    return budget if parse_choice(policy).takes_budget else None


def batch_of(texts: list[list[int]], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask ``[B, longest + extra]``, padded on the left."""
    width = max(map(len, texts)) + extra
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], mask[row, width - len(text) :] = torch.tensor(text), 1
    return ids, mask


def generated(
    model: Any, held: Any, texts: list[list[int]], extra: int = 0, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits, ``[B, STEPS]`` and ``[B, STEPS, V]``, by transformers' ``generate``."""
    model.generation_config.pad_token_id = 0
    ids, mask = batch_of(texts, extra)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, prefill_chunk_size=chunk, **{keyword(model): held},
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def near(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(found[1], expected[1], atol=2e-3, rtol=1e-3)
    assert torch.equal(found[0], expected[0])


# --- sliding layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(33, 5), (5, 33), (65, 1), (33, 5, 17), (7, 8, 9), (9, 3)])
@pytest.mark.parametrize("policy", ["full", "streaming", "h2o", "d2o", "snapkv(window=4)"])
def test_sliding_layers_of_a_padded_batch_see_no_padding(policy: str, lengths: tuple[int, ...]) -> None:
    """Lengths below, at and beyond the window of 8, in every order: each row is its prompt alone, step by step."""
    model, texts = tiny_model("gemma3"), prompts(*lengths)
    forced = torch.tensor([[3 + i, 40 + i, 80 + i] for i in range(STEPS)])[:, : len(texts)]

    def decoded(name: str, given: list[list[int]], tokens: torch.Tensor) -> torch.Tensor:
        session = open_session(model, name, budget_of(policy) if name == policy else None, max_new=STEPS)
        out = [session.prefill(given)]
        session.compress()
        return torch.stack([*out, *(session.step(one) for one in tokens)], 1)

    together = decoded(policy, texts, forced)
    for row, text in enumerate(texts):
        alone = decoded(policy, [text], forced[:, row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=2e-3, rtol=1e-3)
    if policy == "full":
        torch.testing.assert_close(together, decoded("hf-dynamic", texts, forced), atol=2e-3, rtol=1e-3)


def test_sliding_layers_of_a_padded_batch_can_be_forked() -> None:
    session = Session(tiny_model("gemma3"), "h2o", "0.4", max_new=STEPS)
    session.prefill(prompts(33, 5))
    session.compress()
    saved, tokens = session.snapshot(), torch.tensor([3, 4])
    first = [session.step(tokens) for _ in range(4)]
    session.restore(saved)
    assert all(torch.equal(session.step(tokens), one) for one in first)


# --- padding beyond the longest row ---------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [1, 3, 100])
@pytest.mark.parametrize("lengths", [(30,), (30, 17)])
@pytest.mark.parametrize("policy", [*GROWING, *BOUNDED])
def test_padding_beyond_the_longest_row_changes_nothing(policy: str, lengths: tuple[int, ...], extra: int) -> None:
    """As ``padding="max_length"`` and ``pad_to_multiple_of`` make it, with and without a known length of generation.

    transformers #46132 and kvpress #226 report tokens that change with the amount of padding; #47678 logits that jump
    where rows are padded on the left to one more than a multiple of 32 (here 30 + 3 = 33).
    """
    model, texts = tiny_model("llama-gqa2").model, prompts(*lengths)
    for max_new in (None, STEPS):
        if max_new is None and policy == "d2o(preset=released)":
            continue  # its layers that grow need to know
        held = [d2obench.cache(policy, budget_of(policy), model=model, max_new=max_new) for _ in range(2)]
        expected = generated(model, held[0], texts)
        near(generated(model, held[1], texts, extra), expected)
        assert torch.equal(held[0].held(), held[1].held())
        assert held[1].kv_bytes == held[0].kv_bytes, "padding takes no slots"


@pytest.mark.parametrize("extra", [0, 5, 40])
@pytest.mark.parametrize("family", ["llama-gqa2", "phi3", "falcon", "falcon-new", "gemma3", "gpt-neox"])
def test_the_full_cache_is_transformers_own_whatever_the_padding(family: str, extra: int) -> None:
    model, texts = plain_model(family), prompts(30, 17)
    expected = generated(model, DynamicCache(config=model.config), texts, extra)
    near(generated(model, d2obench.cache("full", model=model), texts, extra), expected)


# --- prompts in chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(30, 19), (30, 21), (64, 8), (30, 30), (33, 9), (33,), (9,), (9, 1), (25, 24)])
@pytest.mark.parametrize("policy", [*GROWING, *BOUNDED])
def test_a_prompt_in_chunks_is_the_prompt_at_once(policy: str, lengths: tuple[int, ...]) -> None:
    """Chunks of 8: some are all padding for a row, some last ones are a single token.

    transformers #43082 reports a chunked prefill whose chunks get the wrong positions.
    """
    model, texts = tiny_model("llama-gqa2").model, prompts(*lengths)
    held = [d2obench.cache(policy, budget_of(policy), model=model, max_new=STEPS) for _ in range(2)]
    expected = generated(model, held[0], texts)
    near(generated(model, held[1], texts, chunk=8), expected)
    torch.testing.assert_close(held[1].kept, held[0].kept)
    torch.testing.assert_close(held[1].held(), held[0].held())


@pytest.mark.parametrize("family", ["gemma3", "falcon", "qwen3"])
@pytest.mark.parametrize("extra", [0, 11])
def test_chunks_and_padding_in_other_families(family: str, extra: int) -> None:
    model, texts = plain_model(family), prompts(33, 14)
    expected = generated(model, DynamicCache(config=model.config), texts)
    for policy in ("full", "h2o"):
        held = d2obench.cache(policy, None if policy == "full" else "1.0", model=model, max_new=STEPS)
        near(generated(model, held, texts, extra, chunk=8), expected)


def test_chunks_of_ones_own_end_where_the_caller_says() -> None:
    """Blocks that a caller feeds: the length of the prompt tells the last block of one token from a decode step."""
    model, (text,) = tiny_model("llama-gqa2").model, prompts(33)
    found = []
    for chunks in ([33], [32, 1], [16, 16, 1]):
        held = d2obench.cache("h2o", 0.4, model=model, max_new=STEPS, prompt=33)
        with torch.inference_mode():
            for part in torch.tensor([text]).split(chunks, 1):
                logits = model(part, **{keyword(model): held}).logits[:, -1]
            steps = [model(torch.tensor([[i]]), **{keyword(model): held}).logits[:, -1] for i in range(3, 6)]
        assert held.kept.tolist() == [[13.0]] * 2
        found.append(torch.stack([logits, *steps]))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[2], found[0], atol=1e-3, rtol=1e-3)


def test_padding_inside_a_conversation_is_refused() -> None:
    model = tiny_model("llama-gqa2").model
    held = d2obench.cache("streaming", 0.5, model=model)
    with torch.inference_mode():
        ids, mask = batch_of(prompts(12, 9))
        model(ids, attention_mask=mask, **{keyword(model): held})
        more = torch.cat((mask, torch.tensor([[1, 1, 1], [0, 1, 1]])), 1)
        with pytest.raises(PolicyError, match="padded"):
            model(torch.ones(2, 3, dtype=torch.long), attention_mask=more, **{keyword(model): held})
