"""D2O's other form (``preset=mass``): its parts against slow models in float64, and what must hold whatever they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference import rules
from tiny_families import prompts, tiny_model

from d2obench import cpu
from d2obench.attention.interface import keyword
from d2obench.cache import Session
from d2obench.cache.policy_cache import PolicyCache, PolicyLayer
from d2obench.errors import PolicyError
from d2obench.models import LoadedModel
from d2obench.policies import diversity as module
from d2obench.policies import mass, parse_policy
from d2obench.policies.allocation import shares
from d2obench.policies.base import Entries, Kept, pick
from d2obench.policies.diversity import diversity

MASS, HEADS = "d2o(preset=mass)", "d2o(preset=mass,heads=true)"


def opened(policy: str, *lengths: int, budget: str = "0.3", model: LoadedModel | None = None) -> Session:
    session = Session(model or tiny_model("llama-deep"), policy, budget, max_new=12)
    session.prefill(prompts(*lengths))
    session.compress()
    return session


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [128, 32, 0])
def test_diversity_is_the_distance_to_what_matters_more(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if block:
        monkeypatch.setattr(module, "CPU_BLOCK", block)
        monkeypatch.setattr(cpu, "available", lambda: False)
    generator = torch.Generator().manual_seed(1)
    keys, score = torch.randn(2, 3, 90, 8, generator=generator), torch.rand(2, 3, 90, generator=generator)
    real = torch.arange(90) >= torch.tensor([0, 31])[:, None, None]
    found = diversity(keys, score, real)
    for b, h, first in ((0, 0, 0), (0, 2, 0), (1, 1, 31)):
        k, order = keys[b, h].double().numpy(), sorted(range(first, 90), key=lambda j: -float(score[b, h, j]))
        far = [min(float(np.linalg.norm(k[j] - k[i])) for i in order[:at]) for at, j in enumerate(order) if at]
        assert found[b, h, order[1:]].tolist() == pytest.approx(far, rel=1e-4)
        assert float(found[b, h, order[0]]) == pytest.approx(max(far), rel=1e-4)
    assert diversity(keys[:, :, :1], score[:, :, :1], real[..., :1] | True).tolist() == [[[1.0]] * 3] * 2


@pytest.mark.skipif(not cpu.available(), reason="needs the compiled loops")
@pytest.mark.parametrize("heads_alike", [True, False])
def test_distances_are_known_as_far_as_they_matter(heads_alike: bool) -> None:
    """Keys in groups, as in a text: most are near one that matters more, and only the others need all distances."""
    generator = torch.Generator().manual_seed(4)
    centres, noise = torch.randn(2, 3, 12, 8, generator=generator), torch.randn(2, 3, 400, 8, generator=generator)
    keys = centres.gather(2, torch.randint(12, (2, 3, 400, 1), generator=generator).expand_as(noise)) + 0.1 * noise
    score = torch.rand(2, 3, 400, generator=generator) + 0.3
    real = (torch.arange(400) >= torch.tensor([0, 57])[:, None, None]).expand(2, 3, 400)
    certain = real & ((torch.arange(400) >= 390) | (torch.arange(400) < 60))
    exact = np.zeros((2, 3, 400))
    for b, h in np.ndindex(2, 3):
        k, low = keys[b, h].double().numpy(), 57 * b
        order = sorted(range(low, 400), key=lambda j: -float(score[b, h, j]))
        far = [float(np.linalg.norm(k[order[:at]] - k[j], axis=1).min()) for at, j in enumerate(order) if at]
        exact[b, h, order] = [max(far), *far]
    found = module.deferred(torch.cat((real, real), 2))[:, :, 400:]  # a part of a larger tensor
    for kept in (100, 90, 160, 400):
        keep = torch.full((2,), kept) if heads_alike else kept - torch.arange(6).view(2, 3)
        module.settle(found, keys, score, real, certain, keep)
        for b, h in np.ndindex(2, 3):
            own, low = found[b, h, 57 * b :].numpy(), 57 * b
            true, known = exact[b, h, low:], own >= 0
            assert own[known] == pytest.approx(true[known], abs=1e-4)
            assert (-own[~known] > true[~known] - 1e-4).all()
            assert known[certain[b, h, low:].numpy()].all()
            free = ~certain[b, h, low:].numpy()
            places = int(keep.view(2, -1)[b, h if keep.ndim > 1 else 0]) - int((~free).sum())
            best = np.argsort(-(score[b, h, low:].numpy() * true)[free])[: max(places, 0)]
            assert known[free][best].all()
        if kept < 400:
            assert 0.1 < float((found < 0).float().mean()) < 0.9
    assert bool((found >= 0).all())


def test_entries_that_repeat_a_kept_one_are_stood_for_exactly() -> None:
    """Evicted copies of kept entries, each with as much attention as its original: no query sees a difference."""
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(1, 2, 6, 16, generator=generator), torch.randn(1, 2, 6, 16, generator=generator)
    copies = torch.tensor([0, 1, 1, 4, 5, 5, 5])
    keys, values = torch.cat((key, key[:, :, copies]), 2), torch.cat((value, value[:, :, copies]), 2)
    position = torch.arange(13).expand(1, 2, -1)
    stats = {"sum": 0.1 * (13.0 - position)}
    entries = Entries(0, 1, keys, values, position, torch.tensor([13]), stats)
    index, evicted = position[..., :6], position[..., 6:]
    kept = Kept(index, evicted, 13, pick(keys, index), pick(values, index))
    counted = mass.absorb(entries, kept)
    query = torch.randn(1, 2, 4, 16, generator=generator)
    expected = torch.softmax(query @ keys.transpose(2, 3), -1) @ values
    logits = query @ kept.keys.transpose(2, 3) + stats["bias"][:, :, None, :6]
    torch.testing.assert_close(torch.softmax(logits, -1) @ kept.values, expected)
    assert torch.equal(kept.keys, key) and counted["merged"].tolist() == [[7.0, 7.0]]
    torch.testing.assert_close(stats["bias"][0, 0, :6].exp(), torch.tensor([2.0, 3, 1, 1, 2, 4]))


def test_what_matters_more_than_its_target_counts_as_its_equal() -> None:
    keys = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).view(1, 1, 2, 2)
    stats = {"sum": torch.tensor([[[0.2, 0.9]]])}
    position = torch.arange(2).view(1, 1, 2)
    kept = Kept(position[..., :1], position[..., 1:], 2, keys[:, :, :1], keys[:, :, :1])
    mass.absorb(Entries(0, 1, keys, keys, position, torch.tensor([2]), stats), kept)
    assert stats["bias"][0, 0, 0] == pytest.approx(np.log(2)) and stats["sum"][0, 0, 0] == pytest.approx(0.4)
    assert kept.values.flatten().tolist() == [1.5, 0.0]


# --- budgets --------------------------------------------------------------------------------------------------------


def recorded(
    monkeypatch: pytest.MonkeyPatch, length: int, budget: str, policy: str
) -> tuple[Session, dict[int, tuple[Any, ...]]]:
    """A session with the policy, and each layer's queries, keys, values of the prompt in float64, and the scale."""
    fresh: dict[int, tuple[Any, Any]] = {}
    log: dict[int, tuple[Any, ...]] = {}
    receive, attend = PolicyCache.receive, PolicyLayer.attend

    def spy_receive(self: PolicyCache, layer: PolicyLayer, keys: Any, values: Any) -> Any:
        fresh[layer.index] = keys[0].double().numpy(), values[0].double().numpy()
        return receive(self, layer, keys, values)

    def spy_attend(self: PolicyLayer, query: Any, scale: float, mask: Any) -> Any:
        log.setdefault(self.index, (query[0].double().numpy(), *fresh[self.index], scale))
        return attend(self, query, scale, mask)

    monkeypatch.setattr(PolicyCache, "receive", spy_receive)
    monkeypatch.setattr(PolicyLayer, "attend", spy_attend)
    model = tiny_model.__wrapped__("llama-deep")  # whose heads and layers weigh unequally after attention
    for index, layer in enumerate(model.model.model.layers):
        weight = layer.self_attn.o_proj.weight.data
        weight *= torch.linspace(0.2, 2, weight.shape[1]) * (1.0, 3.0, 0.5, 2.0, 0.3)[index]
    session = opened(policy, length, budget=budget, model=model)
    monkeypatch.undo()
    return session, log


