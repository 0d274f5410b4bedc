"""Every policy on every backend against models of it in float64 that share no code with the package.

One conversation a case: a padded prompt, decode steps, a second block (a new turn), decode steps. After each of them
the outputs, the entries held, the thresholds and the counts of merged entries are those of ``reference.rules``.
Queries, keys and values are random, so no model runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernels import interpreted  # noqa: F401
from reference import rivals, rules

from d2obench import cpu
from d2obench.cache.policy_cache import PolicyCache
from d2obench.decode import backend
from d2obench.policies import parse_policy
from d2obench.suite.grammar import parse_budget

LAYERS, SEED = 2, 5
NEAR = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""How far numbers of each dtype may stray from float64's: outputs, thresholds, and the scores of a victim."""


def variant(rule: type[rules.Head], **fields: Any) -> type[rules.Head]:
    return type(rule.__name__, (rule,), fields)


RULES: dict[str, type[rules.Head]] = {
    "full": rules.Head,
    "local": rules.Local,
    "streaming": rules.Streaming,
    "streaming(positions=cache)": rules.StreamingInTheCache,
    "h2o": rules.H2O,
    "h2o(sinks=3,recent=0.25)": variant(rules.H2O, sinks=3, share=0.25),
    "h2o(normalised=true)": rules.NormalisedH2O,
    "roco": rules.RoCo,
    "tova": rules.TOVA,
    "random": variant(rules.Random, seed=SEED),
    "cam(merged=3)": variant(rules.CaM, seed=SEED, parts=3),
    "snapkv(window=6)": rules.SnapKV,
    "snapkv(window=6,pool=max,decode=slide)": variant(rules.SnapKV, maximum=True),
    "d2o(allocate=uniform)": rules.D2O,
    "d2o(allocate=uniform,merge=values)": variant(rules.D2O, merge="values"),
    "d2o(allocate=uniform,merge=none)": variant(rules.D2O, merge="none"),
    "d2o(allocate=uniform,inherit=true)": variant(rules.D2O, inherit=True),
    "d2o(allocate=uniform,hosts=important)": variant(rules.D2O, important=True),
    "d2o(allocate=uniform,threshold=layer)": variant(rules.D2O, per_layer=True),
    "d2o(allocate=uniform,beta=1)": variant(rules.D2O, beta=1.0),
    "d2o(allocate=uniform,beta=0.2,sinks=0,recent=0.5)": variant(rules.D2O, beta=0.2, sinks=0, share=0.5),
    "d2o(preset=mass,allocate=uniform)": rules.MassD2O,
    "d2o(preset=mass,allocate=uniform,diversity=false)": variant(rules.MassD2O, diversity=False),
    "d2o(preset=mass,allocate=uniform,value_norms=false)": variant(rules.MassD2O, value_norms=False),
    "d2o(preset=mass,allocate=uniform,merge=none)": rules.WeightedH2O,
    "d2o(allocate=uniform,merge=mass)": variant(rules.MassH2O, sinks=4, share=0.25),
    "h2o(merge=mass,normalised=true)": variant(rules.MassH2O, normalised=True),
    "streaming(merge=mass)": rules.MassStreaming,
    "roco(merge=mass)": rules.MassRoCo,
    "tova(merge=mass)": rules.MassTOVA,
    "snapkv(window=6,merge=mass)": variant(rules.MassSnapKV, restarts=True),
    "snapkv(window=6,decode=slide,merge=mass)": rules.MassSnapKV,
    "d2o(preset=mass,heads=true)": rules.MassHeads,
    "adakv(score=snapkv(window=6))": variant(rules.SnapKV, safeguard=0.2),
    "adakv(score=snapkv(window=6,pool=max,decode=slide),safeguard=0.5)": variant(
        rules.SnapKV, maximum=True, safeguard=0.5
    ),
    "adakv(score=snapkv(window=6),form=forced)": variant(rules.SnapKV, safeguard=0.2, forced=True),
    "adakv(score=h2o)": variant(rules.H2O, safeguard=0.2),
    "adakv(score=h2o(merge=mass,sinks=3),form=forced,safeguard=0)": variant(
        rules.MassH2O, sinks=3, safeguard=0.0, forced=True
    ),
    "adakv(score=roco)": variant(rules.RoCo, safeguard=0.2),
    "keydiff": rivals.KeyDiff,
    "keydiff(decode=slide,window=6)": variant(rivals.KeyDiff, window=6),
    "knorm(decode=slide,window=6)": variant(rivals.Knorm, window=6),
    "lagkv(decode=slide,window=6,lag=5,sinks=2)": variant(rivals.LagKV, window=6),
    "expected(decode=slide,window=6)": variant(rivals.Expected, window=6),
    "expected(covariance=false,sinks=2,epsilon=0.02,future=9)": variant(
        rivals.Expected, covariance=False, sinks=2, epsilon=0.02, future=9
    ),
    "cake(allocate=uniform,window=6)": variant(rivals.CAKE, window=6),
    "cake(allocate=uniform,window=6,gamma=0,decode=slide)": variant(rivals.CAKE, window=6, gamma=0.0),
    "criticalkv(window=6)": variant(rivals.CriticalSnap, window=6),
    "criticalkv(window=6,first=0.25,score=snapkv(kernel=3))": variant(
        rivals.CriticalSnap, window=6, first=0.25, kernel=3
    ),
    "criticalkv(score=expected(value_norms=false),decode=slide)": rivals.CriticalExpected,
    "keepkv": rivals.KeepKV,
    "keepkv(threshold=-1,recent=0.25,sinks=2,window=5)": variant(
        rivals.KeepKV, threshold=-1.0, share=0.25, sinks=2, window=5
    ),
    "rkv(interval=1,window=3)": rivals.RKV,
    f"triattention(interval=1,stats={rivals.QUERIES})": rivals.TriAttention,
    "adakv(score=expected(decode=slide,window=6))": variant(rivals.Expected, window=6, safeguard=0.2),
}
FOLLOWS_ROUNDING = (rules.WeightedH2O, rivals.KeepKV)
"""Rules by which rounded numbers lead to other decisions, which a reference can't follow."""
BETWEEN = ("cache", "threshold", "keepkv", "rkv", "triattention")
COMPILED = [policy for policy in RULES if not any(word in policy for word in BETWEEN)]
"""What a CPU's loops execute whole; of the others, PyTorch operators do the work between steps."""


