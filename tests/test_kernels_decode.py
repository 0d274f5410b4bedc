"""The fused decode path in Triton's interpreter: against the PyTorch path, a float64 reference, and in generation."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_cases import TOLERANCE, Case, agree, float64, fresh, named, state_of, step
from tiny_families import prompts, tiny_model

from d2obench.cache import Session
from d2obench.decode import triton as kernels
from d2obench.decode.cpu import backend as host
from d2obench.decode.state import DecodeState
from d2obench.policies import parse_policy
from d2obench.policies.base import Policy
from d2obench.policies.d2o import D2O

pytestmark = [
    pytest.mark.needs("triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run on the GPU: pytest -m cuda"),
    # rows that pad a group to 16 and lanes that are masked compute with −inf; nothing of them is kept
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels made for the interpreter; tests say when it is used (:func:`fused`)."""
    names = [f"d2obench.decode.triton.{name}" for name in ("attend", "merge", "turn", "path")]
    before = {name: sys.modules.pop(name, None) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in names:
            importlib.import_module(name)
    yield
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns the fused path on."""
    return lambda: monkeypatch.setenv("TRITON_INTERPRET", "1")


# --- one step of one layer ------------------------------------------------------------------------------------------


def pair(case: Case, fused: Any, seed: int = 0) -> tuple[DecodeState, DecodeState]:
    """The same state on the PyTorch path and on the fused one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "serves", lambda state: False)
        plain = state_of(case, seed)
    assert plain.path is None and plain.fallback == ""
    fused()
    other = state_of(case, seed)
    assert other.path is not None, other.fallback
    if case.splits:
        other.path = type(other.path)(other, 4, True, splits=case.splits)
    return plain, other


CASES = [
    Case(),
    Case(splits=3),
    Case(group=1, heads=3, widths=(80, 80), capacities=(33, 40), splits=2),
    Case(group=8, batch=2, widths=(128, 128), holes=True, capacities=(50, 33)),
    Case(group=8, batch=2, heads=1, widths=(128, 64), holes=True, capacities=(100,), splits=3),
    Case(group=2, dtype=torch.bfloat16, widths=(64, 80), capacities=(70, 131), splits=2),
    Case(group=3, dtype=torch.float16, holes=True, batch=2),
    Case(policy="d2o(merge=values)", splits=2, holes=True, batch=2),
    Case(policy="d2o(merge=values)", dtype=torch.bfloat16, widths=(128, 128)),
    Case(policy="d2o(inherit=true)", splits=2),
    Case(policy="d2o(beta=1.0)", capacities=(20,)),
    Case(policy="d2o(hosts=important)", capacities=(40,)),
    Case(policy="h2o", holes=True, batch=2, splits=2),
    Case(policy="h2o(sinks=2)", dtype=torch.bfloat16, group=5, capacities=(45, 70)),
    Case(policy="streaming", holes=True, batch=2, widths=(80, 80)),
    Case(policy="local", group=1, dtype=torch.float16, splits=3, capacities=(100,)),
    Case(policy="full", capacities=(40, 73), splits=3, group=2),
    Case(policy="full", holes=True, batch=2, dtype=torch.bfloat16, widths=(128, 128)),
    Case(policy="tova", batch=2, splits=2),
    Case(policy="roco"),
]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_steps_equal_both_references(case: Case, fused: Any) -> None:
    plain, other = pair(case, fused)
    generator, near = torch.Generator().manual_seed(1), TOLERANCE[case.dtype]
    exact = case.dtype == torch.float32
    for _ in range(3):
        for layer in range(len(case.capacities)):
            new = fresh(case, generator)
            expected, row = float64(other, layer, new)
            want, got = step(plain, layer, new), step(other, layer, new)
            assert got.shape == want.shape and got.dtype == want.dtype
            assert torch.allclose(got.double().view_as(expected), expected, atol=near, rtol=near)
            if exact:
                assert torch.allclose(got, want, atol=1e-5)
            if other.tracks:
                capacity = case.capacities[layer]
                assert torch.allclose(other.attention[layer, :, :capacity].double(), row, atol=near, rtol=near)
        plain.advance()
        other.advance()
        if exact:
            agree(plain, other)
        else:
            consistent(other)


def consistent(state: DecodeState) -> None:
    """What D2O keeps of keys is what the keys say."""
    if state.pending_merge is None:
        return
    for layer, capacity in enumerate(state.store.capacities):
        slot = state.slot[layer, :, None]
        norm = 1 / state.store.keys(layer).float().norm(dim=-1).clamp_min(1e-6)
        known = state.pending_merge.inverse_norm[layer, :, :capacity]
        held = (state.position[layer, :, :capacity] >= 0).scatter(1, slot, False)
        assert torch.allclose(norm[held], known[held], rtol=1e-4)


