"""The compiled loops of a CPU: their parts against NumPy, what the conformance suite's random numbers don't meet, and
what is not served."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decode_cases import Case, fresh, state_of, step
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import int64
from tiny_families import prompts, tiny_model

from d2obench import cpu
from d2obench.attention.interface import keyword
from d2obench.cache import Session, policy_cache
from d2obench.cpu import language
from d2obench.decode import backend
from d2obench.decode.state import DecodeState

pytestmark = pytest.mark.skipif(not cpu.available(), reason="compiled loops cannot run here")
rows = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=70)


@given(rows, st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_first_extreme_is_numpys(row: list[float], largest: bool) -> None:
    array = np.array(row, np.float32)
    array[array == 0] = 0  # −0 and 0 are one number to NumPy
    beyond = np.concatenate([array, np.array([np.inf if largest else -np.inf], np.float32)])
    expected = array.argmax() if largest else array.argmin()
    assert language.first_extreme(beyond, len(array), largest) == expected
    assert language.highest(beyond, len(array)) == array.max()


@given(rows, st.data())
@settings(max_examples=200, deadline=None)
def test_the_smallest_is_numpys(row: list[float], data: Any) -> None:
    array = np.array(row, np.float32)
    place = data.draw(st.integers(0, len(row) - 1))
    assert language.smallest(array, np.empty_like(array), len(row), place) == np.sort(array)[place]


def test_they_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose file system is read-only."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    loop = language.compiled(int64)(lambda number: number + 1)
    assert loop(2) == 3


def pair(case: Case) -> tuple[DecodeState, DecodeState]:
    """The same state with PyTorch operators and with compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "OFFERS", ())
        plain = state_of(case)
    other = state_of(case)
    assert plain.decode_path == "PyTorch operators" and other.decode_path == "compiled CPU loops"
    return plain, other


def test_the_first_of_equal_targets_wins() -> None:
    case = Case(heads=1, group=2, capacities=(100,))
    for state in pair(case):
        state.store.keys(0)[:] = state.store.keys(0)[:, :1]
        merge = state.merge
        merge.inverse_norm[:] = 1 / state.store.keys(0)[0, 0].norm()
        merge.key[:] = state.store.keys(0)[:, 0]
        merge.queries[:, :, -1] = merge.key * merge.inverse_norm[..., :1]
        merge.pending[:], merge.required[:] = True, -1.0
        step(state, 0, fresh(case, torch.Generator().manual_seed(2)))
        assert merge.target.item() == 0


def test_without_a_target_nothing_is_merged_and_the_threshold_stays() -> None:
    case = Case(heads=2, capacities=(8,))
    for state in pair(case):
        state.merge.target_bias[0, 0] = -torch.inf
        state.threshold[0, 1] = -torch.inf  # the row's first eviction
        state.merge.required[0], state.merge.pending[:] = -torch.inf, True
        step(state, 0, fresh(case, torch.Generator().manual_seed(3)))
        assert state.merge.weight[0, 0] == 0 and state.merge.weight[0, 1] > 0
        state.advance()
        assert state.threshold[0, 0] == pytest.approx(0.3) and state.threshold[0, 1].isfinite()


def test_logits_far_apart_leave_no_weight() -> None:
    """Differences of more than float32's range of exponents: the lower ones weigh nothing, and nothing overflows."""
    case = Case(policy="h2o", heads=1, group=1, capacities=(20,))
    query, key, value = fresh(case, torch.Generator().manual_seed(3))
    for state in pair(case):
        state.store.keys(0)[:, ::2] = query[:, :, 0] * 50
        state.store.keys(0)[:, 1::2] = query[:, :, 0] * -50
        out = step(state, 0, (query, key, value))
        assert (state.attention == 0).sum() >= 9 and state.attention.isfinite().all() and out.isfinite().all()


def test_a_growing_cache_outgrows_its_slots(tiny: Any) -> None:
    outputs = []
    for room in (4, 64):
        cache = policy_cache.cache("full", model=tiny.model, max_new=room)
        with torch.inference_mode():
            tiny.model(input_ids=torch.arange(3, 23)[None], **{keyword(tiny.model): cache}, use_cache=True)
            for token in range(12):
                out = tiny.model(
                    input_ids=torch.tensor([[token]]), **{keyword(tiny.model): cache}, use_cache=True
                ).logits
        assert cache.state.decode_path == "compiled CPU loops"
        outputs.append(out)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("family", ["llama-gqa4", "qwen3", "phi3", "gpt-neox", "falcon"])
def test_a_model_generates_the_same_either_way(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for offers in (backend.OFFERS, ()):
        monkeypatch.setattr(backend, "OFFERS", offers)
        session = Session(tiny_model(family), "d2o", "0.4", max_new=8)
        logits = [session.prefill(prompts(30, 17, 30))]
        session.compress()
        logits += [session.step(logits[0].argmax(-1)) for _ in range(8)]
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "path"),
    [
        (Case(dtype=torch.bfloat16), "PyTorch operators: there are no compiled loops for bfloat16"),
        (Case(widths=(64, 24)), "PyTorch operators, compiled CPU loop between steps: head dims are no multiples"),
        (Case(widths=(20, 32)), "PyTorch operators, compiled CPU loop between steps: head dims are no multiples"),
        (Case(policy="d2o(threshold=layer)"), "PyTorch operators, compiled CPU loop between steps: a threshold per"),
        (Case(policy="d2o(interval=2)"), "compiled CPU loops, PyTorch operators between steps: several tokens"),
    ],
)  # fmt: skip
def test_what_is_not_served_says_why(case: Case, path: str) -> None:
    assert state_of(case).decode_path.startswith(path)


def test_where_no_loop_can_run_all_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert state_of(Case()).decode_path.startswith("PyTorch operators: compiled loops cannot run here")