@dataclass(frozen=True)
class Case:
    """Sizes of a conversation; ``lengths`` are the prompts of the batch."""

    policy: str = "d2o(allocate=uniform)"
    heads: int = 2
    group: int = 2
    widths: tuple[int, int] = (16, 16)
    lengths: tuple[int, ...] = (30, 19)
    budget: str = "0.4"
    steps: tuple[int, int] = (7, 5)
    block: int = 8
    dtype: torch.dtype = torch.float32


class Conversation:
    """A cache beside its references, fed with the same random tensors."""

    def __init__(self, case: Case) -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(SEED)
        policy = parse_policy(case.policy)
        self.budget = parse_budget(case.budget) if policy.takes_budget else None
        self.cache = PolicyCache(
            policy, self.budget, [None] * LAYERS, case.group, sum(case.steps) + case.block, seed=SEED,
            rotary=10_000 ** (-torch.arange(8) / 8),
        )  # fmt: skip
        self.totals = list(case.lengths)
        rule = RULES[case.policy]
        if case.dtype != torch.float32 and issubclass(rule, rules.Merging):
            rule = variant(rule, late=True)
        self.references = [
            [rules.Layer(rule, self.keep(length), layer, case.heads, policy.grows) for layer in range(LAYERS)]
            for length in case.lengths
        ]
        self.near, self.scale = NEAR[case.dtype], case.widths[0] ** -0.5
        # keys alike, so that merges pass: one direction a layer, with noise
        self.common = torch.randn(LAYERS, 1, 1, 1, case.widths[0], generator=self.generator)
        self.merged = [[0] * LAYERS for _ in case.lengths]
        self.costs: list[list[list[float]]] = [[] for _ in case.lengths]

    def keep(self, length: int) -> int:
        return length if self.budget is None else self.budget.of(length)

    def fresh(self, layer: int, tokens: int) -> tuple[torch.Tensor, ...]:
        """A query, a key and a value ``[B, H, tokens, d]`` as models leave them: views of a fused projection."""
        case, batch = self.case, len(self.case.lengths)
        heads = [case.heads * case.group, case.heads, case.heads]
        made = torch.randn(batch, tokens, sum(heads), max(case.widths), generator=self.generator).transpose(1, 2)
        query, key, value = made.split(heads, 1)
        key = 0.7 * key[..., : case.widths[0]] + self.common[layer]
        made = torch.cat([query[..., : case.widths[0]].mul(0.7), key], 1).to(case.dtype)
        query, key = made.split([heads[0], heads[1]], 1)
        return query, key, value[..., : case.widths[1]].to(case.dtype)

    def held(self, layer: int, sequence: int) -> list[set[int]]:
        state, heads = self.cache.state, self.case.heads
        where = state.where()[layer, sequence * heads : (sequence + 1) * heads].tolist()
        return [{j for j in row if j >= 0} for row in where]

    def read(self, tokens: int, mask: torch.Tensor | None) -> None:
        """A block goes through all layers, and is compressed."""
        given, outs = [], []
        for layer in self.cache.layers:
            given.append(self.fresh(layer.index, tokens))
            query, keys, values = given[-1]
            layer.update(keys, values)
            outs.append(layer.attend(query, self.scale, mask))
        self.cache.compress()
        for index, (out, new) in enumerate(zip(outs, given, strict=True)):
            for sequence, references in enumerate(self.references):
                real = tokens if self.cache.seen > tokens else self.case.lengths[sequence]
                query, keys, values = (held[sequence, :, tokens - real :].double().numpy() for held in new)
                expected = references[index].read(query, keys, values, self.scale)
                self.close(out[sequence, tokens - real :], expected)
                if references[index].heads[0].measured:
                    self.measure(index, sequence, query, expected)
        for sequence, references in enumerate(self.references):
            if references[0].heads[0].measured:
                self.budget_heads(sequence)
            for index, reference in enumerate(references):
                if not self.cache.keeps_all:
                    reference.compress(self.held(index, sequence), self.near)
        self.check()

    def measure(self, layer: int, sequence: int, queries: Any, outputs: Any) -> None:
        """Notes what equal budgets would cost the heads, of the first prompt."""
        if len(self.costs[sequence]) < LAYERS:
            self.costs[sequence].append(rules.errors(self.references[sequence][layer], queries, outputs, self.scale))

    def budget_heads(self, sequence: int) -> None:
        """Compares the heads' budgets with those that follow from what equal ones cost, and takes them over."""
        assert self.cache.budgets is not None and self.budget is not None and self.budget.ratio is not None
        cost = [one for layer in self.costs[sequence] for one in layer]
        found, first = self.cache.budgets[:, sequence], self.case.lengths[sequence]
        total = round(self.budget.ratio * first * LAYERS) * self.case.heads
        mean = total / len(cost)
        expected = rules.filled(cost, total, max(1, round(0.35 * mean)), min(first, math.ceil(4 * mean)))
        grown = self.keep(self.totals[sequence]) / self.keep(first)  # in a later turn, all grow alike
        assert int(found.sum()) == round(grown * total)
        for layer, references in enumerate(self.references[sequence]):
            for head, budget in zip(references.heads, found[layer].tolist(), strict=True):
                assert abs(budget - grown * expected[layer * self.case.heads + head.head]) < 1 + grown
                head.budget = head.keep = budget

    def step(self) -> None:
        """One decode step; what left is told to the references, which check it."""
        before = [[self.held(layer, sequence) for sequence in range(len(self.totals))] for layer in range(LAYERS)]
        thresholds = [[self.taus(references[layer]) for references in self.references] for layer in range(LAYERS)]
        merged = [[self.count(references[layer]) for references in self.references] for layer in range(LAYERS)]
        given, outs = [], []
        occupied = self.cache.state.position.clone()
        for layer in self.cache.layers:
            given.append(self.fresh(layer.index, 1))
            query, keys, values = given[-1]
            layer.update(keys, values)
            outs.append(layer.attend(query, self.scale, None))
        self.settle(self.cache.state, occupied)
        for sequence, references in enumerate(self.references):
            position = self.totals[sequence]
            self.totals[sequence] += 1
            for index, reference in enumerate(references):
                query, keys, values = (held[sequence, :, 0].double().numpy() for held in given[index])
                after = self.held(index, sequence)
                left = [was | {position} for was in before[index][sequence]]
                gone = [sorted(was - now) for was, now in zip(left, after, strict=True)]
                full = [not self.cache.grows and len(one) > reference.heads[h].keep for h, one in enumerate(left)]
                assert [len(one) for one in gone] == [*map(int, full)], gone
                victims = [one[0] if one else -1 for one in gone]
                expected = reference.step(query, keys, values, self.scale, position, victims, self.near)
                self.close(outs[index][sequence, 0], expected)
        self.check(thresholds, merged)

    def settle(self, state: Any, occupied: torch.Tensor) -> None:
        """Tells references that wait for it what became of the entries that the step before evicted."""
        for sequence, references in enumerate(self.references):
            for layer, reference in enumerate(references):
                for h, head in enumerate(reference.heads):
                    if isinstance(head, rules.Merging) and head.late and head.found:
                        row = sequence * self.case.heads + h
                        target = int(occupied[layer, row, state.merge.target[layer, row]])
                        head.settle(bool(state.merge.weight[layer, row] > 0), target, self.near)

    def check(self, thresholds: Any = None, merged: Any = None) -> None:
        """What a merge that is pending will change is compared a step later."""
        state, heads = self.cache.state, self.case.heads
        for layer in range(LAYERS):
            counted = 0
            for sequence, references in enumerate(self.references):
                for h, head in enumerate(references[layer].heads):
                    assert self.held(layer, sequence)[h] == set(head.held)
                    if isinstance(head, rules.H2O | rules.RoCo) and (merged is None or not getattr(head, "inherit", 0)):
                        self.compare_scores(layer, sequence * heads + h, head)
                taus = self.taus(references[layer]) if thresholds is None else thresholds[layer][sequence]
                if taus is not None:
                    found = state.threshold[layer, sequence * heads : (sequence + 1) * heads].double()
                    torch.testing.assert_close(found, torch.tensor(taus).double(), atol=self.near, rtol=0)
                if any(getattr(head, "late", False) for head in references[layer].heads):
                    late = False  # counted when it was settled
                else:
                    late = merged is not None
                late = late and isinstance(references[layer].heads[0], rules.Merging)
                counted += merged[layer][sequence] if late else self.count(references[layer])
            assert self.cache.counts()[0][layer] == counted

    def compare_scores(self, layer: int, row: int, head: Any) -> None:
        """Accumulated attention, inherited scores with it; that of sinks is out of the question."""
        state = self.cache.state
        gained = getattr(head, "gained", {})
        for position, score in zip(state.where()[layer, row].tolist(), state.score[layer, row].tolist(), strict=True):
            if position >= 0 and abs(score) < torch.inf:
                expected = sum(head.seen[position]) + gained.get(position, 0.0)
                assert score == pytest.approx(expected, abs=4 * self.near, rel=4 * self.near), position

    def taus(self, layer: rules.Layer) -> list[float] | None:
        first = layer.heads[0]
        if not isinstance(first, rules.D2O) or first.merge == "none":
            return None
        return [-float("inf") if head.tau is None else head.tau for head in layer.heads]

    def count(self, layer: rules.Layer) -> int:
        return sum(getattr(head, "merged", 0) for head in layer.heads)

    def close(self, found: torch.Tensor, expected: Any) -> None:
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=self.near, rtol=self.near)

    def run(self) -> PolicyCache:
        lengths, case = self.case.lengths, self.case
        longest = max(lengths)
        mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
        with torch.inference_mode():
            self.read(longest, mask if len(set(lengths)) > 1 else None)
            for _ in range(case.steps[0]):
                self.step()
            if not case.block:
                return self.cache
            for sequence, references in enumerate(self.references):
                self.totals[sequence] += case.block
                for reference in references:
                    for head in reference.heads:
                        head.length = self.totals[sequence] - case.block
                        head.keep = head.budget = self.keep(self.totals[sequence])
            self.read(case.block, None)
            for _ in range(case.steps[1]):
                self.step()
        return self.cache


