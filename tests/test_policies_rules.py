"""Every policy on the engine against its slow float64 reference, and the equivalences between policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from reference import released, rules
from tiny_families import prompts, tiny_model

from d2obench.cache import Session
from d2obench.cache.policy_cache import PolicyCache, PolicyLayer
from d2obench.errors import PolicyError
from d2obench.models import LoadedModel
from d2obench.policies import parse_choice
from d2obench.policies.base import Entries
from d2obench.policies.random import uniform
from d2obench.policies.roco import RoCo
from d2obench.policies.snapkv import PyramidKV
from d2obench.suite.grammar import Budget

LENGTH, STEPS, SEED = 70, 40, 5


@dataclass
class Log:
    """What a layer was given: ``(q, k, v, scale)`` of the prompt and of each step; and what it answered."""

    given: list[tuple[Any, ...]] = field(default_factory=list)
    outs: list[Any] = field(default_factory=list)


def recorded(policy: Any, budget: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Session, dict[int, Log]]:
    logs: dict[int, Log] = {}
    fresh: dict[int, tuple[Any, Any]] = {}
    receive, attend = PolicyCache.receive, PolicyLayer.attend

    def spy_receive(self: PolicyCache, layer: PolicyLayer, keys: Any, values: Any) -> Any:
        fresh[layer.index] = (keys[0].double().numpy(), values[0].double().numpy())
        return receive(self, layer, keys, values)

    def spy_attend(self: PolicyLayer, query: Any, scale: float, mask: Any) -> Any:
        out = attend(self, query, scale, mask)
        log = logs.setdefault(self.index, Log())
        log.given.append((query[0].double().numpy(), *fresh[self.index], scale))
        log.outs.append(out[0].double().numpy())
        return out

    monkeypatch.setattr(PolicyCache, "receive", spy_receive)
    monkeypatch.setattr(PolicyLayer, "attend", spy_attend)
    session = Session(tiny_model("llama-deep"), policy, budget, max_new=STEPS, seed=SEED)
    logits = session.prefill(prompts(LENGTH))
    session.compress()
    for _ in range(STEPS):
        logits = session.step(logits.argmax(-1))
    monkeypatch.undo()
    return session, logs


def held(session: Session, layer: int, head: int) -> list[int]:
    state = session.cache.state
    assert state is not None
    return sorted(int(position) for position in state.where()[layer, head] if position >= 0)


def compare(session: Session, logs: dict[int, Log], layers: list[Any], heads: Any) -> None:
    for index, (layer, log) in enumerate(zip(layers, logs.values(), strict=True)):
        layer.prompt(*log.given[0])
        for step, (given, out) in enumerate(zip(log.given[1:], log.outs[1:], strict=True)):
            q, k, v, scale = given
            expected = layer.step(q[:, 0], k[:, 0], v[:, 0], scale, LENGTH + step)
            assert np.abs(expected - out[0]).max() < 1e-4 * max(1.0, np.abs(expected).max()), (index, step)
        for head, positions in enumerate(heads(layer)):
            assert held(session, index, head) == positions


@pytest.mark.parametrize(("recent", "budget"), [(0.3, 50), (0.0, 50), (0.6, 20), (0.3, 4)])
def test_roco_keeps_what_varies_whatever_its_mean(recent: float, budget: int) -> None:
    """On real maps mean and deviation go together; here they are drawn apart."""
    length, generator = 80, torch.Generator().manual_seed(1)
    seen = torch.arange(length, 0, -1)
    mean, deviation = (torch.rand(1, 1, length, generator=generator) for _ in range(2))
    stats = {"sum": mean * seen, "square": (deviation**2 + mean**2) * seen}
    position, none = torch.arange(length).expand(1, 1, -1), torch.zeros(1, 1, length, 2)
    entries = Entries(0, 1, none, none, position, torch.tensor([length]), stats)
    rank = RoCo(recent=recent).rank(entries, torch.tensor([budget]))[0, 0]
    newest = min(10, budget // 2)
    spread = {j: np.inf if j >= length - newest else float(deviation[0, 0, j]) for j in range(length)}
    safe = rules.best(spread, max(int(budget * recent) + 1, newest))
    others = {j: float(mean[0, 0, j]) for j in range(length) if j not in safe}
    assert set(rank.topk(budget).indices.tolist()) == safe | rules.best(others, budget - len(safe))


def test_pyramidkv_is_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    session, logs = recorded("pyramidkv(window=6,beta=4,decode=slide)", "0.3", monkeypatch)
    budgets = session.cache.budgets
    assert budgets is not None
    ideal = rules.pyramid(5, round(0.3 * LENGTH), LENGTH, 6, 4)
    assert np.abs(np.array(ideal) - budgets[:, 0].numpy()).max() < 1
    assert int(budgets.sum()) == 5 * round(0.3 * LENGTH)
    layers = [rules.Layer(rules.SnapKV, int(count), index, 2) for index, count in enumerate(budgets[:, 0])]
    compare(session, logs, layers, lambda layer: [head.held for head in layer.heads])


@pytest.mark.parametrize(("window", "budget"), [(4, 20), (4, 60), (32, 40), (32, 32), (8, 100), (8, 99)])
def test_pyramidkv_budgets_fall_and_sum_up(window: int, budget: int) -> None:
    stats: list[Any] = [{}] * 7
    rows = PyramidKV(window=window).layer_budgets(stats, torch.tensor([100]), Budget(tokens=budget))[:, 0].tolist()
    assert sum(rows) == 7 * budget
    assert rows == sorted(rows, reverse=True)
    assert max(rows) <= 100
    if budget > window:
        ideal = rules.pyramid(7, budget, 100, window, 20)
        assert max(abs(a - b) for a, b in zip(rows, ideal, strict=True)) <= 1


@pytest.mark.parametrize("ratio", ["0.05", "0.3", "0.6", "0.99"])
def test_released_is_its_reference(ratio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the authors' code does something else and says nothing: with fewer than four heavy tokens it drops
    some sinks, and a layer that has room for the whole prompt grows without limit."""
    session, logs = recorded("d2o(preset=released)", ratio, monkeypatch)
    sums = [released.column_sums(*(log.given[0][i] for i in (0, 1, 3))) for log in logs.values()]
    shares = released.shares(sums, float(ratio))
    exempt = (0, 1, len(logs) - 1)
    layers = [released.Layer(None if index in exempt else share) for index, share in enumerate(shares)]
    compare(session, logs, layers, lambda layer: layer.at)
    merged = [layer.merged for layer in layers]
    assert sum(merged) > 20
    assert session.footprint().merged_layers == merged
    compressed = [layer for layer in layers if layer.share is not None]
    if ratio == "0.05":
        assert all(
            positions[: layer.heavy] == [0, 1, 2][: layer.heavy] for layer in compressed for positions in layer.at
        )
    if ratio == "0.99":
        (whole,) = [layer for layer in compressed if layer.share == 1.0]
        assert {len(positions) for positions in whole.at} == {LENGTH}


