"""The compiled loops against their PyTorch twins and against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2obench.cache import Session
from d2obench.cpu import language
from d2obench.decode.cpu import native

loops = native.loops()
numbers = st.floats(width=32, allow_nan=False)


@given(st.lists(numbers, min_size=1, max_size=70), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_first_extreme_is_numpys(row, largest):
    array = np.array(row, np.float32)
    array[array == 0] = 0  # −0 and 0 are one number to NumPy
    beyond = np.concatenate([array, np.array([np.inf if largest else -np.inf], np.float32)])
    expected = array.argmax() if largest else array.argmin()
    assert language.first_extreme(beyond, len(array), largest) == expected


def test_they_compile_where_nothing_can_be_cached(monkeypatch):
    """As in a container whose file system is read-only."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    loop = language.compiled(loops.I8)(lambda number: number + 1)
    assert loop(2) == 3


def decoded(tiny, policy, monkeypatch, compiled):
    """State, logits and footprint after some steps over given tokens, prompts of unequal length."""
    with monkeypatch.context() as patch:
        if not compiled:
            patch.setattr(native, "serves", lambda store: False)
        generator = torch.Generator().manual_seed(5)
        prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (70, 53, 70)]
        session = Session(tiny, policy, "0.3", max_new=30)
        session.prefill(prompts)
        session.compress()
        for _ in range(30):
            logits = session.step(torch.randint(0, 256, (3,), generator=generator))
        state = session.cache.state
        assert (state._loops is not None) is compiled
        assert state.path is None or compiled
        return state, logits, replace(session.footprint(), state_bytes=0)


@pytest.mark.parametrize(
    "policy",
    [
        "d2o", "d2o(merge=values)", "d2o(inherit=true)", "d2o(beta=1)", "d2o(beta=0.2,sinks=0,recent=0.5)",
        "d2o(preset=tuned)", "d2o(threshold=layer)", "d2o(hosts=important)", "h2o", "h2o(normalised=true)", "streaming",
        "local", "tova", "roco", "random", "cam",
    ],
)  # fmt: skip
def test_compiled_and_plain_steps_agree(tiny, policy, monkeypatch):
    fast, logits, print_fast = decoded(tiny, policy, monkeypatch, compiled=True)
    plain, expected, print_plain = decoded(tiny, policy, monkeypatch, compiled=False)
    assert torch.equal(fast.position, plain.position)
    assert torch.equal(fast.slot, plain.slot)
    assert print_fast == print_plain
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.store.key_rows, plain.store.key_rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.store.value_rows, plain.store.value_rows, rtol=1e-4, atol=1e-5)
    assert fast.extra.keys() == plain.extra.keys()
    for name in fast.extra:
        torch.testing.assert_close(fast.extra[name], plain.extra[name], rtol=1e-4, atol=1e-5)


def test_merges_happen_in_what_is_compared(tiny, monkeypatch):
    assert decoded(tiny, "d2o", monkeypatch, compiled=True)[2].merged > 20
