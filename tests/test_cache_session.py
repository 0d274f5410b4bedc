"""The slot engine: prefill statistics, batches, bytes, forks, and what a decode step may not do."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from d2obench.attention.prompt import prompt_attention
from d2obench.errors import D2OBenchError, ModelError, UsageError
from d2obench.external import open_session
from d2obench.models import load
from d2obench.policies.base import Needs

POLICIES = ["full", "local", "streaming", "h2o", "d2o"]


def prompts(*lengths, seed=0, vocab=256):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def run(loaded, policy, budget, given, steps=16):
    session = open_session(
        loaded, policy, None if policy in ("full", "hf-dynamic", "hf-static") else budget, max_new=steps
    )
    logits = session.prefill(given)
    session.compress()
    out = []
    for _ in range(steps):
        out.append(logits.argmax(-1))
        logits = session.step(out[-1])
    return torch.stack(out, 1), logits, session


@pytest.mark.parametrize(("heads", "group", "dim"), [(1, 1, 64), (2, 4, 96), (4, 2, 128), (1, 8, 256)])
@pytest.mark.parametrize("padding", [0, 37])
def test_prefill_statistics_equal_the_dense_map(heads, group, dim, padding):
    generator = torch.Generator().manual_seed(1)
    length = 150
    q, k, v = (torch.randn(2, n, length, dim, generator=generator) for n in (heads * group, heads, heads))
    starts = [0, padding]
    out, stats = prompt_attention(q, k, v, dim**-0.5, starts, Needs(columns=True, squares=True, window=8))
    plain, _ = prompt_attention(q, k, v, dim**-0.5, starts, Needs())
    for b, start in enumerate(starts):
        logits = (
            torch.einsum("hgid,hjd->hgij", q[b].double().view(heads, group, length, dim), k[b].double()) * dim**-0.5
        )
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden[:, :start] = True
        a = logits.masked_fill(hidden, -torch.inf).softmax(-1)[:, :, start:]
        expected = torch.einsum("hgij,hjd->ihgd", a, v[b].double()).flatten(1, 2)
        for got in (out, plain):
            assert torch.allclose(got[b, start:].double(), expected, atol=1e-4)
            assert (got[b, :start] == 0).all()
        assert torch.allclose(stats["sum"][b].double(), a.mean(1).sum(1), atol=1e-4)
        assert torch.allclose(stats["square"][b].double(), a.mean(1).square().sum(1), atol=1e-4)
        assert torch.allclose(stats["window"][b].double(), a.mean(1)[:, -8:].sum(1), atol=1e-4)
        assert stats["sum"][b].sum(-1).tolist() == pytest.approx([length - start] * heads, rel=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_padded_batch_equals_single_sequences(tiny, policy):
    given = prompts(60, 47, 60, 33)
    batch, logits, _ = run(tiny, policy, "0.3", given)
    for row, prompt in enumerate(given):
        single, expected, _ = run(tiny, policy, "0.3", [prompt])
        assert torch.equal(batch[row], single[0])
        assert torch.allclose(logits[row], expected[0], atol=1e-4)


@pytest.mark.parametrize("yardstick", ["hf-dynamic", "hf-static"])
def test_the_full_cache_equals_the_library_own(tiny, yardstick):
    given = prompts(50, 41)
    ours, logits, _ = run(tiny, "full", None, given)
    theirs, expected, session = run(tiny, yardstick, None, given)
    assert torch.equal(ours, theirs)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert session.footprint().kv_bytes > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_half_precision_stays_near_float32(policy, dtype):
    given = prompts(60)
    half = load("shape:tiny", dtype, "cpu")
    session = open_session(half, policy, None if policy == "full" else "0.3", max_new=4)
    logits = session.prefill(given)
    session.compress()
    full = open_session(half, "full", None, max_new=4)
    assert torch.allclose(logits, full.prefill(given), atol=0.05)
    full.compress()
    assert torch.isfinite(session.step(logits.argmax(-1))).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_kv_bytes_are_capacity_times_width(tiny, policy):
    _, _, session = run(tiny, policy, "0.4", prompts(100, 100))
    config, footprint = tiny.model.config, session.footprint()
    slots = [max(kept) for kept in footprint.kept]  # the longest of the batch sets a layer's capacity
    expected = sum(slots) * 2 * config.num_key_value_heads * config.head_dim * 2 * 4
    spare = len(slots) * 2 * config.num_key_value_heads * config.head_dim * 2 * 4 * (16 if policy == "full" else 1)
    assert footprint.kv_bytes == expected + spare


class Trace(TorchDispatchMode):
    """Names and output sizes of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shares = isinstance(out, torch.Tensor) and any(
            isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            for a in [*args, *(kwargs or {}).values()]
        )
        size = out.numel() * out.element_size() if isinstance(out, torch.Tensor) and not shares else 0
        self.seen.append((func.overloadpacket.__name__, size))
        return out


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o", "d2o"])
def test_a_decode_step_neither_concatenates_nor_reallocates_nor_waits(tiny, policy):
    session = open_session(tiny, policy, None if policy == "full" else "0.5", max_new=8)
    logits = session.prefill(prompts(2000))
    session.compress()
    logits = session.step(logits.argmax(-1))
    token = logits.argmax(-1)
    state = session.cache.state
    before = [t.untyped_storage().data_ptr() for t in (state.store.key_rows, state.store.value_rows, state.position)]
    # rotary embedding concatenates its halves in transformers' own code: that is the model, at the size of one token
    per_layer = state.store.bytes // len(session.cache.own)
    with Trace() as trace:
        session.step(token)
    assert before == [
        t.untyped_storage().data_ptr() for t in (state.store.key_rows, state.store.value_rows, state.position)
    ]
    names = {name for name, _ in trace.seen}
    assert not names & {"_local_scalar_dense", "item", "nonzero", "masked_select", "_to_cpu"}
    assert max(size for name, size in trace.seen if name == "cat") < 2**14
    assert max(size for _, size in trace.seen) < per_layer / 4, "no temporary comes near the size of a layer's cache"