def test_released_with_carried_thresholds_is_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the authors' module in one process: the second prompt's thresholds follow the first one's."""
    found = {}
    for carry in ("true", "false"):
        policy = f"d2o(preset=released,carry_threshold={carry})"
        layers: list[Any] = []
        built = parse_choice(policy).policy
        for _ in range(2):
            session, logs = recorded(built, "0.3", monkeypatch)
            sums = [released.column_sums(*(log.given[0][i] for i in (0, 1, 3))) for log in logs.values()]
            exempt = (0, 1, len(logs) - 1)
            before = layers if carry == "true" else []
            layers = [
                released.Layer(None if index in exempt else share, before[index].tau if before else None)
                for index, share in enumerate(released.shares(sums, 0.3))
            ]
            compare(session, logs, layers, lambda layer: layer.at)
            assert session.footprint().merged_layers == [layer.merged for layer in layers]
        found[carry] = session.footprint().merged
    assert found["true"] != found["false"]
    session = Session(tiny_model("llama-deep"), policy.replace("false", "true"), "0.3", max_new=2)
    session.prefill(prompts(30, 30))
    session.compress()
    with pytest.raises(PolicyError, match="one prompt at a time"):
        session.step(torch.tensor([3, 4]))


def test_pyramidkv_may_give_short_prompts_equal_layers() -> None:
    stats: list[Any] = [{}] * 7
    for length, equal in ((99, True), (120, False)):  # b = 50 without its window of 10
        rows = PyramidKV(window=10, short="equal").layer_budgets(stats, torch.tensor([length]), Budget(tokens=60))[:, 0]
        assert (set(rows.tolist()) == {60}) is equal
        assert int(rows.sum()) == 7 * 60


