"""Calls out of order or out of place are one line each, and text beyond a model's rotary angles is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import plain_model, prompts, tiny_model
from transformers import DynamicCache

import d2obench
from d2obench.attention.interface import keyword
from d2obench.errors import D2OBenchError, ModelError, UsageError
from d2obench.external import open_session
from d2obench.models.base import dimensions_of, loaded, rotary_limit

POLICIES = [("full", None), ("h2o", "0.4"), ("hf-dynamic", None), ("hf-static", None)]
FACTORS = {"short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [2.0 + i / 4 for i in range(16)]}
LONG = {
    "original_max_position_embeddings": 40, "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40, **FACTORS},
}  # fmt: skip
DYNAMIC = {
    "max_position_embeddings": 40,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}


def one_line(problem: pytest.ExceptionInfo[D2OBenchError]) -> None:
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 400


@pytest.mark.parametrize(("policy", "budget"), POLICIES)
@pytest.mark.parametrize("call", ["compress", "step", "footprint", "snapshot", "skip_to"])
def test_a_session_without_a_prompt_says_so(policy: str, budget: str | None, call: str) -> None:
    session = open_session(tiny_model("llama-gqa2"), policy, budget, max_new=4)
    arguments: dict[str, tuple[Any, ...]] = {"step": (torch.tensor([1]),), "skip_to": (4,)}

    def asked() -> None:
        getattr(session, call)(*arguments.get(call, ()))

    kinds = (UsageError, ModelError) if call == "snapshot" else UsageError  # library caches can't be forked at all
    with pytest.raises(kinds, match=r"before prefill|can't be forked") as problem:
        asked()
    one_line(problem)
    session.prefill(prompts(5))
    session.compress()
    session.close()
    with pytest.raises(kinds, match=r"after close|can't be forked"):
        asked()


@pytest.mark.parametrize(("policy", "budget"), POLICIES)
def test_tokens_a_model_does_not_know_are_named(policy: str, budget: str | None) -> None:
    session = open_session(tiny_model("llama-gqa2"), policy, budget, max_new=4)
    for wrong in (128, -1):
        with pytest.raises(UsageError, match=f"token id {wrong} is outside .*0 to 127") as problem:
            session.prefill([[3, 4, wrong]])
        one_line(problem)
    session.prefill(prompts(5, 9))
    session.compress()
    with pytest.raises(UsageError, match="token id 500 is outside"):
        session.step(torch.tensor([3, 500]))


@pytest.mark.parametrize(("policy", "budget"), POLICIES)
@pytest.mark.parametrize("tokens", [torch.ones(1), torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.float)])
def test_a_step_takes_one_token_a_sequence(policy: str, budget: str | None, tokens: torch.Tensor) -> None:
    session = open_session(tiny_model("llama-gqa2"), policy, budget, max_new=4)
    session.prefill(prompts(5, 9))
    session.compress()
    given = tokens if tokens.shape == (2,) else tokens.long()
    with pytest.raises(UsageError, match=r"had 2 sequences.*one int64 token") as problem:
        session.step(given)
    one_line(problem)
    assert torch.isfinite(session.step(torch.tensor([1, 2]))).all()


@pytest.mark.parametrize("policy", ["full", "h2o"])
@pytest.mark.parametrize("decoding", [False, True])
def test_a_cache_is_for_its_own_batch_and_model(policy: str, decoding: bool) -> None:
    model = tiny_model("llama-gqa2").model
    held = d2obench.cache(policy, None if policy == "full" else 0.5, model=model)
    with pytest.raises(ModelError, match="seen no prompt"):
        held.compress()
    with torch.inference_mode():
        model(torch.tensor(prompts(12)), **{keyword(model): held})
        if decoding:
            model(torch.tensor([[5]]), **{keyword(model): held})
        for tokens in (torch.ones(3, 1), torch.ones(3, 4)):
            with pytest.raises(ModelError, match="a batch of 3 was given to a cache of 1") as problem:
                model(tokens.long(), **{keyword(model): held})
            one_line(problem)
        assert torch.isfinite(model(torch.tensor([[5]]), **{keyword(model): held}).logits).all()


def test_attention_that_the_user_switches_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model("llama-gqa2")
    held, other = d2obench.cache("full", model=model), d2obench.cache("full", model=model)
    ids = torch.tensor(prompts(12))
    with torch.no_grad():
        expected = model(ids, **{keyword(model): held}).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(ids, **{keyword(model): other}).logits, expected)
    assert model.config._attn_implementation == "eager"


# --- rotary angles that change --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "settings"), [("phi3", LONG), ("llama-gqa4", DYNAMIC)])
def test_a_text_beyond_the_rotary_angles_is_refused(family: str, settings: dict[str, Any]) -> None:
    """Up to 40 tokens the cache gives what transformers' gives, padded rows too; one more is an error in every way a
    model can be run, never a full cache in silence.

    transformers #33129 reports keys of shorter angles that stay in the cache where Phi-3's longrope changes them.
    """
    model = plain_model(family, **settings)
    model.generation_config.pad_token_id = 0
    assert rotary_limit(model.config) == dimensions_of(model.config, parameters=0).context == 40
    (text,) = prompts(30)
    row = torch.tensor([text, [0] * 11 + text[11:]])
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :11] = 0

    def generated(held: Any, new: int, ids: torch.Tensor = row, given: torch.Tensor = mask) -> torch.Tensor:
        return model.generate(
            ids, attention_mask=given, max_new_tokens=new, min_new_tokens=new, do_sample=False, **{keyword(model): held}
        )

    for policy in ("full", "h2o"):
        budget = None if policy == "full" else "1.0"
        assert torch.equal(
            generated(d2obench.cache(policy, budget, model=model), 10), generated(DynamicCache(config=model.config), 10)
        )
    for policy in ("full", "h2o"):
        budget = None if policy == "full" else 0.3
        with pytest.raises(ModelError, match="40 tokens") as problem:
            generated(d2obench.cache(policy, budget, model=model), 20)
        one_line(problem)
        long = torch.tensor(prompts(45))
        with pytest.raises(ModelError, match="40 tokens"):
            generated(d2obench.cache(policy, budget, model=model), 2, long, torch.ones_like(long))
        with pytest.raises(ModelError, match="40 tokens"), torch.no_grad():
            model(long, **{keyword(model): d2obench.cache(policy, budget, model=model)})
    assert generated(DynamicCache(config=model.config), 20).shape == (2, 50), "transformers' own go on"
    session_model = loaded(family, plain_model(family, **settings), None, digest="x", has_sense=False)
    for beyond in (False, True):
        with pytest.raises(UsageError, match="can see"):
            open_session(session_model, "h2o", "0.4", max_new=11, beyond=beyond).prefill([text])
    session = open_session(session_model, "h2o", "0.4", max_new=10)
    session.prefill([text])
    session.compress()
    assert all(torch.isfinite(session.step(torch.tensor([3]))).all() for _ in range(10))
