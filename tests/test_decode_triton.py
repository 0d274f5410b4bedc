"""Triton kernels of a decode step, in Triton's interpreter: what the conformance suite's random numbers don't meet,
and what is not served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decode_cases import Case, fresh, state_of, step
from kernels import interpreted  # noqa: F401
from tiny_families import prompts, tiny_model

from d2obench import compiler
from d2obench.attention.interface import keyword
from d2obench.cache import Session
from d2obench.cache import policy_cache as cache_module
from d2obench.decode import backend
from d2obench.decode.state import DecodeState
from d2obench.decode.triton import backend as kernels
from d2obench.policies.d2o import D2O

pytestmark = [
    pytest.mark.needs("triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run on the GPU: pytest -m cuda"),
    pytest.mark.usefixtures("interpreted"),
]


def split(case: Case, splits: int) -> DecodeState:
    """A state whose rows are each split over several programs."""
    state = state_of(case)
    state.backend = kernels.TritonKernels(state, 4, True, splits=splits)
    return state


@pytest.mark.parametrize("splits", [1, 3])
def test_the_first_of_equal_targets_and_of_equal_scores_wins(splits: int) -> None:
    case = Case(heads=1, group=2, capacities=(100,))
    state = split(case, splits)
    merge = state.merge
    state.store.keys(0)[:] = state.store.keys(0)[:, :1]
    merge.inverse_norm[:] = 1 / state.store.keys(0)[0, 0].norm()
    merge.key[:] = state.store.keys(0)[:, 0]
    merge.queries[:, :, -1] = merge.key * merge.inverse_norm[..., :1]
    merge.pending[:], merge.required[:] = True, -1.0
    state.score[:, :, 4:] = 1.0
    query, key, value = fresh(case, torch.Generator().manual_seed(2))
    step(state, 0, (torch.zeros_like(query), key, value))
    assert merge.target.item() == 0
    state.attention[:] = 1.0
    state.advance()
    assert state.slot.tolist() == [[4]]


def test_splits_give_what_one_program_gives() -> None:
    case = Case(capacities=(70, 99))
    one, many = split(case, 1), split(case, 3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for layer in range(2):
            new = fresh(case, generator)
            torch.testing.assert_close(step(one, layer, new), step(many, layer, new))
        one.advance(), many.advance()
        assert torch.equal(one.position, many.position)
        torch.testing.assert_close(one.threshold, many.threshold)


@pytest.mark.parametrize(("policy", "splits"), [("full", 1), ("full", 3), ("h2o", 3), ("d2o(preset=mass)", 2)])
def test_rows_of_unequal_length(policy: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(group=2, capacities=(170, 201), missing=(0, 130), policy=policy)
    state = split(case, splits)
    monkeypatch.setattr(backend, "OFFERS", ())
    plain, generator = state_of(case), torch.Generator().manual_seed(1)
    assert state.store.slots == plain.store.slots == 2 * (170 + 201 - 130)
    for _ in range(2):
        for layer in range(2):
            new = fresh(case, generator)
            torch.testing.assert_close(step(state, layer, new), step(plain, layer, new), rtol=1e-4, atol=1e-5)
        state.advance(), plain.advance()
        assert torch.equal(state.position, plain.position) and torch.equal(state.target, plain.target)
        torch.testing.assert_close(state.score, plain.score)
    torch.testing.assert_close(state.store.key_rows, plain.store.key_rows)
    torch.testing.assert_close(state.store.value_rows, plain.store.value_rows)


def test_a_merge_target_that_leaves_takes_the_merge_along() -> None:
    """The victim of a step is the merge target of the same step: what is staged is the merged entry."""
    case = Case(heads=1, group=2, capacities=(20,))
    state = state_of(case)
    merge, old = state.merge, state.store.keys(0)[0, 5].clone()
    merge.key[:] = old + 0.5
    merge.queries[:, :, -1] = merge.key / merge.key.norm(dim=-1, keepdim=True)
    merge.pending[:], merge.required[:] = True, -torch.inf
    state.score[:, :, 5] = -9.0
    step(state, 0, fresh(case, torch.Generator().manual_seed(4)))
    state.advance()
    assert state.slot.item() == merge.target.item() == 5
    cosine = torch.cosine_similarity(old, old + 0.5, dim=0)
    expected = old + torch.sigmoid(cosine - 1) * 0.5
    torch.testing.assert_close(merge.key[0, 0], expected)
    assert merge.queries[0, 0, -1].norm() == pytest.approx(1.0)


def test_without_a_target_nothing_is_merged_and_the_threshold_stays() -> None:
    case = Case(heads=2, capacities=(8,))
    state = state_of(case)
    state.merge.target_bias[0, 0] = -torch.inf
    state.threshold[0, 1] = -torch.inf  # the row's first eviction
    state.merge.required[0], state.merge.pending[:] = -torch.inf, True
    step(state, 0, fresh(case, torch.Generator().manual_seed(3)))
    assert state.merge.weight[0, 0] == 0 and state.merge.weight[0, 1] > 0
    state.advance()
    assert state.threshold[0, 0] == pytest.approx(0.3) and state.threshold[0, 1].isfinite()


def test_a_growing_cache_reads_its_length_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a launch is given but tensors changes from step to step."""
    case = Case(policy="full", capacities=(40,))
    state = split(case, 2)
    given: list[list[Any]] = []
    real = kernels.launch

    def noting(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        kept = [arg if not isinstance(arg, torch.Tensor) else arg.shape for arg in args]
        given.append([grid, *kept, *meta.items()])
        real(kernel, grid, *args, **meta)

    monkeypatch.setattr(kernels, "launch", noting)
    generator = torch.Generator().manual_seed(1)
    for _ in range(9):
        step(state, 0, fresh(case, generator))
        state.advance()
    assert all(one == given[index % 2] for index, one in enumerate(given))
    assert state.held().tolist() == [[40, 40]]


@pytest.mark.parametrize("family", ["phi3", "falcon", "gemma3"])
def test_a_model_generates_the_same_either_way(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for offers in (backend.OFFERS, ()):
        monkeypatch.setattr(backend, "OFFERS", offers)
        session = Session(tiny_model(family), "d2o", "0.4", max_new=4)
        logits = [session.prefill(prompts(24, 19))]
        session.compress()
        logits += [session.step(logits[0].argmax(-1)) for _ in range(4)]
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_fork_keeps_to_the_path() -> None:
    session = Session(tiny_model("llama-gqa2"), "full", None, max_new=9)
    session.prefill(prompts(24, 19))
    session.compress()
    session.step(torch.tensor([3, 4]))
    saved, tokens = session.snapshot(), torch.tensor([5, 6])
    first = [session.step(tokens), session.step(tokens)]
    session.restore(saved)
    assert all(torch.equal(session.step(tokens), one) for one in first)
    session.restore(saved)
    session.skip_to(3)
    assert session.footprint().held == [[28.0, 23.0]] * 2
    assert torch.isfinite(session.step(tokens)).all()


def test_a_growing_cache_outgrows_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``max_new`` slots are added on the way: the path follows the new store."""

    def run() -> torch.Tensor:
        loaded = tiny_model("llama-gqa2")
        cache = cache_module.cache("full", model=loaded.model)
        out = loaded.model.generate(
            torch.tensor(prompts(12)),
            **{keyword(loaded.model): cache},
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
        )
        assert cache.state.store.capacities[0] > 12 + 3
        return out

    monkeypatch.setattr(cache_module, "SPARE", 3)
    fast = run()
    monkeypatch.setattr(backend, "OFFERS", ())
    assert torch.equal(run(), fast)


# --- what is not served -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own(D2O):
    """A policy derived from one with a kernel, with a rule of its own."""

    def victims(self, state: DecodeState) -> torch.Tensor:
        return state.oldest(0)


@pytest.mark.parametrize(
    ("policy", "path"),
    [
        ("h2o", "Triton kernels (interpreted)"),
        ("d2o(threshold=layer)", "PyTorch operators: a threshold per layer needs all its KV heads at once"),
        ("tova", "Triton kernels (interpreted), PyTorch operators between steps: no kernel has the rule Latest"),
        ("cam", "Triton kernels (interpreted), PyTorch operators between steps: no kernel has the rule Ring"),
        ("h2o(normalised=true)", "Triton kernels (interpreted), PyTorch operators between steps: no kernel normalises"),
        (Own(), "Triton kernels (interpreted), PyTorch operators between steps: the policy's rule is code of its own"),
    ],
)
def test_what_is_not_served_says_why(policy: Any, path: str) -> None:
    state = state_of(Case(policy=policy))
    assert state.decode_path.startswith(path)
    for layer in range(2):
        step(state, layer, fresh(Case(), torch.Generator().manual_seed(1)))
    state.advance()


def test_a_wide_head_is_not_served() -> None:
    assert "288" in state_of(Case(widths=(288, 288), capacities=(9,), policy="h2o")).decode_path


def test_many_query_heads_on_one_kv_head_are_not_served() -> None:
    """Falcon-7B has 71: its products would take more registers and shared memory than GPUs have."""
    path = state_of(Case(heads=1, group=71, capacities=(9,), policy="h2o")).decode_path
    assert path == "PyTorch operators: 71 query heads share a KV head, more than 31"


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("ptxas fatal: unknown target\nand a page of assembly")

    monkeypatch.setattr(kernels, "TritonKernels", broken)
    words = "the kernels can't be used (RuntimeError: ptxas fatal: unknown target)"
    assert state_of(Case(policy="h2o")).decode_path == f"PyTorch operators: {words}"


def test_a_probe_launches_nothing() -> None:
    state = state_of(Case())
    held = (state.store.key_rows, state.score, state.position, state.free)
    before = [tensor.clone() for tensor in held]
    state.backend.probe()
    assert all(map(torch.equal, held, before))


def test_a_device_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert compiler.missing(torch.device("mps")) == "there are no kernels for mps"
