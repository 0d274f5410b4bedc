"""What must not end in a silent wrong number or in damaged memory: wrong sizes, other dtypes, NaN, tiny budgets."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_cases import Case, fresh, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import prompts, tiny_model
from transformers import DynamicCache

from d2obench import cpu
from d2obench.attention.interface import keyword
from d2obench.cache import Session
from d2obench.decode import backend
from d2obench.errors import D2OBenchError, ModelError
from d2obench.models import LoadedModel

POLICIES = ["full", "h2o", "d2o", "streaming", "tova", "roco", "cam", "random", "snapkv(window=4)",
            "d2o(preset=mass)"]  # fmt: skip


def opened(model: LoadedModel, policy: str, *lengths: int, budget: str = "0.4", max_new: int = 8) -> Session:
    session = Session(model, policy, None if policy == "full" else budget, max_new=max_new)
    session.prefill(prompts(*lengths))
    session.compress()
    return session


def broken(family: str = "llama-gqa2", dtype: torch.dtype = torch.float32, poison: str = "") -> LoadedModel:
    """A copy of a model of another dtype, or with one NaN in a weight of its layer 1."""
    loaded = tiny_model(family)
    model = deepcopy(loaded.model).to(dtype)
    if poison:
        getattr(model.model.layers[1].self_attn, poison).weight.data[0, 0] = torch.nan
    return replace(loaded, model=model, dtype=dtype)


@pytest.mark.parametrize("lengths", [(10,), (33, 33), (33, 10)])
@pytest.mark.parametrize("budget", ["0.01", "1", "2", "5"])
def test_released_at_budgets_of_a_few_tokens(budget: str, lengths: tuple[int, ...]) -> None:
    session = opened(tiny_model("llama-deep"), "d2o(preset=released)", *lengths, budget=budget)
    tokens = torch.arange(3, 3 + len(lengths))
    for _ in range(8):
        assert session.step(tokens).isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_of_another_batch_is_one_line(policy: str) -> None:
    session = opened(tiny_model("llama-gqa2"), policy, 20, 12)
    for tokens in (torch.tensor([3]), torch.tensor([3, 4, 5])):
        with pytest.raises(D2OBenchError):
            session.step(tokens)


@pytest.mark.parametrize("policy", ["full", "h2o", "d2o"])
def test_a_dtype_that_changes_after_the_prompt_is_one_line(policy: str) -> None:
    model = broken()
    session = opened(model, policy, 20, 12)
    model.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match="bfloat16"):
        session.step(torch.tensor([3, 4]))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["full", "h2o", "d2o", "streaming"]),
    st.sampled_from(["query", "key", "value"]),
    st.sampled_from(["batch", "heads", "tokens", "width", "dtype", "meta"]),
    st.integers(0, 5),
)
def test_tensors_that_do_not_fit_never_reach_a_loop(policy: str, which: str, what: str, size: int) -> None:
    case = Case(policy=policy, batch=2)
    state = state_of(case)
    new = dict(zip(("query", "key", "value"), fresh(case, torch.Generator().manual_seed(1)), strict=True))
    if what == "dtype":
        new[which] = new[which].to([torch.float16, torch.bfloat16, torch.float64][size % 3])
    elif what == "meta":
        new[which] = new[which].to("meta")
    else:
        shape = list(new[which].shape)
        at = ["batch", "heads", "tokens", "width"].index(what)
        shape[at] = size + (size >= shape[at])
        new[which] = torch.zeros(shape)

    def step() -> None:
        state.write(0, new["key"], new["value"])
        state.attend(0, new["query"], 0.1)

    with pytest.raises(ModelError, match="a decode step's"):
        step()


def test_strides_do_not_matter() -> None:
    case = Case(policy="h2o", batch=2)
    query, key, value = fresh(case, torch.Generator().manual_seed(1))
    outs = []
    for wild in (False, True):
        state = state_of(case)
        given = [held.transpose(1, 3).contiguous().transpose(1, 3) if wild else held for held in (query, key, value)]
        state.write(0, *given[1:])
        outs.append(state.attend(0, given[0], 0.1))
    assert torch.equal(*outs)


def test_a_step_beyond_the_slots_is_one_line() -> None:
    case = Case(policy="full", capacities=(21,))
    state = state_of(case)
    generator = torch.Generator().manual_seed(1)
    for _ in range(9):
        query, key, value = fresh(case, generator)
        state.write(0, key, value)
        state.attend(0, query, 0.1)
        state.advance()
    with pytest.raises(ModelError, match="every slot"):
        state.write(0, *fresh(case, generator)[1:])


def test_a_loop_is_not_given_what_it_does_not_take() -> None:
    from d2obench.cpu.products import NormArguments

    for wrong in (torch.zeros(3, dtype=torch.float64), torch.zeros(3, 4).T):
        with pytest.raises(TypeError, match=r"NormArguments\.x must be contiguous torch\.float32"):
            NormArguments().point(x=wrong)


@pytest.mark.skipif(not cpu.available(), reason="compiled loops cannot run here")
def test_an_error_inside_a_loop_reaches_its_caller() -> None:
    from numba import njit

    from d2obench.cpu import HEADER, Arguments, language

    class Nothing(Arguments):
        _fields_ = HEADER

    @njit
    def stops(given: Any) -> None:
        while language.next_item(given) >= 0:
            raise ValueError

    def broken(given: Any) -> None:
        try:
            stops(given)
        except Exception:
            language.fail(given)

    made = language.loop(lambda arguments: 0)(broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the compiled loop 'broken' stopped at an error"):
            cpu.launch(made, Nothing(items=5))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("policy", ["full", "h2o", "d2o", "streaming", "roco", "cam", "d2o(preset=mass)"])
@pytest.mark.parametrize("poison", ["q_proj", "k_proj", "v_proj"])
def test_nan_stays_nan(poison: str, policy: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken model gets no figures: as with transformers' own cache, every logit is NaN from the first step on."""
    model, texts = broken(poison=poison), prompts(20)
    if not compiled:
        monkeypatch.setattr(backend, "OFFERS", ())
    session = opened(model, policy, 20)
    plain = DynamicCache()
    with torch.inference_mode():
        model.model(torch.tensor(texts), **{keyword(model.model): plain})
        for token in range(3, 8):
            theirs = model.model(torch.tensor([[token]]), **{keyword(model.model): plain}).logits[:, -1]
            ours = session.step(torch.tensor([token]))
            assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()


