"""Policies whose scores take more than attention sums, number by number; what their caches hold while decoding."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import rivals
from reference.rules import Layer
from tiny_families import plain_model, prompts, tiny_model

from d2obench.attention.interface import keyword
from d2obench.cache import Session
from d2obench.cache.policy_cache import PolicyCache, PolicyLayer, cache
from d2obench.errors import PolicyError
from d2obench.policies import own_policies, parse_choice, parse_policy
from d2obench.policies.base import Entries
from d2obench.policies.rotary import LEADING, QueryMoments, rotate
from d2obench.suite.grammar import parse_budget

HEADS, GROUP, WIDTH = 2, 2, 16
SCALE = WIDTH**-0.5
ROTARY = 10_000 ** (-torch.arange(8) / 8)


def read(policy: str, rule: Any, length: int, budget: str, layers: int = 1) -> tuple[PolicyCache, list[Layer]]:
    """A cache that has read a prompt of random numbers in two blocks, beside float64 models of its layers. The queries
    of a layer are alike in their own way, so that layers differ."""
    cache = PolicyCache(parse_policy(policy), parse_budget(budget), [None] * layers, GROUP, 40, rotary=ROTARY)
    references = [Layer(rule, cache.budget.of(length), layer, HEADS) for layer in range(layers)]
    generator = torch.Generator().manual_seed(3)
    given = []
    for layer in range(layers):
        heads = [HEADS * GROUP, HEADS, HEADS]
        made = torch.randn(1, sum(heads), length, WIDTH, generator=generator)
        query, keys, values = made.split(heads, 1)
        keys = 0.7 * keys + torch.randn(1, HEADS, 1, WIDTH, generator=generator)
        query = query * (0.3 + layer) + torch.randn(1, HEADS * GROUP, 1, WIDTH, generator=generator)
        given.append((query, keys, values))
        references[layer].read(*(held[0].double().numpy() for held in given[-1]), SCALE)
    for part in (slice(0, length - 9), slice(length - 9, length)):
        for held, (query, keys, values) in zip(cache.own, given, strict=True):
            held.update(keys[:, :, part], values[:, :, part])
            held.attend(query[:, :, part], SCALE, None)
    return cache, references


def described(cache: PolicyCache, layer: int = 0) -> Entries:
    assert cache.lengths is not None
    entries = cache.own[layer].entries(len(cache.own), cache.lengths, 0, 0)
    cache.policy.describe(entries)
    return entries


def variant(rule: type, **fields: Any) -> type:
    return type(rule.__name__, (rule,), fields)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ("keydiff", rivals.KeyDiff),
        ("knorm", rivals.Knorm),
        ("lagkv(lag=6,sinks=3)", variant(rivals.LagKV, lag=6, sinks=3)),
        ("expected", rivals.Expected),
        ("expected(epsilon=0.02,future=20)", variant(rivals.Expected, epsilon=0.02, future=20)),
        ("expected(covariance=false,value_norms=false)", variant(rivals.Expected, covariance=False, value_norms=False)),
        ("cake(window=12)", variant(rivals.CAKE, window=12)),
        ("criticalkv(window=12)", variant(rivals.CriticalSnap, window=12)),
        ("criticalkv(score=expected(value_norms=false),first=0.8)", variant(rivals.CriticalExpected, first=0.8)),
        ("rkv(window=5)", variant(rivals.RKV, window=5)),
        (f"triattention(stats={rivals.QUERIES})", rivals.TriAttention),
        ("keepkv(window=12,sinks=2)", variant(rivals.KeepKV, window=12, sinks=2)),
    ],
)
def test_ranks_are_those_of_the_reference(policy: str, rule: Any) -> None:
    """Every number by which entries outside sinks and the recent window are ranked, also from two blocks."""
    cache, (layer,) = read(policy, rule, 53, "20")
    rank = cache.policy.rank(described(cache), torch.tensor([20]))[0].double().numpy()
    ranked = 0
    for own, head in zip(rank, layer.heads, strict=True):
        expected = head.importance()
        free = [j for j, number in expected.items() if abs(number) < 1e8]
        np.testing.assert_allclose(own[free], [expected[j] for j in free], rtol=2e-4, atol=1e-7)
        ranked += len(free)
        assert set(np.argsort(-own, kind="stable")[:20]) == set(sorted(expected, key=lambda j: (-expected[j], j))[:20])
    assert ranked > 40


@pytest.mark.parametrize(("tau", "budget"), [((1.0, 1.0), "24"), ((0.5, 2.0), "24"), ((1.0, 1.0), "45")])
def test_cake_divides_a_budget_by_preference(tau: tuple[float, float], budget: str) -> None:
    policy = f"cake(window=6,tau1={tau[0]},tau2={tau[1]})"
    cache, layers = read(policy, variant(rivals.CAKE, window=6), 53, budget, layers=4)
    cache.compress()
    assert cache.budgets is not None
    found = cache.budgets[:, 0].tolist()
    expected = rivals.cake_budgets([rivals.cake_preference(layer.heads, *tau) for layer in layers], int(budget), 53, 6)
    assert 4 * int(budget) == sum(found) == round(sum(expected)) and len(set(found)) > 1
    assert np.abs(np.array(found) - expected).max() < 1, (found, expected)
    assert (max(found) == 53) == (max(expected) == 53)


def test_moments_of_blocks_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(2, 3, 40, WIDTH, generator=generator) + 5
    position = torch.arange(40) - torch.tensor([[0], [13]])
    turned = rotate(plain, position[:, None, :, None] * ROTARY)
    blocks = [QueryMoments.of(turned[:, :, part], position[:, part], ROTARY) for part in (slice(17), slice(17, 40))]
    found = blocks[0].and_then(blocks[1])
    for b, first in ((0, LEADING), (1, 13 + LEADING)):
        for h in range(3):
            own = plain[b, h, first:].double().numpy()
            np.testing.assert_allclose(found.mean[b, h], own.mean(0), atol=1e-4)
            np.testing.assert_allclose(found.covariance[b, h], np.cov(own.T, bias=True), atol=1e-4)
    assert found.select(torch.tensor([1])).count.tolist() == [40 - 13 - LEADING]


# --- KVzip, against the attention maps of transformers' own model -----------------------------------------------------


def note(seen: dict[int, Any], at: int, module: Any, args: Any, kwargs: Any) -> None:
    seen[at] = kwargs["hidden_states"][0].double().numpy()


def repeated(model: Any, text: list[int], chunk: int, sinks: int, plus: bool) -> list[np.ndarray]:
    """Scores ``[H, n]`` of each layer: text and repetition in one pass, whose maps are scaled to what counts."""
    length, layers = len(text), model.config.num_hidden_layers
    heads, group = (
        model.config.num_key_value_heads,
        model.config.num_attention_heads // model.config.num_key_value_heads,
    )
    found = [np.zeros((heads, length)) for _ in range(layers)]
    for first in range(0, length, chunk):
        last = min(length, first + chunk)
        seen: dict[int, Any] = {}
        hooks = [
            layer.self_attn.register_forward_pre_hook(partial(note, seen, at), with_kwargs=True)
            for at, layer in enumerate(model.model.layers)
        ]
        block = text[max(0, first - 8) : last]
        with torch.inference_mode():
            out = model(torch.tensor([text + block]), output_attentions=True, use_cache=True)
        for hook in hooks:
            hook.remove()
        cache = out.past_key_values if "past_key_values" in out else out.cache
        kept = [*range(min(sinks, first)), *range(first, last), *range(length, length + len(block))]
        for at, maps in enumerate(out.attentions):
            weights = maps[0, :, length:].double().numpy()
            weights = weights / weights[..., kept].sum(-1, keepdims=True)
            weights = weights[..., first:last].reshape(heads, group, len(block), last - first)
            if plus:
                width = maps.shape[1] and cache.layers[at].values.shape[-1]
                projection = model.model.layers[at].self_attn.o_proj.weight.detach().double().numpy()
                parts = projection.reshape(len(projection), heads, group, width)
                values = cache.layers[at].values[0, :, first:last].double().numpy()
                norms = np.linalg.norm(np.einsum("ohgd,hnd->hgno", parts, values), axis=-1)
                read = np.linalg.norm(seen[at][length:], axis=-1)
                weights = weights * norms[:, :, None] / read[:, None]
            found[at][:, first:last] = weights.max((1, 2))
        for scores in found:
            scores[:, :sinks] = 1.0
    return found


@pytest.mark.parametrize(("chunk", "plus"), [(64, False), (17, False), (17, True)])
def test_kvzip_scores_are_the_highest_attention_while_the_prompt_is_repeated(chunk: int, plus: bool) -> None:
    texts = prompts(50, 33)
    word = "true" if plus else "false"
    session = Session(tiny_model("llama-gqa2"), f"kvzip(chunk={chunk},plus={word},allocate=uniform)", "0.4", max_new=4)
    session.prefill(texts)
    stats: list[Any] = []
    rank = type(session.policy).rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(session.policy),
            "rank",
            lambda self, entries, keep: (stats.append(entries.stats["repeated"].clone()), rank(self, entries, keep))[1],
        )
        session.compress()
    model = plain_model("llama-gqa2", attention="eager")
    for sequence, text in enumerate(texts):
        for found, expected in zip(stats, repeated(model, text, chunk, 4, plus), strict=True):
            np.testing.assert_allclose(found[sequence, :, -len(text) :], expected, rtol=1e-3, atol=1e-6)
    before = session.footprint()
    assert before.kept == [[20.0, 13.0]] * 2
    assert session.step(torch.tensor([3, 4])).isfinite().all()


def test_kvzip_gives_layers_what_their_entries_are_worth() -> None:
    policy = parse_policy("kvzip(allocate=layers)")
    generator = torch.Generator().manual_seed(1)
    stats = [{"repeated": torch.rand(1, 2, 40, generator=generator) ** power} for power in (1, 3, 9)]
    budgets = policy.layer_budgets(stats, torch.tensor([40]), parse_budget("0.3"))[:, 0].tolist()
    every = sorted((float(score), layer) for layer in range(3) for score in stats[layer]["repeated"].flatten())
    counts = [sum(at == layer for _, at in every[-3 * 12 * 2 :]) / 2 for layer in range(3)]
    assert sum(budgets) == 36
    assert max(abs(a - max(b, 4)) for a, b in zip(budgets, counts, strict=True)) <= 3
    assert budgets == sorted(budgets, reverse=True)


def test_kvzip_keeps_the_highest_scores_of_all_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    stats = [{"repeated": torch.rand(2, 3, 40, generator=generator) ** power} for power in (1, 2, 3)]
    found = parse_policy("kvzip").layer_budgets(stats, torch.tensor([40, 29]), parse_budget("0.3"))
    for sequence, length in enumerate((40, 29)):
        scores = torch.stack([stat["repeated"][sequence, :, -length:] for stat in stats]).double().numpy()
        scores[..., :4] = np.inf  # sinks
        bound = np.sort(scores.ravel())[-round(0.3 * length) * 9]
        assert np.array_equal(found[:, sequence].numpy(), (scores >= bound).sum(-1))


def test_kvzip_needs_the_text() -> None:
    model = tiny_model("llama-gqa2")
    cache = PolicyCache(parse_policy("kvzip"), parse_budget("0.4"), [None] * 2, 2, model=model.model)
    cache.begin_forward(model.model.base_model)
    for layer in cache.own:
        layer.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16))
        layer.attend(torch.randn(1, 4, 20, 16), 0.25, None)
    cache.end_forward()
    with pytest.raises(Exception, match="doesn't know the text"):
        cache.compress()


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_rkv_evicts_at_intervals() -> None:
    session = Session(tiny_model("llama-gqa2"), "rkv(window=3,interval=5)", "20", max_new=24)
    session.prefill(prompts(50, 41))
    session.compress()
    held = [session.footprint().held[0][0]]
    for step in range(24):
        session.step(torch.tensor([step + 2, step + 3]))
        held.append(session.footprint().held[0][0])
    assert held[0] == 20 and max(held) <= 25 and min(held) == 20
    assert session.footprint().evicted_layers[0] == 2 * (50 - 20 + 41 - 20) + 2 * 2 * 5 * 4


def test_rkv_keeps_the_newest_of_twins() -> None:
    """Of three keys that are almost one, the oldest leaves first, and the newest counts as if it were alone."""
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(1, 1, 30, 64, generator=generator)
    keys[..., 12, :], keys[..., 20, :] = keys[..., 5, :] * 1.01, keys[..., 5, :] * 0.99
    entries = Entries(
        0, 1, keys, keys, torch.arange(30).expand(1, 1, -1), torch.tensor([30]), {}, queries=torch.zeros(1, 1, 4, 64)
    )
    rank = parse_policy("rkv(window=4,mix=0)").rank(entries, torch.tensor([29]))[0, 0]
    assert rank[:26].argsort().tolist().index(5) == 0
    assert rank[12] < rank[:26].median() and rank[20] > rank[12]


def test_keepkv_counts_every_token_once() -> None:
    """With a threshold that all pass, the votes of what is held are all tokens."""
    session = Session(tiny_model("llama-gqa2"), "keepkv(threshold=-1)", "12", max_new=9)
    session.prefill(prompts(40, 25))
    session.compress()
    for count in range(9):
        session.step(torch.tensor([5, 6]))
        state = session.cache.state
        # the slot that was freed last waits for the next token; it already has a vote
        votes = state.bias.double().exp().sum(-1).view(2, 2, 2)
        assert torch.allclose(votes[:, 0], torch.tensor(42.0 + count).double())
        assert torch.allclose(votes[:, 1], torch.tensor(27.0 + count).double())
    found = session.footprint()
    assert found.merged == found.evicted


@pytest.mark.parametrize(("size", "recent", "budget"), [(4, 1, "20"), (5, 2, "14"), (16, 1, "9")])
def test_quest_reads_the_pages_of_the_highest_bounds(size: int, recent: int, budget: str) -> None:
    """Decoding against float64 models, over the ends of pages; what a step reads is counted from them."""
    rule = variant(rivals.Quest, size=size, recent=recent)
    cache, layers = read(f"quest(pages={size},recent={recent})", rule, 53, budget, layers=2)
    cache.compress()
    for layer in layers:
        layer.grows = True
    generator = torch.Generator().manual_seed(8)
    for step in range(20):
        for held, layer in zip(cache.own, layers, strict=True):
            made = torch.randn(1, 8, 1, WIDTH, generator=generator)
            query, keys, values = made.split([4, 2, 2], 1)
            held.update(keys, values)
            out = held.attend(query, SCALE, None)[0, 0].double().numpy()
            q, k, v = (one[0, :, 0].double().numpy() for one in (query, keys, values))
            assert np.abs(out - layer.step(q, k, v, SCALE, 53 + step, [])).max() < 1e-4
        tokens = sum(len(head.chosen) for layer in layers for head in layer.heads)
        bounds = 4 * -(-(54 + step) // size)
        assert cache.read_bytes == tokens * 2 * WIDTH * 4 + bounds * 2 * WIDTH * 4
    assert cache.held().tolist() == [[73.0], [73.0]]
    assert cache.kv_bytes >= 4 * 73 * 2 * WIDTH * 4 + bounds * 2 * WIDTH * 4


def test_quest_reads_everything_in_dense_layers() -> None:
    def decoded(policy: str, budget: str | None) -> list[torch.Tensor]:
        session = Session(tiny_model("llama-gqa2"), policy, budget, max_new=9)
        session.prefill(prompts(40, 23))
        session.compress()
        return [session.step(torch.tensor([step + 2, step + 3])) for step in range(9)]

    full = torch.stack(decoded("full", None))
    assert (torch.stack(decoded("quest(pages=4,dense=2)", "8")) - full).abs().max() < 1e-5
    assert (torch.stack(decoded("quest(pages=4,dense=1)", "8")) - full).abs().max() > 1e-4
    with pytest.raises(PolicyError, match="it has no scores"):
        parse_policy("adakv(score=quest)")
    with pytest.raises(PolicyError, match="recent is 0"):
        parse_policy("quest(recent=0)")


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("policy", [policy for policy in own_policies() if parse_choice(policy).takes_budget])
def test_what_any_policy_keeps_can_be_quantised(policy: str, bits: int) -> None:
    def kept(words: str) -> Any:
        session = Session(tiny_model("llama-gqa4"), words, "0.3", max_new=3)
        session.prefill(prompts(60, 41))
        session.compress()
        for step in range(3):
            assert session.step(torch.tensor([step, step + 1])).isfinite().all()
        return session.footprint()

    plain, packed = kept(policy), kept(f"{policy}+quant(bits={bits})")
    assert packed.kept == plain.kept
    if not parse_policy(policy).grows:  # a cache that grows holds its last group as it is
        assert packed.kv_bytes < plain.kv_bytes * (0.35 if bits == 2 else 0.42)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("keydiff(window=0)", "window is 0"),
        ("lagkv(lag=1)", "lag is 1"),
        ("lagkv(sinks=-1)", "sinks is -1"),
        ("expected(future=0)", "future is 0"),
        ("expected(epsilon=-1)", "epsilon is -1"),
        ("cake(tau1=0)", "tau1 is 0"),
        ("cake(gamma=-1)", "gamma is -1"),
        ("criticalkv(score=keydiff)", "they are negative"),
        ("criticalkv(score=h2o)", "can't use the scores of 'h2o'"),
        ("criticalkv(score=criticalkv)", "can't use the scores of 'criticalkv'"),
        ("criticalkv(score=snapkv(merge=mass))", "can't use the scores"),
        ("criticalkv(score=snapkv(kernel=4))", "kernel is 4"),
        ("criticalkv(score=snap)", "unknown policy 'snap'"),
        ("criticalkv(first=2)", "first is 2"),
        ("keepkv(recent=0)", "recent is 0"),
        ("keepkv(threshold=2)", "threshold is 2"),
        ("rkv(kernel=2)", "kernel is 2"),
        ("rkv(mix=2)", "mix is 2"),
        ("rkv(interval=0)", "interval is 0"),
        ("kvzip(chunk=0)", "chunk is 0"),
        ("kvzip(block=128)", "can't be cut between blocks"),
        ("cake(block=128)", "can't be cut between blocks"),
        ("criticalkv(score=cake,block=128)", "can't be cut between blocks"),
        ("knorm(block=1)", "block is 1"),
        ("quant(bits=3)", "bits"),
    ],
)
def test_a_parameter_out_of_its_range_is_one_line(policy: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        parse_policy(policy)


# --- prompts that are cut between blocks ------------------------------------------------------------------------------


class BlockwiseKeyDiff(rivals.KeyDiff):
    window = 6


@pytest.mark.parametrize("decode", ["grow", "slide"])
def test_a_prompt_in_blocks_is_cut_between_them(decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every layer was given, block by block, goes through a float64 model that cuts after each block."""
    given: dict[int, list[Any]] = {}
    fresh: dict[int, Any] = {}
    most: list[int] = []
    receive, attend = PolicyCache.receive, PolicyLayer.attend

    def spy_receive(self: PolicyCache, layer: PolicyLayer, keys: Any, values: Any) -> Any:
        fresh[layer.index] = keys[0].double().numpy(), values[0].double().numpy()
        return receive(self, layer, keys, values)

    def spy_attend(self: PolicyLayer, query: Any, scale: float, mask: Any) -> Any:
        most.append(0 if self.keys is None else self.keys.shape[2])
        out = attend(self, query, scale, mask)
        given.setdefault(self.index, []).append((query[0].double().numpy(), *fresh[self.index], scale, out))
        return out

    monkeypatch.setattr(PolicyCache, "receive", spy_receive)
    monkeypatch.setattr(PolicyLayer, "attend", spy_attend)
    session = Session(tiny_model("llama-deep"), f"keydiff(block=16,window=6,decode={decode})", "0.3", max_new=9)
    session.prefill(prompts(70))
    session.compress()
    kept = session.footprint()
    for step in range(9):
        session.step(torch.tensor([step + 2]))
    assert [one[0].shape[1] for one in given[0][:5]] == [6, 16, 16, 16, 16]
    assert max(most) == 21 + 16, "never more than the budget and a block"
    assert kept.kept == [[21.0]] * 5 and kept.requested == 21
    for index, steps in given.items():
        layer = Layer(BlockwiseKeyDiff, 21, index, 2, decode == "grow")
        for query, keys, values, scale, out in steps[:5]:
            expected = layer.read(query, keys, values, scale)
            assert np.abs(out[0].double().numpy() - expected).max() < 1e-4
            layer.compress()
        for count, (query, keys, values, scale, out) in enumerate(steps[5:]):
            expected = layer.step(query[:, 0], keys[:, 0], values[:, 0], scale, 70 + count)
            assert np.abs(out[0, 0].double().numpy() - expected).max() < 1e-4
        where = session.cache.state.where()[index]
        assert [sorted(int(j) for j in row if j >= 0) for row in where] == [head.held for head in layer.heads]


