"""The kernels that merge what a prompt evicts on a GPU, against float64 and against PyTorch's operators."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from d2obench.policies import merging

pytestmark = [
    pytest.mark.needs("triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run on the GPU: pytest -m cuda"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # what is masked computes with −inf
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernels in Triton's interpreter."""
    name = "d2obench.policies.merging_triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield importlib.import_module(name)
    sys.modules.pop(name)


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cosines(evicted: Tensor, kept: Tensor, targets: Tensor) -> Tensor:
    """Float64 ``[R, E, C]``, −inf for what is no target."""
    e, k = (held.double() / held.double().norm(dim=-1, keepdim=True).clamp_min(1e-6) for held in (evicted, kept))
    return (e @ k.transpose(1, 2)).masked_fill(~targets[:, None], -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "slots", "width"), [(1, 1, 16), (70, 37, 24), (33, 130, 64)])
def test_the_nearest_key_is_the_nearest(kernels: Any, count: int, slots: int, width: int, dtype: torch.dtype) -> None:
    evicted, kept = rows(3, count, width, dtype=dtype), rows(3, slots, width, seed=1, dtype=dtype).mul(3)
    targets = torch.rand(3, slots, generator=torch.Generator().manual_seed(2)) < 0.7
    targets[:, 0], targets[2] = True, False
    found, place = kernels.nearest_keys(evicted, kept, targets, 1e-6)
    expected = cosines(evicted, kept, targets)
    torch.testing.assert_close(found.double(), expected.max(-1).values, rtol=1e-5, atol=1e-6)
    # the target is one of the highest cosine; where no key may be a target, the first
    assert torch.equal(place[:2], expected[:2].argmax(-1))
    assert (place[2] == 0).all() and (found[2] == -math.inf).all()


def test_of_equal_keys_the_first_is_the_target(kernels: Any) -> None:
    kept = torch.full((1, 90, 16), 2.0)
    targets = torch.ones(1, 90, dtype=torch.bool)
    targets[0, :3] = False
    assert (kernels.nearest_keys(rows(1, 5, 16).mul(4).round(), kept, targets, 1e-6)[1] == 3).all()


def test_keys_without_length_and_nothing_evicted(kernels: Any) -> None:
    targets = torch.ones(1, 3, dtype=torch.bool)
    assert (kernels.nearest_keys(torch.zeros(1, 2, 16), rows(1, 3, 16), targets, 1e-6)[0] == 0).all()
    assert kernels.nearest_keys(torch.zeros(1, 0, 16), rows(1, 3, 16), targets, 1e-6)[0].shape == (1, 0)


@pytest.mark.parametrize(("count", "slots", "widths"), [(1, 1, (16,)), (50, 7, (16, 24)), (60, 20, (1, 64))])
def test_sums_are_those_of_each_target(kernels: Any, count: int, slots: int, widths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, slots, (3, count), generator=generator)
    target[1] = slots - 1  # all into one
    weight = torch.rand(3, count, generator=generator)
    weight[torch.rand(3, count, generator=generator) < 0.3] = 0
    given = [rows(3, count, width, seed=width) for width in widths]
    total, *sums = kernels.segment_sums(target, weight, slots, given)
    one_hot = torch.nn.functional.one_hot(target, slots).double() * weight.double()[..., None]
    torch.testing.assert_close(total[..., 0].double(), one_hot.sum(1), rtol=1e-5, atol=1e-6)
    for found, vectors in zip(sums, given, strict=True):
        torch.testing.assert_close(found.double(), one_hot.transpose(1, 2) @ vectors.double(), rtol=1e-5, atol=1e-5)
    again = kernels.segment_sums(target, weight, slots, given)
    assert all(torch.equal(a, b) for a, b in zip(again, [total, *sums], strict=True))


def test_an_entry_without_weight_adds_nothing_whatever_it_holds(kernels: Any) -> None:
    given = rows(1, 4, 16)
    given[0, 2] = math.inf
    weight = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    total, sums = kernels.segment_sums(torch.tensor([[1, 1, 1, 0]]), weight, 3, [given])
    assert total.flatten().tolist() == [1, 3, 0]
    torch.testing.assert_close(sums[0, 1], given[0, 0] + 2 * given[0, 1])
    assert torch.equal(sums[0, 2], torch.zeros(16))


@pytest.mark.parametrize("reason", ["compiler", "memory"])
def test_kernels_that_do_not_compile_are_said_and_not_asked_again(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def broken(kernels: Any) -> Any:
        asked.append(kernels)
        raise RuntimeError("no ptxas") if reason == "compiler" else torch.OutOfMemoryError

    monkeypatch.setattr(merging, "_refused", {})
    monkeypatch.setattr(merging, "_missing", lambda device: "")
    monkeypatch.setitem(sys.modules, "d2obench.policies.merging_triton", SimpleNamespace())
    keys = torch.zeros(1, 2, 16)
    if reason == "memory":
        with pytest.raises(torch.OutOfMemoryError):
            merging._by_kernel(keys, broken)
        assert merging._refused == {}, "with more room they compile"
        return
    assert merging._by_kernel(keys, broken) is merging._by_kernel(keys, broken) is None
    assert len(asked) == 1
    assert merging.kernel_fallback(keys.device, keys.dtype) == "the kernels did not compile (RuntimeError: no ptxas)"
