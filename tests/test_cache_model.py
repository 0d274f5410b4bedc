"""A model that a cache of ours was made for stays what it was: its own attention, masks, loss and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_families import CONFIGS, plain_model, prompts
from transformers import DynamicCache, StaticCache

import d2obench
from d2obench.attention.interface import keyword
from d2obench.errors import D2OBenchError, ModelError

FAMILIES = ["llama-gqa2", "mistral", "qwen2", "qwen3", "phi3", "gpt-neox", "falcon", "falcon-new", "gemma3"]


def padded(lengths: tuple[int, ...], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left padded token ids and their mask, ``[B, width]``."""
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, text in enumerate(prompts(*lengths)):
        ids[row, width - len(text) :], mask[row, width - len(text) :] = torch.tensor(text), 1
    return ids, mask


def uses(model: Any) -> dict[str, torch.Tensor]:
    """What a user does with a model of their own, each as a tensor."""
    one, ones = padded((30,), 30)
    two, mask = padded((30, 17), 30)

    model.generation_config.pad_token_id = 0

    def generated(ids: torch.Tensor, given: torch.Tensor, **options: Any) -> torch.Tensor:
        out = model.generate(ids, attention_mask=given, max_new_tokens=8, do_sample=False, **options)
        return out.float()

    def with_cache(make: Callable[[], Any]) -> torch.Tensor:
        return generated(two, mask, **{keyword(model): make()})

    with torch.no_grad():
        found = {
            "forward": model(one).logits,
            "forward, mask of ones": model(one, attention_mask=ones).logits,
            "forward, batch, padded": model(two, attention_mask=mask).logits,
            "forward, no cache": model(two, attention_mask=mask, use_cache=False).logits,
            "loss": model(one, attention_mask=ones, labels=one).loss[None],
            "generate": generated(one, ones),
            "generate, padded": generated(two, mask),
            "generate, dynamic cache": with_cache(lambda: DynamicCache(config=model.config)),
            "generate, static cache": with_cache(lambda: StaticCache(config=model.config, max_cache_len=64)),
            "generate, in chunks": generated(
                one, ones, prefill_chunk_size=8, **{keyword(model): DynamicCache(config=model.config)}
            ),
            "generate, beams": generated(two, mask, num_beams=2),
        }
        if model.config.model_type != "falcon":
            found["generate, prompt lookup"] = generated(one, ones, prompt_lookup_num_tokens=3)
    return found


def use_ours(model: Any, policy: str) -> torch.Tensor:
    two, mask = padded((30, 17), 30)
    budget = None if policy == "full" else 0.5
    held = d2obench.cache(policy, budget, model=model, max_new=8)
    return model.generate(two, attention_mask=mask, max_new_tokens=8, do_sample=False, **{keyword(model): held})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_what_it_was_after_our_caches(family: str, attention: str) -> None:
    """Bit for bit, whatever it is used for, after a cache was made for it and after one was used.

    kvpress #276 reports a library whose patches stay on the model after the compressed generation and change what the
    plain model says.
    """
    model = plain_model(family, attention=attention)
    attention = model.config._attn_implementation  # Falcon has one only
    before = uses(model)
    d2obench.cache("h2o", 0.5, model=model)
    made = uses(model)
    use_ours(model, "d2o")
    tokens = use_ours(model, "full")
    used = uses(model)
    for name, expected in before.items():
        assert torch.equal(made[name], expected), f"{name}: after a cache was made"
        assert torch.equal(used[name], expected), f"{name}: after a cache was used"
    assert torch.equal(tokens.float(), before["generate, padded"]), "the full cache says what the library's says"
    assert model.config._attn_implementation == attention


def test_a_model_can_be_trained_while_a_cache_of_ours_lives() -> None:
    model, plain = plain_model("llama-gqa2"), plain_model("llama-gqa2")
    ids, mask = padded((30, 17), 30)
    held = d2obench.cache("streaming", 0.5, model=model, max_new=8)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{keyword(model): held})
    grads = []
    for one in (model, plain):
        one(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append(torch.cat([weight.grad.flatten() for weight in one.parameters()]))
    assert torch.equal(*grads)


def test_a_forward_pass_that_fails_gives_the_model_back() -> None:
    model = plain_model("llama-gqa2")
    ids, mask = padded((30, 17), 30)
    mask[0, 3] = 0  # padding inside a sequence is refused in the midst of the pass
    with pytest.raises(D2OBenchError, match="padded"):
        model(ids, attention_mask=mask, **{keyword(model): d2obench.cache("full", model=model)})
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, plain_model("llama-gqa2")(ids).logits)


def test_a_cache_of_another_model_is_refused() -> None:
    """A cache knows the layers, heads and positions of its model only."""
    model, other = plain_model("llama-gqa2"), plain_model("llama-deep")
    ids, _ = padded((30,), 30)
    held = d2obench.cache("full", model=model)
    with pytest.raises(ModelError, match="another model"):
        other(ids, **{keyword(other): held})
    d2obench.cache("full", model=other)
    with pytest.raises(ModelError, match="another model"):
        other(ids, **{keyword(other): held})
    assert torch.isfinite(model(ids, **{keyword(model): held}).logits).all()


def test_every_family_is_in_the_matrix() -> None:
    assert {CONFIGS[name]["model_type"] for name in FAMILIES} == {one["model_type"] for one in CONFIGS.values()}


@pytest.mark.parametrize("use", ["forward", "generate"])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_a_cache_is_taken_under_either_name(use: str) -> None:
    """transformers 5.24 calls the argument ``cache`` and still takes the older name."""
    model = plain_model("llama-gqa2")
    ids, _ = padded((30,), 30)
    found = []
    for name in (keyword(model), "past_key_values"):
        held = d2obench.cache("h2o", 0.5, model=model, max_new=8)
        with torch.no_grad():
            if use == "forward":
                found.append(model(ids, **{name: held}).logits)
            else:
                found.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **{name: held}))
        assert held.seen >= 30, "the model has used it"
    assert torch.equal(*found)


@pytest.mark.parametrize("policy", ["h2o", "d2o", "snapkv(window=4)", "pyramidkv(window=4)"])
def test_every_prompt_is_compressed_as_the_first(policy: str) -> None:
    """Three prompts on one model, each with a cache of its own, and a fourth with one that was used before.

    KVCache-Factory #15 reports a library that compresses the first prompt of a process only, and says nothing.
    """
    model = plain_model("llama-gqa2")
    ids, _ = padded((30,), 30)
    held = [d2obench.cache(policy, 0.4, model=model, max_new=8) for _ in range(3)]
    kept, tokens = [], []
    for one in (*held, held[-1]):
        one.reset()
        tokens.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **{keyword(model): one}))
        kept.append(one.kept)
    assert kept[0].mean() == 12
    assert all(torch.equal(one, kept[0]) for one in kept)
    assert all(torch.equal(one, tokens[0]) for one in tokens)