@pytest.mark.parametrize(
    "policy", ["keydiff", "knorm", "lagkv(lag=5)", "expected", "snapkv(window=4)", "cake(allocate=uniform)"]
)
@pytest.mark.parametrize("family", ["llama-gqa2", "falcon"])
def test_a_batch_in_blocks_is_its_sequences(policy: str, family: str) -> None:
    """Sequences of unlike lengths end together, so a short one has its first tokens in a later block."""
    name, _, rest = policy.partition("(")
    words = f"{name}(block=8,decode=slide{',' + rest if rest else ')'}"

    def run(texts: list[list[int]]) -> torch.Tensor:
        session = Session(tiny_model(family), words, "0.4", max_new=4)
        out = [session.prefill(texts)]
        session.compress()
        out += [session.step(torch.tensor([text[step] for text in texts])) for step in range(4)]
        assert session.footprint().kept == [[float(round(0.4 * len(text))) for text in texts]] * session.loaded.layers
        return torch.stack(out, 1)

    texts = prompts(40, 24)
    together = run(texts)
    # the same blocks, counted from the end
    for text, row in zip(texts, together, strict=True):
        assert (run([text])[0] - row).abs().max() < 1e-4


def test_a_cache_for_generate_is_cut_between_chunks_too() -> None:
    model = tiny_model("llama-gqa2")
    text, tokens = prompts(48)[0], torch.tensor([3])
    session = Session(model, "keydiff(block=16)", "12", max_new=4)
    session.prefill([text])
    session.compress()
    held = cache("keydiff(block=16)", 12, model=model.model, max_new=4)
    with torch.inference_mode():
        for first in range(0, 48, 16):
            model.model(torch.tensor([text[first : first + 16]]), **{keyword(model.model): held})
        out = model.model(tokens[None], **{keyword(model.model): held}).logits[:, -1]
    assert torch.equal(held.kept, session.cache.kept)
    assert torch.allclose(out, session.step(tokens), atol=1e-5)