def test_infinity_comes_through_as_pytorchs_does() -> None:
    """One infinite value of a token: what attends to it is infinite or NaN, on every path alike."""
    case = Case(policy="h2o", capacities=(20,))
    found = []
    for offers in (backend.OFFERS, ()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "OFFERS", offers)
            state = state_of(case)
        state.store.values(0)[0, 3, 5] = torch.inf
        state.store.values(0)[1, 3, 6] = -torch.inf
        state.store.keys(0)[1, 4, 2] = torch.inf
        query, key, value = fresh(case, torch.Generator().manual_seed(1))
        state.write(0, key, value)
        found.append(state.attend(0, query, 0.1))
    torch.testing.assert_close(*found, equal_nan=True)
    assert not found[0].isfinite().all()


@pytest.mark.parametrize("policy", [*POLICIES, "d2o(preset=released)", "d2o(interval=3)"])
def test_a_float64_model_runs_on_pytorch_operators(policy: str) -> None:
    wide, texts = broken(dtype=torch.float64), prompts(30, 19)
    narrow = opened(tiny_model("llama-gqa2"), policy, 30, 19)
    session = opened(wide, policy, 30, 19)
    assert len(texts) == 2
    for token in range(3, 9):
        tokens = torch.tensor([token, token + 1])
        assert (session.step(tokens) - narrow.step(tokens)).abs().max() < 1e-3
    assert session.decode_path == "PyTorch operators: there are no compiled loops for float64"


def test_no_misuse_damages_the_heap() -> None:
    """Wrong batches, dtypes changed after the prompt, caches of other models, reused ones, steps beyond the slots; each
    ends in an error or in numbers, and glibc finds nothing damaged."""
    checks = {"GLIBC_TUNABLES": "glibc.malloc.check=3", "MALLOC_PERTURB_": "165"}
    debug = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
    preload = {"LD_PRELOAD": str(debug)} if debug.exists() else {}
    words = [sys.executable, str(Path(__file__).parent / "misuse.py"), "1", "40"]
    done = subprocess.run(words, env={**os.environ, **checks, **preload}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("done"), done.stderr[-2000:]
    assert "Exception ignored" not in done.stderr
