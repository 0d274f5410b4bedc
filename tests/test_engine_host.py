"""A CPU's compiled attention over slots: against the PyTorch path, float64, and in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_cases import Case, agree, float64, fresh, named, state_of, step
from tiny_families import prompts, tiny_model

from d2obench import cpu
from d2obench.cache import Session
from d2obench.decode.cpu import backend as host
from d2obench.decode.cpu.backend import HostDecode
from d2obench.decode.state import DecodeState

pytestmark = pytest.mark.skipif(not cpu.available(), reason="compiled loops cannot run here")


@pytest.fixture(params=[1, 3], ids=["alone", "three"])
def threads(request: Any) -> Any:
    """Rows handed out to one thread, and to more threads than there may be cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def pair(case: Case, seed: int = 0) -> tuple[DecodeState, DecodeState]:
    """The same state on the PyTorch path and on the compiled one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "serves", lambda state: False)
        plain = state_of(case, seed)
    other = state_of(case, seed)
    assert plain.path is None and isinstance(other.path, HostDecode)
    return plain, other


# groups of one to eight, so that every tile and every rest of one is met; heads of all usual widths
CASES = [
    Case(),
    Case(group=1, heads=3, widths=(80, 80), capacities=(33, 40)),
    Case(group=2, widths=(96, 96), capacities=(50, 49)),
    Case(group=3, holes=True, batch=2, capacities=(47, 52)),
    Case(group=5, widths=(256, 256), capacities=(21,)),
    Case(group=7, widths=(64, 128), capacities=(97, 20)),
    Case(group=8, batch=2, widths=(128, 128), holes=True, capacities=(150, 133)),
    Case(policy="d2o(merge=values)", holes=True, batch=2),
    Case(policy="d2o(inherit=true)"),
    Case(policy="d2o(beta=1.0)", capacities=(20,)),
    Case(policy="d2o(hosts=important)", capacities=(40,)),
    Case(policy="h2o", holes=True, batch=2),
    Case(policy="streaming", holes=True, batch=2, group=6, widths=(80, 80)),
    Case(policy="full", capacities=(40, 173), group=2),
    Case(policy="full", capacities=(40, 173), holes=True, batch=2, widths=(128, 128)),
    Case(policy="tova", batch=2),
    Case(policy="roco"),
]


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.usefixtures("threads")
def test_steps_equal_both_references(case: Case) -> None:
    plain, other = pair(case)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for layer in range(len(case.capacities)):
            new = fresh(case, generator)
            expected, row = float64(other, layer, new)
            want, got = step(plain, layer, new), step(other, layer, new)
            assert got.shape == want.shape and got.dtype == want.dtype
            assert torch.allclose(got.double().view_as(expected), expected, atol=1e-5, rtol=1e-5)
            assert torch.allclose(got, want, atol=1e-5)
            if other.tracks:
                capacity = case.capacities[layer]
                assert torch.allclose(other.attention[layer, :, :capacity].double(), row, atol=1e-5, rtol=1e-5)
        plain.advance(), other.advance()
        agree(plain, other)


def test_the_first_of_equal_hosts_wins() -> None:
    case = Case(heads=1, group=2, capacities=(100,))
    plain, other = pair(case)
    for state in (plain, other):
        state.store.keys(0)[:] = state.store.keys(0)[:, :1]
        state.pending_merge.inverse_norm[:] = 1 / state.store.keys(0)[0, 0].norm()
        state.pending_merge.key[:] = state.store.keys(0)[:, 0]
        state.pending_merge.queries[:, :, -1] = state.pending_merge.key * state.pending_merge.inverse_norm[..., :1]
        state.pending_merge.pending[:], state.pending_merge.bar[:] = True, -1.0
    new = fresh(case, torch.Generator().manual_seed(2))
    for state in (plain, other):
        step(state, 0, new)
        assert state.pending_merge.host.item() == 0


def test_nothing_to_host_and_a_first_eviction() -> None:
    case = Case(heads=2, capacities=(8,))
    plain, other = pair(case)
    for state in (plain, other):
        state.pending_merge.host_bias[0, 0] = -torch.inf
        state.extra["tau"][0, 1] = -torch.inf
        state.pending_merge.bar[0], state.pending_merge.pending[:] = -torch.inf, True
    new = fresh(case, torch.Generator().manual_seed(3))
    assert torch.allclose(step(plain, 0, new), step(other, 0, new), atol=1e-6)
    assert other.pending_merge.weight[0, 0] == 0 and other.pending_merge.weight[0, 1] > 0
    plain.advance(), other.advance()
    agree(plain, other)


def test_logits_far_apart_leave_no_weight() -> None:
    """Differences of more than float32's range of exponents: the lower ones weigh nothing, and nothing overflows."""
    case = Case(policy="h2o", heads=1, group=1, capacities=(20,))
    plain, other = pair(case)
    query, key, value = fresh(case, torch.Generator().manual_seed(3))
    for state in (plain, other):
        state.store.keys(0)[:, ::2] = query[:, :, 0] * 50
        state.store.keys(0)[:, 1::2] = query[:, :, 0] * -50
    new = query, key, value
    assert torch.allclose(step(plain, 0, new), step(other, 0, new), atol=1e-6)
    assert torch.allclose(plain.attention, other.attention, atol=1e-6)
    assert (other.attention == 0).sum() >= 9 and other.attention.isfinite().all()


@pytest.mark.parametrize("policy", ["full", "d2o", "h2o", "streaming"])
@pytest.mark.parametrize("family", ["llama-gqa4", "qwen3", "phi3", "gpt-neox", "falcon"])
def test_generation_equals_the_plain_path(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, found = tiny_model(family), []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(host, "serves", lambda state: False)
        session = Session(loaded, policy, None if policy == "full" else "0.4", max_new=12)
        logits = [session.prefill(prompts(30, 17, 30))]
        session.compress()
        for _ in range(12):
            logits.append(session.step(logits[0].argmax(-1)))
        assert isinstance(session.cache.state.path, HostDecode) is compiled
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_growing_cache_outgrows_its_slots(tiny: Any) -> None:
    from d2obench.cache import build

    model = tiny.model
    outputs = []
    for room in (4, 64):
        cache = build.cache("full", model=model, max_new=room)
        tokens = torch.arange(3, 23)[None]
        with torch.inference_mode():
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
            for token in range(12):
                out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        assert isinstance(cache.state.path, HostDecode)
        outputs.append(out)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("case", "serves"),
    [
        (Case(), True), (Case(dtype=torch.bfloat16), False), (Case(widths=(64, 24)), False),
        (Case(widths=(20, 32)), False), (Case(policy="d2o(threshold=layer)"), False),
    ],
)  # fmt: skip
def test_what_is_not_served_goes_the_plain_path(case: Case, serves: bool) -> None:
    assert isinstance(state_of(case).path, HostDecode) is serves


def test_without_a_team_all_is_pytorchs(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    state = state_of(Case())
    assert state.path is None and state._loops is None