# --- DuoAttention -----------------------------------------------------------------------------------------------------


def reach(head: rivals.PromptOnly) -> float:
    """How far a head reaches, one distance after the other."""
    key = np.mean([rivals.rotated(held, -j) for j, held in head.keys.items()], 0)
    members = len(head.queries[0])
    found = []
    for g in range(members):
        query = np.mean([rivals.rotated(one[g], -j) for j, one in head.queries.items() if j >= 4], 0)
        weights = np.exp([rivals.rotated(query, apart) @ key * SCALE for apart in range(499, -1, -1)])
        found.append(np.mean(np.cumsum(weights / weights.sum())))
    return float(np.mean(found))


class Full(rivals.PromptOnly):
    pass


def test_duo_gives_the_heads_of_the_furthest_reach_everything() -> None:
    """Two layers of two heads, at 20 of 53 tokens: one head is full, three have 9 tokens each."""
    cache, layers = read("duo(sinks=2,recent=4)", Full, 53, "20", layers=2)
    heads = [head for layer in layers for head in layer.heads]
    far = [reach(head) for head in heads]
    entries = [described(cache, layer) for layer in (0, 1)]
    found = [float(one.stats["reach"][0, h, 0]) for one in entries for h in (0, 1)]
    np.testing.assert_allclose(found, far, rtol=1e-4)
    cache.compress()
    # 80 entries: a window of 6 for each head leaves 56, of which a full head takes 47
    budgets = cache.budgets[:, 0].flatten().tolist()
    assert [at for at, one in enumerate(budgets) if one < 0] == [int(np.argmax(far))]
    assert sorted(budgets) == [-1, 9, 9, 9]
    held = [{int(j) for j in row if j >= 0} for layer in cache.state.where() for row in layer]
    for own, budget in zip(held, budgets, strict=True):  # two sinks and the last seven
        assert own == (set(range(53)) if budget < 0 else {0, 1, *range(46, 53)})
    assert cache.kept.mean() == 20