@pytest.fixture
def pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "OFFERS", ())


@pytest.mark.parametrize("policy", RULES)
@pytest.mark.usefixtures("pytorch")
def test_pytorch_operators(policy: str) -> None:
    assert Conversation(Case(policy)).run().state.decode_path == "PyTorch operators"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", [policy for policy in RULES if not issubclass(RULES[policy], FOLLOWS_ROUNDING)])
@pytest.mark.usefixtures("pytorch")
def test_pytorch_operators_in_half_precision(policy: str, dtype: torch.dtype) -> None:
    Conversation(half(policy, dtype)).run()


def half(policy: str, dtype: torch.dtype, heads: int = 2) -> Case:
    """Rounding may decide otherwise about a merge: a reference then follows, where both are near. So that it can be
    told, only decode steps evict. (Rounded scores have another order, and distances depend on that order.)"""
    if not issubclass(RULES[policy], rules.Merging):
        return Case(policy, dtype=dtype, steps=(4, 2), heads=heads)
    return Case(policy, dtype=dtype, lengths=(12, 9), budget="12", steps=(5, 0), block=0, heads=heads)


# --- compiled CPU loops ----------------------------------------------------------------------------------------------

on_cpu = pytest.mark.skipif(not cpu.available(), reason="compiled loops cannot run here")


