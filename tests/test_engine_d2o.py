"""D2O on the engine against golden vectors, a float64 reference, and its own equivalences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import d2o as reference

from d2obench.cache import Session
from d2obench.cache.policy_cache import PolicyCache, PolicyLayer
from d2obench.decode import backend
from d2obench.policies import parse_policy
from d2obench.policies.allocation import density, shares, water_fill
from d2obench.policies.d2o import D2O
from d2obench.policies.merging import mean_over, merge_into, nearest
from d2obench.suite.grammar import parse_budget
from d2obench.texts.writer import token_ids

KEPT_KEYS = [(2.0, 0.0), (0.0, 1.0)]
KEPT_VALUES = [(1.0, 0.0), (0.0, 1.0)]
EVICTED_KEYS = [(1.0, 0.0), (1.0, 1.0), (3.0, 4.0), (-1.0, 0.2)]
EVICTED_VALUES = [(3.0, 1.0), (2.0, 2.0), (0.0, 4.0), (5.0, 5.0)]


def rows(pairs):
    return torch.tensor([pairs])


# --- golden vectors -------------------------------------------------------------------------------------------------


def test_prompt_merge_golden():
    u, host = nearest(rows(EVICTED_KEYS), rows(KEPT_KEYS), torch.ones(1, 2, dtype=torch.bool))
    assert u[0].tolist() == pytest.approx([1, 0.70710678, 0.8, 0.19611614], abs=1e-6)
    assert host[0].tolist() == [0, 0, 1, 1]
    tau = mean_over(u, torch.ones(1, 4, dtype=torch.bool))
    assert tau.item() == pytest.approx(0.67580573, abs=1e-6)
    weight = torch.where(u >= tau, u.exp(), 0.0)
    pairs = (rows(KEPT_KEYS), rows(EVICTED_KEYS)), (rows(KEPT_VALUES), rows(EVICTED_VALUES))
    keys, values = merge_into(host, weight, *pairs)
    assert keys[0].flatten().tolist() == pytest.approx([1.36415256, 0.27169488, 1.35049801, 2.35049801], abs=1e-6)
    assert values[0].flatten().tolist() == pytest.approx([2.0, 0.90754232, 0.0, 2.35049801], abs=1e-6)


def test_reference_golden():
    head = reference.Head(budget=2, sinks=0, recent=0)
    head.entries = [
        reference.Entry(i, np.array(k), np.array(v), 0.0)
        for i, (k, v) in enumerate(zip(KEPT_KEYS, KEPT_VALUES, strict=True))
    ]
    evicted = [
        reference.Entry(9, np.array(k), np.array(v), 0.0) for k, v in zip(EVICTED_KEYS, EVICTED_VALUES, strict=True)
    ]
    found = [head._nearest(e) for e in evicted]
    head.tau = np.mean([u for u, _ in found])
    for j in (0, 1):
        head._absorb(
            head.entries[j], [(e, u) for e, (u, k) in zip(evicted, found, strict=True) if k == j and u >= head.tau]
        )
    for key, value, tau, merged in (
        ((1.0, 0.5), (1.0, 1.0), 0.87792872, True),
        ((-1.0, 0.1), (0.0, 0.0), -0.02322517, False),
    ):
        before = head.merged
        head.entries.append(reference.Entry(2, np.array(key), np.array(value), -1.0))
        head._evict(newest=9)
        assert head.tau == pytest.approx(tau, abs=1e-6)
        assert (head.merged > before) is merged
    assert head.entries[0].key.tolist() == pytest.approx([1.18530298, 0.38382446], abs=1e-6)
    assert head.entries[0].value.tolist() == pytest.approx([1.50886086, 0.95295191], abs=1e-6)


def test_allocation_golden():
    spread = torch.tensor([1.2, 5, 40, 200, 900], dtype=torch.float64)
    assert (shares(spread, "raw") * 5 * 0.2).tolist() == pytest.approx([0.9781, 0.0219, 0, 0, 0], abs=1e-4)
    alpha = shares(spread, "softmax")
    assert (alpha * 5 * 0.2).tolist() == pytest.approx([0.2425, 0.2415, 0.2323, 0.1944, 0.0892], abs=1e-4)
    filled = water_fill(alpha.tolist(), 40_000, 100, 10_000)
    assert [b / 10_000 for b in filled] == pytest.approx([0.9702, 0.9661, 0.9292, 0.7777, 0.3569], abs=2e-4)
    assert sum(filled) == 40_000


# --- allocation -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1e4), min_size=1, max_size=40),
    st.integers(1, 4096),
    st.floats(0.01, 1),
    st.sampled_from(["softmax", "raw", "threshold", "uniform"]),
)
def test_allocation_properties(spread, length, ratio, rule):
    share = shares(torch.tensor(spread, dtype=torch.float64), rule)
    total = round(ratio * length * len(spread))
    floor = 6
    budgets = water_fill(share.tolist(), total, floor, length)
    assert sum(budgets) == max(total, len(spread) * min(floor, total // len(spread), length))
    assert max(budgets) <= length
    assert min(budgets) >= min(floor, total // len(spread), length)
    for a, fa in zip(budgets, spread, strict=True):
        for b, fb in zip(budgets, spread, strict=True):
            assert not (fa > fb and a > b + 1), "a layer of higher variance never gets more, but for rounding"


def test_density_ignores_padding():
    sums = torch.rand(1, 50)
    padded = torch.nn.functional.pad(sums, (14, 0))
    assert density(padded, torch.tensor([50])).item() == pytest.approx(sums.double().var().item(), rel=1e-12)


# --- against the float64 reference ------------------------------------------------------------------------------------


@dataclass
class Record:
    """What a layer was given and answered: prompt q, k, v, then one of each per step."""

    prompt: tuple
    steps: list
    outs: list


def recorded(loaded, policy, budget, prompt, steps, monkeypatch):
    """Runs a session and keeps each layer's own queries, keys, values and outputs."""
    log: dict[int, Record] = {}
    given_kv = {}
    receive, attend = PolicyCache.receive, PolicyLayer.attend

    def spy_receive(self, layer, keys, values):
        given_kv[layer.index] = (keys[0].double().numpy(), values[0].double().numpy())
        return receive(self, layer, keys, values)

    def spy_attend(self, query, scale, mask):
        out = attend(self, query, scale, mask)
        q, (k, v) = query[0].double().numpy(), given_kv[self.index]
        if self.index not in log:
            log[self.index] = Record((q, k, v, scale), [], [])
        else:
            log[self.index].steps.append((q[:, 0], k[:, 0], v[:, 0], scale))
            log[self.index].outs.append(out[0, 0].double().numpy())
        return out

    monkeypatch.setattr(PolicyCache, "receive", spy_receive)
    monkeypatch.setattr(PolicyLayer, "attend", spy_attend)
    session = Session(loaded, policy, budget, max_new=steps)
    logits = session.prefill([prompt])
    session.compress()
    for _ in range(steps):
        logits = session.step(logits.argmax(-1))
    monkeypatch.undo()
    return session, log


