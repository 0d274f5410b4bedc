"""The prompt's Triton kernels in Triton's interpreter, against a dense float64 map and the path in blocks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from d2obench.attention import prompt as prefill
from d2obench.policies.base import Needs

needs_triton = pytest.mark.needs("triton")


@pytest.fixture(scope="module")
def columns() -> Iterator[Any]:
    """The kernels, made for the interpreter."""
    names = ["d2obench.decode.triton.attend", "d2obench.attention.triton_columns"]
    before = {name: sys.modules.pop(name, None) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module(names[1])
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def inputs(heads: int, group: int, new: int, length: int, dim: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + dim)
    shapes = ((heads * group, new), (heads, length), (heads, length))
    # as a model leaves them: tokens before heads in memory
    return [
        torch.randn(batch, tokens, count, dim, generator=generator).mul(1.5).to(dtype).transpose(1, 2)
        for count, tokens in shapes
    ]


def dense(q: Tensor, k: Tensor, scale: float, start: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 probabilities ``[B, H, G, Q, L]`` and their log-sum-exp; rows of padding are zeros."""
    (batch, query_heads, new, dim), (heads, length) = q.shape, k.shape[1:3]
    grouped = q.double().reshape(batch, heads, query_heads // heads, new, dim)
    logits = torch.einsum("bhgid,bhjd->bhgij", grouped, k.double()) * scale
    position = torch.arange(length - new, length)
    hidden = (torch.arange(length) > position[:, None]) | (torch.arange(length) < start)
    logits.masked_fill_(hidden, -torch.inf)
    lse = logits.logsumexp(-1).flatten(1, 2)
    return logits.softmax(-1).masked_fill((position < start)[:, None], 0.0), lse


CASES = [
    # heads, group, new, length, dim, dtype
    (2, 3, 47, 47, 64, torch.float32),
    (1, 4, 130, 130, 128, torch.bfloat16),
    (2, 2, 65, 65, 80, torch.bfloat16),
    (1, 1, 1, 1, 64, torch.float32),
    (3, 1, 32, 32, 80, torch.float32),
    (1, 2, 23, 100, 64, torch.float16),
    (1, 2, 1, 33, 128, torch.float32),
    (1, 9, 20, 40, 64, torch.float32),
    (1, 2, 50, 50, 192, torch.bfloat16),
]


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_dense_map(columns: Any, case: tuple[Any, ...]) -> None:
    q, k, _ = inputs(*case)
    batch, heads, length, dim = k.shape
    scale = dim**-0.5
    weights, expected = dense(q, k, scale)
    lse = columns.log_sum_exp(q, k, scale)
    assert torch.allclose(lse.double(), expected, atol=1e-4)
    total, square = torch.full((batch, heads, length), 7.0), torch.full((batch, heads, length), 7.0)
    columns.sum_columns(q, k, scale, lse, total, square)
    mean = weights.mean(2)
    assert torch.allclose(total.double(), mean.sum(2), atol=1e-4)
    assert torch.allclose(square.double(), mean.square().sum(2), atol=1e-4)
    apart = torch.full((batch, q.shape[1], length), 7.0)
    columns.sum_columns(q, k, scale, lse, apart)
    assert torch.allclose(apart.double(), weights.flatten(1, 2).sum(2), atol=1e-4)


@needs_triton
@pytest.mark.parametrize(
    "needs",
    [Needs(columns=True), Needs(columns=True, squares=True), Needs(columns=True, heads=True),
     Needs(columns=True, window=5)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("starts", [[9, 9], [0, 31]], ids=str)
@pytest.mark.parametrize("new", [60, 20])
def test_a_padded_prompt_by_kernels_is_the_prompt_in_blocks(
    columns: Any, needs: Needs, starts: list[int], new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(2, 2, new, 60, 64, torch.float32)
    expected, stats = prefill.prompt_attention(q, k, v, 0.1, starts, needs)
    calls = []
    monkeypatch.setattr(prefill, "_blocks", prefill._flash_then_columns)
    monkeypatch.setattr(columns, "sum_columns", lambda *given, real=columns.sum_columns: calls.append(real(*given)))
    monkeypatch.setattr(prefill, "_column_blocks", None)
    out, found = prefill.prompt_attention(q, k, v, 0.1, starts, needs)
    assert len(calls) == len(set(starts))
    assert torch.allclose(out, expected, atol=1e-5)
    assert found.keys() == stats.keys()
    for name, stat in stats.items():
        assert torch.allclose(found[name], stat, atol=1e-4), name
        for row, start in enumerate(starts):
            assert (found[name][row, :, :start] == 0).all()
    for row, start in enumerate(starts):
        weights, _ = dense(q[row : row + 1], k[row : row + 1], 0.1, start)
        exact = weights[0].flatten(0, 1).sum(1) if needs.heads else weights[0].mean(1).sum(1)
        assert torch.allclose(found["sum"][row].double(), exact, atol=1e-4)


@needs_triton
def test_what_kernels_do_not_serve_goes_in_blocks_and_says_why(columns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_blocks", prefill._flash_then_columns)
    q, k, v = inputs(1, 2, 40, 40, 64, torch.float32)
    needs = Needs(columns=True)
    expected = prefill.prompt_attention(q, k, v, 0.1, [0, 0], needs)

    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction\nat line 3")

    monkeypatch.setattr(columns, "sum_columns", broken)
    monkeypatch.setattr(prefill, "_refused", {})
    for _ in range(2):
        out, stats = prefill.prompt_attention(q, k, v, 0.1, [0, 0], needs)
        assert torch.allclose(out, expected[0], atol=1e-5)
        assert torch.allclose(stats["sum"], expected[1]["sum"], atol=1e-4)
    assert list(prefill._refused.values()) == ["the kernels did not compile (RuntimeError: no such instruction)"]
    reasons: set[str] = set()
    prefill._flash_then_columns(q, k, v, 0.1, torch.empty_like(expected[0]), stats, needs, reasons)
    assert reasons == set(prefill._refused.values())
    assert "more than 256" in prefill.unserved(*inputs(1, 1, 2, 2, 272, torch.float32)[:2])
    assert "float64" in prefill.unserved(q.double(), k.double())
    assert "side by side" in prefill.unserved(q.transpose(2, 3), k)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "no kernels for cpu" in prefill.unserved(q, k)


def test_the_flash_kernel_hands_out_what_its_columns_need() -> None:
    """PyTorch's own flash kernel on a CPU has the log-sum-exp of the same convention as the one for CUDA."""
    q, k, v = inputs(2, 1, 50, 50, 64, torch.float32)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, lse = flash(q, k, v, 0.0, True, scale=0.1)[:2]
    assert torch.allclose(lse.double(), dense(q, k, 0.1)[1], atol=1e-4)