@pytest.mark.parametrize("policy", RULES)
@on_cpu
def test_compiled_loops(policy: str) -> None:
    path = Conversation(Case(policy)).run().state.decode_path
    assert path == "compiled CPU loops" if policy in COMPILED else "between steps" in path


# groups of one to eight, so that every tile and every rest of one is met; heads of all usual widths
SHAPES = [
    Case(group=1, heads=3, widths=(80, 80)),
    Case(group=3, widths=(96, 96), lengths=(50, 49)),
    Case(group=5, widths=(64, 256), lengths=(21,)),
    Case(group=7, widths=(64, 128), lengths=(97,), steps=(3, 2)),
    Case(group=8, widths=(128, 128), lengths=(120, 7), steps=(3, 2)),
    Case("full", group=4, widths=(64, 64), lengths=(40, 13)),
    Case("h2o", group=6, widths=(24, 32), lengths=(60,)),
    Case("h2o", budget="1", lengths=(9, 3)),
    Case(budget="3", lengths=(9, 3)),
    Case(budget="25", lengths=(20, 6)),
    Case("roco", budget="2", lengths=(9, 3)),
    Case("cam(merged=3)", budget="25", lengths=(20, 6)),
    Case("tova", budget="25", lengths=(20, 6)),
    Case("snapkv(window=6,pool=max,decode=slide)", budget="25", lengths=(20, 6)),
    Case("d2o(preset=mass,allocate=uniform)", group=1, heads=3, widths=(80, 80)),
    Case("d2o(preset=mass,allocate=uniform)", group=5, widths=(64, 256), lengths=(21,)),
    Case("d2o(preset=mass,allocate=uniform)", group=7, widths=(64, 128), lengths=(97,), steps=(3, 2)),
    Case("d2o(preset=mass,allocate=uniform)", budget="3", lengths=(9, 3)),
    Case("d2o(preset=mass,allocate=uniform)", budget="25", lengths=(20, 6)),
]


