"""One prefill for several policies: the numbers of a prefill of its own, and no more memory than is said."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_cache_prefill import Alive
from test_policies_matrix import POLICIES
from tiny_families import CONFIGS, prompts, tiny_model

from d2obench.attention import prompt as prefill
from d2obench.cache import PolicyCache, Session
from d2obench.cache.reading import Reader, Readings, needs_of, way_of
from d2obench.errors import UsageError
from d2obench.models import LoadedModel
from d2obench.policies import parse_choice, parse_policy
from d2obench.policies.base import Needs, Policy
from d2obench.policies.h2o import H2O
from d2obench.suite.grammar import Budget, parse_budget

FEW = ["full", "streaming", "h2o", "snapkv(window=4)", "snapkv(window=9,merge=mass)", "roco", "d2o", "d2o(preset=mass)",
       "d2o(preset=released)", "random", "quant(bits=8)"]  # fmt: skip
STEPS = 4


def budgets_of(policy: str) -> list[Budget | None]:
    if not parse_choice(policy).takes_budget:
        return [None]
    return [parse_budget(text) for text in (("0.3", "12", "1.0") if policy in ("h2o", "d2o") else ("0.3", "1.0"))]


def every(policies: list[str]) -> list[tuple[Policy, Budget | None]]:
    return [(parse_policy(policy), budget) for policy in policies for budget in budgets_of(policy)]


def drive(session: Session, logits: torch.Tensor, turns: list[list[int]]) -> list[Any]:
    """Everything that a session gives: logits, sizes, and the state at the end, with a turn in its midst."""
    session.compress()
    found: list[Any] = [logits, session.footprint()]
    count = len(session.footprint().prompt_tokens)
    for step in range(STEPS):
        found.append(session.step(torch.arange(count) + step + 3))
    found.append(session.turn(turns[:count]))
    found.append(session.step(torch.arange(count) + 7))
    state = session.cache.state
    return [*found, session.footprint(), *(held.clone() for held in state.tensors()[:8])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def check(model: LoadedModel, policies: list[str], texts: list[list[int]]) -> None:
    asked, turns = every(policies), prompts(5, 5, seed=5)
    readings = Readings(asked)
    for policy, budget in asked:
        policy = replace(policy)  # an object of its own, as each cell has
        shared = Session(model, policy, budget, max_new=16, seed=3)
        logits = readings.prefill(shared, texts)
        assert readings._held is not None
        before = [held.clone() for held in _tensors(readings._held[1].cache)]
        found = drive(shared, logits, turns)
        alone = Session(model, policy, budget, max_new=16, seed=3)
        expected = drive(alone, alone.prefill(texts), turns)
        assert len(found) == len(expected)
        differing = [i for i, pair in enumerate(zip(found, expected, strict=True)) if not same(*pair)]
        assert not differing, (policy, str(budget))
        held = _tensors(readings._held[1].cache)
        assert all(torch.equal(one, other) for one, other in zip(before, held, strict=True)), "nothing wrote to it"


def _tensors(cache: PolicyCache) -> list[torch.Tensor]:
    found = []
    for layer in cache.own:
        found += [layer.keys, layer.values, *layer.stats.values()]
    return [held for held in found if held is not None]


def test_all_policies_get_the_numbers_of_their_own_prefill() -> None:
    check(tiny_model("llama-gqa2"), POLICIES, prompts(41, 30))


@pytest.mark.slow
def test_without_padding_as_well() -> None:
    check(tiny_model("llama-gqa2"), POLICIES, prompts(41))


def cases() -> list[Any]:
    """Every family and dtype; slow: those without anything special."""
    wanted = [(family, "float32") for family in CONFIGS] + [("llama-gqa2", "bfloat16"), ("llama-gqa2", "float16")]
    quick = [("gemma3", "float32"), ("falcon", "float32"), ("llama-gqa2", "bfloat16")]
    return [pytest.param(*one, marks=[] if one in quick else [pytest.mark.slow]) for one in wanted]


@pytest.mark.parametrize(("family", "dtype"), cases())
def test_all_families_and_dtypes(family: str, dtype: str) -> None:
    check(tiny_model(family, dtype), FEW, prompts(33, 21))


def test_a_prompt_is_read_once_for_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = Session.prefill

    def counted(self: Session, texts: Any) -> torch.Tensor:
        read.append(type(self.policy).__name__)
        return plain(self, texts)

    monkeypatch.setattr(Session, "prefill", counted)
    model, texts = tiny_model("llama-gqa2"), prompts(33, 21)
    asked = sorted(
        every(["full", "streaming", "snapkv(window=4)", "tova", "h2o", "roco", "d2o", "d2o(preset=mass)"]),
        key=lambda one: way_of(*one),
    )
    readings = Readings(asked)
    for batch in (texts, prompts(33, 21, seed=1)):
        for policy, budget in asked:
            readings.prefill(Session(model, policy, budget, max_new=2), batch)
    assert read == ["Reader"] * 4, "two batches, each with column sums and without"
    read.clear()
    lonely = Readings([(H2O(), Budget(ratio=0.3)), (parse_policy("full"), None)])
    lonely.prefill(Session(model, H2O(), Budget(ratio=0.3), max_new=2), texts)
    assert read == ["H2O"], "a policy alone reads for itself"
    read.clear()
    Readings(asked, share=0.0).prefill(Session(model, H2O(), Budget(ratio=0.3), max_new=2), texts)
    assert read == ["H2O"], "what does not fit is not kept"


def test_statistics_are_joined() -> None:
    assert Needs(columns=True) | Needs(window=4) | Needs(window=2, squares=True) == Needs(True, True, 4)
    assert needs_of(H2O(), Budget(ratio=1.0)) == Needs(), "what keeps everything ranks nothing"
    assert Reader(Needs(columns=True, window=7, queries=3)).needs == Needs(columns=True, queries=7)
    assert Needs(squares=True).sums == ("sum", "square")
    ways = {way_of(parse_policy(policy), Budget(ratio=0.3)) for policy in POLICIES}
    assert len(ways) == 3, "a new way is one more prefill for everyone: is it needed?"


def test_a_context_that_is_too_long_is_refused_as_by_its_own_prefill() -> None:
    model, asked = tiny_model("llama-gqa2"), every(["h2o", "roco"])
    readings, texts = Readings(asked), prompts(500)
    readings.prefill(Session(model, *asked[0], max_new=4), texts)
    with pytest.raises(UsageError, match="500 prompt and 20 generated tokens are more than"):
        readings.prefill(Session(model, *asked[1], max_new=20), texts)


def test_the_peak_is_the_full_cache_and_one_and_a_half_compressed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full keys and values, the statistics, and 1.5 times what a policy keeps, with a layer's work."""
    import tiny_families

    monkeypatch.setattr(prefill, "CPU_BLOCK", 24)
    monkeypatch.setattr(prefill, "CPU_CACHE", 2**10)
    monkeypatch.setitem(tiny_families.CONFIGS, "tall", {"model_type": "llama", **tiny_families._sizes(4, 2, 16, 16)})
    model, texts = tiny_model("tall"), prompts(120, 120)
    token = 2 * 2 * 16 * 4 * 16  # keys and values, heads, width, bytes, layers
    sums = 240 * 2 * 2 * 4 * 16  # "sum" and "square" of every head
    own = Session(model, Reader(), Budget(tokens=1), max_new=4)
    with Alive() as alive:
        own.prefill(texts)
    full = alive.peak  # with the work of a layer
    assert full < 1.8 * 240 * token, "the work of a layer hides nothing"
    for policy, budget in [("h2o", "0.2"), ("roco", "0.5"), ("d2o", "0.2"), ("d2o", "0.5")]:
        asked = [(parse_policy(name), parse_budget(budget)) for name in (policy, "h2o", "roco")]
        with Alive() as alive:
            readings = Readings(asked)
            for seed in (0, 1):  # the prompts of one batch are gone when those of the next are read
                session = Session(model, *asked[0], max_new=4)
                readings.prefill(session, prompts(120, 120, seed=seed))
                session.compress()
                kept = session.footprint().kv_bytes
                session.close()
        assert alive.peak <= full + sums + 1.5 * kept + 0.02 * full, (policy, budget, alive.peak / full)


@pytest.mark.parametrize("policy", ["full", "h2o", "d2o", "d2o(preset=mass)", "d2o(preset=released)", "quant"])
def test_a_closed_session_leaves_nothing_to_collect(policy: str) -> None:
    """Many caches follow each other, and garbage is collected rarely."""
    gc.disable()
    try:
        session = Session(tiny_model("llama-gqa2"), policy, budgets_of(policy)[0], max_new=4)
        session.prefill(prompts(40))
        session.compress()
        session.step(torch.tensor([3]))
        state, store = weakref.ref(session.cache.state), weakref.ref(session.cache.state.store)
        session.close()
        assert state() is None
        assert store() is None
    finally:
        gc.enable()