def test_roco_may_keep_a_prompts_sinks() -> None:
    """Whatever the first tokens' attention; the others are chosen as before, by one place less for each."""
    length, budget = 60, 20
    seen = torch.arange(length, 0, -1)
    mean = torch.rand(1, 1, length, generator=torch.Generator().manual_seed(1))
    mean[..., :4] = 0.0
    stats = {"sum": mean * seen, "square": mean**2 * seen}
    position, none = torch.arange(length).expand(1, 1, -1), torch.zeros(1, 1, length, 2)
    entries = Entries(0, 1, none, none, position, torch.tensor([length]), stats)
    kept = [
        set(RoCo(sinks=sinks).rank(entries, torch.tensor([budget]))[0, 0].topk(budget).indices.tolist())
        for sinks in (0, 4)
    ]
    assert not kept[0] & {0, 1, 2, 3} and {0, 1, 2, 3} <= kept[1]
    assert len(kept[0] - kept[1]) == 4


# --- equivalences ---------------------------------------------------------------------------------------------------


def logits_of(model: LoadedModel, policy: str, texts: list[list[int]]) -> torch.Tensor:
    session = Session(model, policy, "0.3" if parse_choice(policy).takes_budget else None, max_new=20, seed=2)
    out = [session.prefill(texts)]
    session.compress()
    out += [session.step(torch.tensor([step % 100 for _ in texts])) for step in range(20)]
    return torch.stack(out)


@pytest.mark.parametrize(
    ("policy", "other"),
    [
        ("streaming(sinks=0)", "local"),
        ("d2o(allocate=uniform,merge=none,sinks=0,recent=0.5)", "h2o"),
        ("pyramidkv(window=5,beta=1)", "snapkv(window=5)"),
        ("pyramidkv(window=5,beta=1,decode=slide)", "snapkv(window=5,decode=slide)"),
        ("cam(merge=false,start=0.25)", "streaming(sinks=6)"),
        ("streaming(sinks=0,positions=cache)", "local"),
        ("quant(bits=16)", "full"),
        ("d2o+quant(bits=16)", "d2o"),
        ("full+quant(bits=8)", "quant(bits=8)"),
    ],
)
def test_two_ways_to_say_the_same(policy: str, other: str) -> None:
    model, texts = tiny_model("llama-deep"), prompts(80, 80)
    assert torch.equal(logits_of(model, policy, texts), logits_of(model, other, texts))


def test_h2o_that_is_all_recent_is_a_window() -> None:
    model, texts = tiny_model("llama-deep"), prompts(80, 61)
    h2o, local = logits_of(model, "h2o(recent=1.0)", texts), logits_of(model, "local", texts)
    assert torch.allclose(h2o, local, atol=1e-4), "the prompt goes through two kernels"


def test_a_draw_is_the_hash_of_its_place_and_even() -> None:
    layer, head = torch.arange(3)[:, None, None], torch.arange(4)[:, None]
    drawn = uniform(7, layer, head, torch.arange(500).expand(3, 4, 500))
    for place in ((0, 0, 0), (2, 3, 499), (1, 2, 77)):
        assert drawn[place] == rules.draw(7, *place)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, 20)
    assert (counts - 300).abs().max() < 75, "about 4 standard deviations of a count"
    assert not torch.equal(drawn, uniform(8, layer, head, torch.arange(500).expand(3, 4, 500)))


def test_the_seed_reaches_the_draw() -> None:
    def run(policy: str, seed: int) -> torch.Tensor:
        session = Session(tiny_model("llama-deep"), policy, "0.3", max_new=20, seed=seed)
        session.prefill(prompts(60))
        session.compress()
        return torch.stack([session.step(torch.tensor([step])) for step in range(20)])

    for policy in ("random", "cam"):
        assert torch.equal(run(policy, 1), run(policy, 1))
        assert not torch.equal(run(policy, 1), run(policy, 2))
