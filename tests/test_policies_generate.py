"""transformers' own ``generate`` on a policy cache, and conversations that go on."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny_families import prompts, tiny_model
from torch import Tensor

import d2obench
from d2obench.attention.interface import keyword
from d2obench.cache import Session
from d2obench.cache import policy_cache as cache_module
from d2obench.cache.budgets import rescale
from d2obench.cache.conversation import reopen
from d2obench.errors import D2OBenchError
from d2obench.models import LoadedModel
from d2obench.policies import parse_choice
from d2obench.suite.grammar import Budget

POLICIES = [
    "full", "local", "streaming", "streaming(positions=cache)",
    "h2o", "d2o", "d2o(interval=3)", "roco", "snapkv(window=4)",
    "snapkv(window=4,decode=slide)", "pyramidkv(window=4)", "tova", "cam", "random", "quant", "d2o+quant(bits=8)",
    "d2o(preset=mass)", "roco(merge=mass)", "d2o(preset=mass,heads=true)", "adakv(score=snapkv(window=4))",
]  # fmt: skip
NEW = 12


def of(policy: str) -> float | None:
    return 0.4 if parse_choice(policy).takes_budget else None


def generate(model: LoadedModel, held: Any, texts: list[list[int]], new: int = NEW) -> Tensor:
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    out: Tensor = model.model.generate(
        tokens, attention_mask=mask, **{keyword(model.model): held}, max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out[:, longest:]


def by_session(model: LoadedModel, policy: str, texts: list[list[int]]) -> Tensor:
    session = Session(model, policy, str(of(policy)) if of(policy) else None, max_new=NEW)
    logits = session.prefill(texts)
    session.compress()
    out = []
    for _ in range(NEW):
        out.append(logits.argmax(-1))
        logits = session.step(out[-1])
    return torch.stack(out, 1)


@pytest.mark.parametrize("family", ["llama-gqa2", "falcon", "gemma3"])
@pytest.mark.parametrize("policy", [*POLICIES, "d2o(preset=released)"])
def test_generate_gives_the_tokens_of_a_session(policy: str, family: str) -> None:
    model = tiny_model(family)
    for texts in (prompts(30), prompts(30, 19)):
        held = d2obench.cache(policy, of(policy), model=model.model, max_new=NEW)
        assert torch.equal(generate(model, held, texts), by_session(model, policy, texts))


@pytest.mark.parametrize("policy", ["full", "quant(bits=8)", "snapkv(window=4)", "pyramidkv(window=4)"])
def test_a_growing_cache_grows_when_the_end_is_not_known(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny_model("llama-gqa2"), prompts(30, 19)
    known = generate(model, d2obench.cache(policy, of(policy), model=model.model, max_new=40), texts, 40)
    monkeypatch.setattr(cache_module, "SPARE", 3)
    assert torch.equal(generate(model, d2obench.cache(policy, of(policy), model=model.model), texts, 40), known)


def converse(model: LoadedModel, policy: str, budget: float | None, texts: list[list[int]], more: list[int]) -> Any:
    """Two turns on one cache, tokens fed one by one in between; logits of the second turn's last token and on."""
    held = d2obench.cache(policy, budget, model=model.model, max_new=20, seed=1)
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = (torch.arange(longest) >= torch.tensor([[longest - len(text)] for text in texts])).long()
    out = []
    with torch.inference_mode():
        for block in (tokens, *([[token]] * len(texts) for token in range(3, 9)), [more] * len(texts), *(
            [[token]] * len(texts) for token in range(9, 15)
        )):  # fmt: skip
            block = torch.as_tensor(block)
            if block.shape[1] != longest or out:
                mask = torch.nn.functional.pad(mask, (0, block.shape[1]), value=1)
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -block.shape[1] :]
            out.append(
                model.model(block, attention_mask=mask, position_ids=positions, **{keyword(model.model): held}).logits[
                    :, -1
                ]
            )
    return torch.stack(out[7:], 1), held


@pytest.mark.parametrize("family", ["llama-gqa2", "falcon", "gemma3"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_second_turn_is_bounded_and_a_batch_is_its_sequences(policy: str, family: str) -> None:
    model, texts, more = tiny_model(family), prompts(30, 19), prompts(11, seed=4)[0]
    logits, held = converse(model, policy, of(policy), texts, more)
    assert logits.isfinite().all()
    for row, text in zip(logits, texts, strict=True):
        alone, _ = converse(model, policy, of(policy), [text], more)
        assert (alone[0] - row).abs().max() < (0.3 if "quant" in policy else 1e-4)
    total = [len(text) + 6 + len(more) for text in texts]
    assert held.lengths.tolist() == total
    if of(policy) and not held.grows:
        for sequence, tokens in enumerate(total):
            assert held.held()[:, sequence].mean() <= round(0.4 * tokens) + 1


@pytest.mark.parametrize("family", ["llama-gqa2", "falcon", "gemma3"])
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if "quant" not in policy])
def test_a_second_turn_with_room_for_everything_is_full_attention(policy: str, family: str) -> None:
    """Nothing is evicted, so the conversation must be what one long prompt gives."""
    model, text, more = tiny_model(family), prompts(30)[0], prompts(11, seed=4)[0]
    logits, _ = converse(model, policy, 128 if parse_choice(policy).takes_budget else None, [text], more)
    everything = text + list(range(3, 9)) + more + list(range(9, 15))
    session = Session(model, "full", None, max_new=1)
    for step in range(7):
        expected = session.prefill([everything[: len(text) + 6 + len(more) + step]])
        assert (logits[0, step] - expected[0]).abs().max() < 1e-4