def test_duo_streams_beside_full_heads() -> None:
    """Decoding against float64 models: full heads append, streaming heads hold sinks and a ring."""
    cache, layers = read("duo(sinks=2,recent=4)", Full, 53, "20", layers=2)
    cache.compress()
    generator = torch.Generator().manual_seed(8)
    budgets = cache.budgets[:, 0]
    for layer, own in zip(layers, budgets.tolist(), strict=True):
        for head, budget in zip(layer.heads, own, strict=True):
            sinks = round(budget * 2 / 6) if budget > 0 else 53
            for j in list(head.held):
                if budget > 0 and min(sinks, 2) <= j < 53 - (budget - min(sinks, 2)):
                    head.drop(j)
    for step in range(20):
        for index, (held, layer) in enumerate(zip(cache.own, layers, strict=True)):
            made = torch.randn(1, 8, 1, WIDTH, generator=generator)
            query, keys, values = made.split([4, 2, 2], 1)
            held.update(keys, values)
            out = held.attend(query, SCALE, None)[0, 0].double().numpy()
            for h, head in enumerate(layer.heads):
                q, k, v = (one[0, :, 0].double().numpy() for one in (query, keys, values))
                expected = head.attend(q[2 * h : 2 * h + 2], k[h], v[h], SCALE, 53 + step)
                assert np.abs(out[2 * h : 2 * h + 2] - expected).max() < 1e-4
                if budgets[index, h] > 0:
                    head.drop(min(j for j in head.held if j >= 2))
    assert {len(head.held) for layer in layers for head in layer.heads} == {73, 9}