def check_against_reference(loaded, spec, budget, prompt, steps, monkeypatch, tolerance):
    policy = parse_policy(spec)
    session, log = recorded(loaded, spec, budget, prompt, steps, monkeypatch)
    layers, length = len(log), len(prompt)
    sums = []
    for layer in range(layers):
        q, k, _, scale = log[layer].prompt
        group = q.shape[0] // k.shape[0]
        sums.append([reference.column_sums(q[h * group : (h + 1) * group], k[h], scale) for h in range(k.shape[0])])
    total = round(parse_budget(budget).ratio * length * layers)
    share = reference.shares([reference.density(s) for s in sums])
    budgets = session.cache.budgets[:, 0].tolist()
    assert sum(budgets) == total
    assert max(abs(b - a * total) for a, b in zip(share, budgets, strict=True)) < max(1.0, 0.02 * total)
    worst = 0.0
    for layer in range(layers):
        _, k, v, scale = log[layer].prompt
        group = log[layer].prompt[0].shape[0] // k.shape[0]
        merged = evicted = 0
        for h in range(k.shape[0]):
            keep = budgets[layer]
            head = reference.Head(keep, policy.sinks, max(1, round(keep * policy.recent)), policy.beta, policy.merge)
            head.prompt(k[h], v[h], sums[layer][h])
            errors = []
            for (q1, k1, v1, s1), out in zip(log[layer].steps, log[layer].outs, strict=True):
                expected = head.step(q1[h * group : (h + 1) * group], k1[h], v1[h], s1)
                got = out[h * group : (h + 1) * group]
                errors.append(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-9))
            worst = max(worst, *errors)
            positions = session.cache.state.position[layer, h]
            victim = int(session.cache.state.slot[layer, h])
            held = sorted(int(p) for i, p in enumerate(positions) if p >= 0 and i != victim)
            assert held == sorted(e.position for e in head.entries)
            merged += head.merged
            evicted += length + steps - len(held)
        footprint = session.footprint()
        assert footprint.evicted_layers[layer] == evicted
        assert 0 <= merged - footprint.merged_layers[layer] <= k.shape[0]  # the last step's are still carried
    assert worst < tolerance
    return session


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("spec", ["d2o", "d2o(merge=values)", "d2o(merge=none)", "d2o(sinks=2,recent=0.5,beta=0.3)"])
def test_engine_equals_reference(tiny, spec, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(backend, "OFFERS", ())
    prompt = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    check_against_reference(tiny, spec, "0.4", prompt, 25, monkeypatch, 1e-4)


@pytest.mark.model
def test_engine_equals_reference_on_the_real_model(embedded, monkeypatch):
    prompt = token_ids(4, 150, lambda text: embedded.tokenizer(text).input_ids)[:150]
    session = check_against_reference(embedded, "d2o", "0.3", prompt, 12, monkeypatch, 1e-3)
    assert session.footprint().merged > 0


# --- equivalences -----------------------------------------------------------------------------------------------------


def tokens(loaded, policy, budget, prompts, steps=24):
    session = Session(loaded, policy, budget, max_new=steps)
    logits = session.prefill(prompts)
    session.compress()
    out = []
    for _ in range(steps):
        out.append(logits.argmax(-1))
        logits = session.step(out[-1])
    return torch.stack(out, 1), logits, session


def random_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def test_uniform_unmerged_without_sinks_is_h2o(tiny):
    prompts = random_prompts(80, 64)
    ours, logits, _ = tokens(tiny, "d2o(allocate=uniform,merge=none,sinks=0,recent=0.5)", "0.3", prompts)
    h2o, expected, _ = tokens(tiny, "h2o", "0.3", prompts)
    assert torch.equal(ours, h2o)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("policy", ["d2o", "h2o", "streaming", "local"])
def test_budget_of_everything_is_full(tiny, policy):
    prompts = random_prompts(70, 51)
    full, expected, _ = tokens(tiny, "full", None, prompts)
    ratio, logits, session = tokens(tiny, policy, "1.0", prompts)
    assert torch.equal(ratio, full)
    assert torch.equal(logits, expected)
    count, logits, _ = tokens(tiny, policy, "100", prompts)
    assert torch.equal(count, full)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert session.footprint().effective == 1.0


def test_evicting_in_groups_of_one_is_the_plain_step(tiny):
    prompts = random_prompts(80, seed=7)
    one, logits, _ = tokens(tiny, "d2o(interval=1)", "0.25", prompts)
    default, expected, _ = tokens(tiny, "d2o", "0.25", prompts)
    assert torch.equal(one, default)
    assert torch.equal(logits, expected)


def test_groups_evict_and_merge_together(tiny):
    prompts = random_prompts(80, seed=8)
    _, _, session = tokens(tiny, "d2o(interval=4)", "0.25", prompts, steps=22)
    footprint = session.footprint()
    budget = sum(row[0] for row in footprint.kept)
    assert budget <= sum(row[0] for row in footprint.held) <= budget + 3 * len(footprint.held)
    assert footprint.merged > 0


@settings(max_examples=200)
@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 0.99))
def test_threshold_after_and_before_the_update_agree(u, tau, beta):
    updated = beta * u + (1 - beta) * tau
    if abs(u - tau) > 1e-9:
        assert (u >= updated) == (u >= tau)