def test_a_prompt_in_blocks_is_the_prompt(tiny: LoadedModel) -> None:
    text = prompts(40)[0]
    for policy in ("full", "h2o", "d2o", "roco", "tova"):
        logits = []
        for blocks in ([text], [text[:13], text[13:31], text[31:]]):
            held = d2obench.cache(policy, of(policy), model=tiny.model, max_new=9)
            with torch.inference_mode():
                for block in (*blocks, [3], [4], [5]):
                    out = tiny.model(torch.tensor([block]), **{keyword(tiny.model): held}).logits[:, -1]
            logits.append(out)
        assert (logits[0] - logits[1]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "policy", ["d2o", "d2o(merge=values)", "d2o(threshold=layer)", "d2o(hosts=important)", "d2o(inherit=true)"]
)
def test_a_pending_merge_is_carried_out_as_the_next_step_would(policy: str, tiny: LoadedModel) -> None:
    session = Session(tiny, policy, "0.3", max_new=12)
    session.prefill(prompts(50, 33))
    session.compress()
    merged = 0
    for token in range(3, 9):
        session.step(torch.tensor([token, token]))
        state, saved = session.cache.state, session.snapshot()
        before = state.merged.tolist()
        with torch.inference_mode():
            turns = reopen(state, 2)
        counted = [now - old for now, old in zip(state.merged.tolist(), before, strict=True)]
        session.restore(saved)
        session.step(torch.tensor([9, 9]))
        assert [now - old for now, old in zip(state.merged.tolist(), before, strict=True)] == counted
        merged += sum(counted)
        for layer, turn in enumerate(turns):
            stored = state.position[layer]
            for row, positions in enumerate(turn.position.flatten(0, 1)):
                for at, position in enumerate(positions.tolist()):
                    slot = (stored[row] == position).nonzero()
                    if position < 0 or slot.numel() == 0:  # evicted by the step itself
                        continue
                    place = row, int(slot[0, 0])
                    keys, values = turn.keys.flatten(0, 1)[row, at], turn.values.flatten(0, 1)[row, at]
                    assert torch.allclose(keys, state.store.keys(layer)[place], atol=1e-5)
                    assert torch.allclose(values, state.store.values(layer)[place], atol=1e-5)
        session.restore(saved)
        session.step(torch.tensor([token, token]))
    assert merged > 20


def test_layer_budgets_grow_with_the_conversation() -> None:
    first = torch.tensor([[30], [10], [20], [100]])
    grown = rescale(first, [100], [200], Budget(ratio=0.2))
    assert grown.T.tolist() == [[60, 20, 40, 200]]
    assert rescale(torch.tensor([[20], [20]]), [100], [131], Budget(ratio=0.2)).T.tolist() == [[26, 26]]
    assert torch.equal(rescale(first, [100], [200], Budget(tokens=20)), first)
    assert rescale(torch.tensor([[-1], [20]]), [100], [200], Budget(ratio=0.2)).T.tolist() == [[-1, 40]]


def test_asking_for_the_wrong_thing_is_one_line(tiny: LoadedModel) -> None:
    for policy, budget, says in (
        ("d2o", None, "needs a budget"), ("d3o", 0.2, "unknown policy"), ("d2o", 2.0, "out of range"),
        ("d2o(preset=released,beta=0.3)", 0.2, "no other parameters"), ("quant+quant", None, "don't go together"),
        ("d2o+h2o", 0.2, "write POLICY+quant"), ("d2o(bits=4)", 0.2, "no parameter 'bits'"),
        ("quant(bits=3)", None, "3"),
    ):  # fmt: skip
        with pytest.raises(D2OBenchError) as caught:
            d2obench.cache(policy, budget, model=tiny.model)
        assert says in str(caught.value)
    held = d2obench.cache("d2o(preset=released)", 0.2, model=tiny.model)
    with pytest.raises(D2OBenchError, match="give max_new"):
        generate(tiny, held, prompts(30))


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, d2obench; d2obench.__version__; {heavy}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "[]\n"