def errors_of(layer: int, given: tuple[Any, ...], keep: int, projection: Any) -> list[float]:
    """What keeping ``keep`` entries costs each KV head of a layer: squared error behind W_O of the last queries."""
    queries, keys, values, scale = given
    held = rules.Layer(rules.MassD2O, keep, layer, len(keys))
    outputs = held.read(queries, keys, values, scale)
    return rules.errors(held, queries, outputs, scale, projection)


@pytest.mark.parametrize("policy", [MASS, HEADS])
@pytest.mark.parametrize(("length", "budget"), [(96, "0.2"), (50, "0.3")])
def test_budgets_follow_the_error_behind_the_projection(
    length: int, budget: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, log = recorded(monkeypatch, length, budget, policy)
    keep = round(float(budget) * length)
    weights = [layer.self_attn.o_proj.weight.double().numpy() for layer in session.loaded.model.model.layers]
    cost = np.array([errors_of(index, given, keep, weights[index]) for index, given in log.items()])
    cost = cost.flatten() if policy == HEADS else cost.sum(1)
    total = round(float(budget) * length * len(log)) * len(cost) // len(log)
    mean = total / len(cost)
    expected = rules.filled(cost.tolist(), total, round(0.35 * mean), min(length, np.ceil(4 * mean)))
    budgets = session.cache.budgets[:, 0].numpy().flatten()
    assert budgets.sum() == total and len(set(budgets)) > 1
    assert np.abs(budgets - expected).max() < 1.01, (budgets, expected)


def test_a_trial_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same budgets, what is kept does not depend on whether errors were measured before."""
    equal = opened("d2o(preset=mass,allocate=uniform)", 60)
    monkeypatch.setattr("d2obench.policies.d2o.shares", lambda density, rule, alpha: torch.full_like(density, 1 / 5))
    tried = opened(MASS, 60)
    assert torch.equal(tried.cache.budgets, equal.cache.budgets)
    tokens = torch.tensor([3])
    assert all(torch.equal(equal.step(tokens), tried.step(tokens)) for _ in range(9))


def test_a_prompt_is_compressed_again_from_a_snapshot() -> None:
    session = Session(tiny_model("llama-deep"), MASS, "0.3", max_new=12)
    session.prefill(prompts(60, 41))
    saved, tokens, found = session.snapshot(), torch.tensor([3, 5]), []
    for _ in range(2):
        session.compress()
        found.append(torch.stack([session.step(tokens) for _ in range(4)]))
        session.restore(saved)
    assert torch.equal(*found)


def test_shares_of_errors() -> None:
    assert shares(torch.tensor([4.0, 1.0, 0.0]), "error").tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert shares(torch.zeros(4), "error").tolist() == [0.25] * 4


# --- the whole ------------------------------------------------------------------------------------------------------


def test_the_preset_stands_for_its_parts() -> None:
    parts = "allocate=error,merge=mass,recent=0.2,normalised=true,value_norms=true,diversity=true,mass_share=0.5"
    tokens, found = torch.tensor([3, 5]), []
    for policy in (MASS, f"d2o({parts})"):
        session = opened(policy, 60, 41)
        found.append(torch.stack([session.step(tokens) for _ in range(9)]))
    assert torch.equal(*found)
    assert parse_policy("d2o(preset=mass,merge=none)").merge_spec is None


def test_biases_count_as_what_the_cache_holds() -> None:
    plain, biased = (opened(f"d2o(preset={name},allocate=uniform)", 60, 41).footprint() for name in ("tuned", "mass"))
    slots = (18 + 1) * 5 * 2 * tiny_heads()
    assert biased.kv_bytes - plain.kv_bytes == biased.prompt_kv_bytes - plain.prompt_kv_bytes == 4 * slots
    assert plain.state_bytes > 0 and biased.merged == biased.evicted > 0


def tiny_heads() -> int:
    return int(tiny_model("llama-deep").model.config.num_key_value_heads)


@pytest.mark.parametrize("policy", [MASS, HEADS, "snapkv(window=4,merge=mass)", "streaming(merge=mass)"])
def test_biases_outlive_a_turn(policy: str) -> None:
    """What the prompt's evicted entries gave to kept ones is still there after a second block has been read."""
    session = opened(policy, 60)
    before = biases(session)
    assert before > 0
    model = session.loaded.model
    with torch.inference_mode():
        model(torch.arange(3, 9)[None], **{keyword(model): session.cache})
    session.cache.compress()
    assert biases(session) > 0.5 * before


def biases(session: Session) -> float:
    bias = session.cache.state.bias
    return float(bias[bias > 0].sum())


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("d2o(merge=mass,hosts=important)", "merge=mass has no threshold"),
        ("d2o(preset=mass,threshold=layer)", "merge=mass has no threshold"),
        ("streaming(positions=cache,merge=mass)", "needs true positions"),
        ("h2o(merge=kv)", "merge"),
        ("d2o(heads=true)", "heads=true is for allocate=error"),
    ],
)
def test_what_does_not_go_together_says_so(policy: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        parse_policy(policy)


def test_evicting_in_groups_merges_by_mass_too() -> None:
    session = opened("d2o(preset=mass,interval=3)", 60, 41)
    before = session.footprint()
    for token in range(3, 14):
        assert session.step(torch.tensor([token, token + 1])).isfinite().all()
    after = session.footprint()
    assert after.merged - before.merged == after.evicted - before.evicted > 0


# --- equal bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "budget"),
    [
        (MASS, "0.5"), (HEADS, "0.5"), ("d2o(preset=mass,allocate=uniform)", "224"), ("h2o(merge=mass)", "0.5"),
        ("streaming(merge=mass)", "224"), ("keepkv", "0.5"), ("d2o(preset=mass)+quant(bits=8)", "0.5"),
    ],
)  # fmt: skip
def test_equal_bytes_are_those_of_slots_without_biases(policy: str, budget: str) -> None:
    """Counted from storage: an unbiased policy of the same budget, and this one, which has fewer slots for it."""
    name, plus, bits = policy.partition("+")
    equal = (f"{name[:-1]}," if name.endswith(")") else f"{name}(") + "equal=bytes)" + plus + bits
    texts = policy, equal, "h2o" + plus + bits
    slots, fair, plain = (opened(text, 400, budget=budget).footprint() for text in texts)
    one = 1.01 / np.mean(plain.kept)  # a slot
    assert abs(fair.prompt_kv_bytes / plain.prompt_kv_bytes - 1) < one
    assert slots.prompt_kv_bytes / plain.prompt_kv_bytes > 1 + 2 * one
    assert fair.requested is not None and plain.requested is not None and fair.requested < plain.requested


def test_equal_bytes_need_biases_and_a_budget_of_the_prompt() -> None:
    for text, said in (
        ("h2o(equal=bytes)", "without a merge by mass"),
        ("d2o(equal=bytes)", "without a merge by mass"),
        ("streaming(merge=mass,protect=prompt,equal=bytes)", "are not part of the budget"),
    ):
        with pytest.raises(PolicyError, match=said):
            parse_policy(text)