def named(case: Case) -> str:
    return f"{case.policy}-{case.heads}x{case.group}-{case.widths}-{case.lengths}-{case.budget}"


@pytest.mark.parametrize("case", SHAPES, ids=named)
@pytest.mark.parametrize("threads", [1, 3])
@on_cpu
def test_compiled_loops_of_every_shape(case: Case, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Conversation(case).run()
    finally:
        torch.set_num_threads(before)


# --- Triton kernels, in Triton's interpreter -------------------------------------------------------------------------

KERNELS = [
    "full", "local", "streaming", "h2o", "h2o(sinks=3,recent=0.25)", "tova", "cam(merged=3)",
    *(policy for policy in COMPILED if policy.startswith(("d2o", "adakv")) or "merge=mass" in policy),
]  # fmt: skip
"""What kernels execute whole or in part."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run on the GPU: pytest -m cuda")
@pytest.mark.needs("triton")
@pytest.mark.usefixtures("interpreted")
class TestKernels:
    @pytest.mark.parametrize("policy", KERNELS)
    def test_float32(self, policy: str) -> None:
        heads = 2 if parse_policy(policy).ragged else 1
        path = Conversation(Case(policy, steps=(3, 1), heads=heads)).run().state.decode_path
        assert path.startswith("Triton kernels (interpreted)")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("policy", ["full", "streaming", "h2o", "d2o(allocate=uniform)"])
    def test_half_precision(self, policy: str, dtype: torch.dtype) -> None:
        Conversation(half(policy, dtype, heads=1)).run()

    @pytest.mark.parametrize("case", [SHAPES[0], SHAPES[5], SHAPES[7], SHAPES[8], SHAPES[-2]], ids=named)
    def test_shapes(self, case: Case) -> None:
        Conversation(replace(case, steps=(3, 1))).run()