def test_a_fork_comes_back_to_where_it_was(tiny):
    for policy in POLICIES:
        session = open_session(tiny, policy, None if policy == "full" else "0.3", max_new=20)
        logits = session.prefill(prompts(70, 52))
        session.compress()
        saved = session.snapshot()
        first = [session.step(logits.argmax(-1)) for _ in range(8)]
        session.restore(saved)
        again = [session.step(logits.argmax(-1)) for _ in range(8)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_cannot_run_says_so(tiny):
    with pytest.raises(UsageError, match="can see"):
        open_session(tiny, "full", None, max_new=10).prefill(prompts(4090))
    with pytest.raises(UsageError, match="empty prompt"):
        open_session(tiny, "full", None, max_new=10).prefill([[]])
    with pytest.raises(D2OBenchError, match="needs a budget"):
        open_session(tiny, "h2o", None, max_new=10).prefill(prompts(10))
    session = open_session(tiny, "d2o", "0.5", max_new=10)
    session.prefill(prompts(10))
    with pytest.raises(ModelError, match="compressed policy cache"):
        session.skip_to(5)


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o", "d2o"])
def test_skipping_ahead_keeps_sizes_and_positions_true(tiny, policy):
    budget = None if policy == "full" else "0.3"
    session = open_session(tiny, policy, budget, max_new=64)
    logits = session.prefill(prompts(40))
    session.compress()
    for _ in range(3):
        logits = session.step(logits.argmax(-1))
    session.skip_to(50)
    assert torch.isfinite(session.step(logits.argmax(-1))).all()
    assert session.cache.seen == 94
    held = session.footprint().held[0][0]
    assert held == (94 if policy == "full" else pytest.approx(session.footprint().kept[0][0]))