# --- properties of the merge ------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 20))
def test_merge_is_convex_and_leaves_other_hosts_alone(seed, kept_count, evicted_count):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randn(2, kept_count, 8, generator=generator)
    evicted = torch.randn(2, evicted_count, 8, generator=generator)
    u, host = nearest(evicted, kept, torch.ones(2, kept_count, dtype=torch.bool))
    weight = torch.where(u >= u.mean(1, keepdim=True), u.exp(), 0.0)
    (merged,) = merge_into(host, weight, (kept, evicted))
    for row in range(2):
        chosen = {int(h) for h, w in zip(host[row], weight[row], strict=True) if w > 0}
        for j in range(kept_count):
            if j not in chosen:
                assert torch.equal(merged[row, j], kept[row, j])
            parts = [kept[row, j]] + [evicted[row, i] for i in range(evicted_count) if host[row, i] == j]
            assert merged[row, j].norm() <= max(part.norm() for part in parts) + 1e-5


def test_zero_keys_and_ties_give_no_nan():
    kept = torch.zeros(1, 3, 4)
    u, host = nearest(torch.zeros(1, 2, 4), kept, torch.ones(1, 3, dtype=torch.bool))
    assert u.tolist() == [[0.0, 0.0]]
    assert host.tolist() == [[0, 0]]
    assert torch.isfinite(merge_into(host, u.exp(), (kept, torch.zeros(1, 2, 4)))[0]).all()


@pytest.mark.parametrize("budget", ["1", "2", "3", "5", "6", "0.01", "0.99"])
@pytest.mark.parametrize("policy", ["d2o", "h2o", "streaming", "local", "d2o(interval=3)"])
def test_small_budgets_and_prompts(tiny, policy, budget):
    for length in (1, 2, 5, 9):
        _, logits, session = tokens(tiny, policy, budget, random_prompts(length), steps=8)
        assert torch.isfinite(logits).all()
        footprint, asked = session.footprint(), parse_budget(budget)
        layers = len(footprint.kept)
        most = max(layers * asked.of(length), round((asked.ratio or 0) * length * layers))
        assert sum(row[0] for row in footprint.kept) <= min(most, layers * length)
        late = 2 * layers if "interval=3" in policy else 0
        assert sum(row[0] for row in footprint.held) <= most + late


def test_nothing_is_left_over_between_prompts(tiny):
    first = tokens(tiny, "d2o", "0.3", random_prompts(70, seed=1))[0]
    tokens(tiny, "d2o", "0.3", random_prompts(50, seed=2))
    assert torch.equal(first, tokens(tiny, "d2o", "0.3", random_prompts(70, seed=1))[0])


def test_presets_stand_for_parameters_and_give_way_to_them():
    assert parse_policy("d2o(preset=paper)") == D2O()
    tuned = parse_policy("d2o(preset=tuned)")
    assert (tuned.allocate, tuned.merge, tuned.recent) == ("uniform", "none", 0.5)
    assert parse_policy("d2o(preset=tuned,merge=values)").merge == "values"