def test_duo_reads_a_file_of_heads(tmp_path: Path) -> None:
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text("0.1\t0.9\n0.2\t0.3\n")
    session = Session(tiny_model("llama-gqa2"), f"duo(heads={file},sinks=2,recent=4)", "20", max_new=4)
    session.prefill(prompts(53, 44))
    session.compress()
    assert (session.cache.budgets < 0).nonzero()[:, [0, 2]].tolist() == [[0, 1], [0, 1]]
    for text, words in {"0.1\t0.9\n0.2\n": "line 2", "a\tb\n": "not a list of numbers", "": "is empty"}.items():
        file.write_text(text)
        with pytest.raises(PolicyError, match=words):
            parse_policy(f"duo(heads={file})")
    file.write_text("0.1\t0.9\n")
    session = Session(tiny_model("llama-gqa2"), f"duo(heads={file})", "20", max_new=4)
    session.prefill(prompts(53))
    with pytest.raises(PolicyError, match="has 1 lines"):
        session.compress()
    with pytest.raises(PolicyError, match="can't read the file of heads"):
        parse_policy("duo(heads=/nowhere.tsv)")


@pytest.mark.parametrize("family", ["llama-gqa2", "gemma3"])
@pytest.mark.parametrize(
    "policy", ["kvzip(decode=slide)", "kvzip(plus=true,allocate=layers,decode=slide)", "duo(recent=3)"]
)
def test_a_conversation_goes_on(policy: str, family: str) -> None:
    """Three turns with tokens decoded between them, each of which is compressed together with what was held."""
    model = tiny_model(family)
    held = cache(policy, 0.4, model=model.model, max_new=40)
    for turn, length in enumerate((30, 7, 12)):
        with torch.inference_mode():
            (text,) = prompts(length, seed=turn)
            model.model(torch.tensor([text]), **{keyword(model.model): held})
            held.compress()
            if "duo" not in policy:  # whose full heads keep everything
                assert abs(float(held.kept.mean()) - 0.4 * held.seen) <= 0.5
            for token in range(3, 8):
                out = model.model(torch.tensor([[token]]), **{keyword(model.model): held}).logits
                assert out.isfinite().all()
    assert held.seen == 64