def test_merges_are_taken_and_refused(fused: Any) -> None:
    case = Case(heads=3, capacities=(40,))
    plain, other = pair(case, fused)
    generator, weights = torch.Generator().manual_seed(5), []
    for _ in range(8):
        for layer in range(1):
            new = fresh(case, generator)
            step(plain, layer, new), step(other, layer, new)
        weights.append(other.pending_merge.weight.clone())
        plain.advance(), other.advance()
        agree(plain, other)
    taken = torch.stack(weights) > 0
    assert taken.any() and not taken[1:].all()
    assert other.extra["merged"].tolist() == taken.sum((0, 2)).tolist()


@pytest.mark.parametrize("splits", [1, 3])
def test_the_first_of_equal_hosts_and_of_equal_scores_wins(splits: int, fused: Any) -> None:
    case = Case(heads=1, group=2, capacities=(100,), splits=splits)
    plain, other = pair(case, fused)
    for state in (plain, other):
        state.store.keys(0)[:] = state.store.keys(0)[:, :1]
        state.pending_merge.inverse_norm[:] = 1 / state.store.keys(0)[0, 0].norm()
        state.pending_merge.key[:] = state.store.keys(0)[:, 0]
        state.pending_merge.queries[:, :, -1] = state.pending_merge.key * state.pending_merge.inverse_norm[..., :1]
        state.pending_merge.pending[:] = True
        state.pending_merge.bar[:] = -1.0
        state.score[:, :, 4:] = 1.0
    query, key, value = fresh(case, torch.Generator().manual_seed(2))
    for state in (plain, other):
        step(state, 0, (torch.zeros_like(query), key, value))
        assert state.pending_merge.host.item() == 0
    other.attention[:] = plain.attention[:] = 1.0
    plain.advance(), other.advance()
    assert plain.slot.tolist() == other.slot.tolist() == [[4]]


def test_a_host_that_leaves_takes_the_merge_along(fused: Any) -> None:
    """The victim of a step is the host of the same step: what is held aside is the merged entry."""
    case = Case(heads=1, group=2, capacities=(20,))
    plain, other = pair(case, fused)
    for state in (plain, other):
        carry = state.pending_merge
        carry.key[:] = state.store.keys(0)[:, 5] + 0.5
        carry.queries[:, :, -1] = carry.key / carry.key.norm(dim=-1, keepdim=True)
        carry.pending[:], carry.bar[:] = True, -torch.inf
        state.score[:, :, 5] = -9.0
    new = fresh(case, torch.Generator().manual_seed(4))
    step(plain, 0, new), step(other, 0, new)
    before = other.pending_merge.key.clone()
    plain.advance(), other.advance()
    assert other.slot.item() == other.pending_merge.host.item() == 5
    agree(plain, other)
    assert not torch.equal(other.pending_merge.key, before)
    merged = other.store.keys(0)[:, 5]
    assert torch.allclose(other.pending_merge.key[0], merged) and other.pending_merge.queries[
        0, 0, -1
    ].norm() == pytest.approx(1.0)


def test_nothing_to_host_and_a_first_eviction(fused: Any) -> None:
    """A row whose only entry is the newest merges nothing; a row without a threshold merges its first evictee."""
    case = Case(heads=2, capacities=(8,))
    plain, other = pair(case, fused)
    for state in (plain, other):
        state.pending_merge.host_bias[0, 0] = -torch.inf
        state.extra["tau"][0, 1] = -torch.inf
        state.pending_merge.bar[0] = -torch.inf
        state.pending_merge.pending[:] = True
    new = fresh(case, torch.Generator().manual_seed(3))
    assert torch.allclose(step(plain, 0, new), step(other, 0, new), atol=1e-6)
    assert other.pending_merge.weight[0, 0] == 0 and other.pending_merge.weight[0, 1] > 0
    plain.advance(), other.advance()
    agree(plain, other)


def test_a_growing_cache_reads_its_length_from_the_device(fused: Any) -> None:
    """Nothing that a launch is given but tensors changes from step to step."""
    case = Case(policy="full", capacities=(40,), splits=2)
    _, other = pair(case, fused)
    given: list[list[Any]] = []
    module = sys.modules["d2obench.decode.triton.backend"]
    real = module.launch

    def noting(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        kept = [arg if not isinstance(arg, torch.Tensor) else arg.shape for arg in args]
        given.append([grid, *kept, *meta.items()])
        real(kernel, grid, *args, **meta)

    generator = torch.Generator().manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch", noting)
        for _ in range(9):
            step(other, 0, fresh(case, generator))
            other.advance()
    assert all(one == given[index % 2] for index, one in enumerate(given))
    assert other.held().tolist() == [[40, 40]]


# --- generation -----------------------------------------------------------------------------------------------------


def generated(family: str, policy: str, steps: int, **kind: Any) -> tuple[torch.Tensor, torch.Tensor, Session]:
    loaded = tiny_model(family, **kind)
    budget = None if policy == "full" else "0.4"
    session = Session(loaded, policy, budget, max_new=steps)
    logits = session.prefill(prompts(24, 19))
    session.compress()
    tokens = []
    for _ in range(steps):
        tokens.append(logits.argmax(-1))
        logits = session.step(tokens[-1])
    return torch.stack(tokens, 1), logits, session


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("llama-gqa4", "full"),
        ("llama-mha", "h2o"),
        ("qwen3", "streaming"),
        ("llama-gqa2", "d2o"),
        ("phi3", "d2o(merge=values)"),
        ("gpt-neox", "snapkv"),
        ("falcon", "d2o"),
        ("llama-gqa2", "h2o(normalised=true)"),
        ("gemma3", "d2o"),
    ],
)
def test_generation_equals_the_plain_path(family: str, policy: str, fused: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "serves", lambda state: False)
        expected, logits, plain = generated(family, policy, 5)
    fused()
    tokens, got, session = generated(family, policy, 5)
    assert plain.cache.state.path is None and session.cache.state.path is not None
    assert torch.equal(tokens, expected)
    assert torch.allclose(got, logits, atol=1e-4)
    ours, theirs = session.footprint(), plain.footprint()
    assert (ours.merged, ours.evicted, ours.held) == (theirs.merged, theirs.evicted, theirs.held)


def test_a_fork_keeps_to_the_path(fused: Any) -> None:
    fused()
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


def test_a_growing_cache_outgrows_its_slots(fused: Any) -> None:
    """Without ``max_new`` slots are added on the way: the path follows the new store."""
    from d2obench.cache import build
    from d2obench.cache import policy_cache as cache_module

    def run() -> torch.Tensor:
        loaded = tiny_model("llama-gqa2")
        cache = build.cache("full", model=loaded.model)
        out = loaded.model.generate(
            torch.tensor(prompts(12)), past_key_values=cache, max_new_tokens=9, do_sample=False, eos_token_id=None
        )
        assert cache.state.store.capacities[0] > 12 + 3
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SPARE", 3)
        from d2obench.cache import compress as packing

        if hasattr(packing, "SPARE"):
            patch.setattr(packing, "SPARE", 3)
        plain = run()
        fused()
        assert torch.equal(run(), plain)


# --- what goes the other way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "reason"),
    [("d2o(threshold=layer)", "a threshold per layer"), ("h2o+quant(bits=4)", "quantised")],
)
def test_what_is_not_served_says_why(policy: str, reason: str, fused: Any) -> None:
    fused()
    _, _, session = generated("llama-gqa2", policy, 3)
    assert session.cache.state.path is None
    assert reason in session.cache.state.fallback


def test_a_wide_head_is_not_served(fused: Any) -> None:
    fused()
    state = state_of(Case(widths=(288, 288), capacities=(9,), policy="h2o"))
    assert state.path is None and "288" in state.fallback


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, fused: Any) -> None:
    fused()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("ptxas fatal: unknown target\nand a page of assembly")

    monkeypatch.setattr(sys.modules["d2obench.decode.triton.backend"], "FusedDecode", broken)
    state = state_of(Case(policy="h2o"))
    assert state.path is None
    assert state.fallback == "the kernels did not compile (RuntimeError: ptxas fatal: unknown target)"


def test_a_probe_launches_nothing(fused: Any) -> None:
    fused()
    state = state_of(Case(splits=None))
    before = [tensor.clone() for tensor in (state.store.key_rows, state.score, state.position, state.free)]
    state.path.probe()
    for tensor, old in zip((state.store.key_rows, state.score, state.position, state.free), before, strict=True):
        assert torch.equal(tensor, old)


@dataclass(frozen=True)
class Own(D2O):
    """A policy derived from one with a kernel, with a rule of its own."""

    def victims(self, state: DecodeState) -> torch.Tensor:
        return state.oldest(0)


@dataclass(frozen=True)
class Merging(Policy):
    def absorb_step(self, state: DecodeState, victims: torch.Tensor) -> None:
        raise AssertionError


def test_a_derived_policy_goes_its_own_way() -> None:
    rule_of = sys.modules["d2obench.decode.triton.backend"].rule_of
    state = state_of(Case(capacities=(9,)))
    assert rule_of(state) == "lowest"
    for policy in (Own(), Merging(), parse_policy("h2o(normalised=true)"), parse_policy("cam")):
        state.policy = policy
        assert rule_of(state) is None
    state.policy, state.pending_merge = parse_policy("streaming"), None
    assert rule_of(state) == "ring"


def test_a_device_without_kernels_says_so() -> None:
    assert kernels.missing(torch.device("mps")) == "there are no kernels for mps"


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Every kernel that a step of each rule launches, to machine code: tensor cores, no spills, and shared memory that
    the smallest supported GPUs have."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, str(Path(__file__).parent / "compile_decode.py")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    built = {line.split()[0] for line in done.stdout.splitlines()}
    assert built == {"attend", "join", "weigh", "mix", "turn"}
    assert "turn rotary" in done.stdout
