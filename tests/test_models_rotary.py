"""Rotary positions by our kernels against the library's own function, on every family that has one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import CONFIGS, prompts, tiny_model
from torch import Tensor

from d2obench import cpu
from d2obench.models import kernels
from d2obench.models.kernels import ROTARY_FAMILIES, with_rotary_kernel

lent = pytest.mark.skipif(not cpu.available(), reason="compiled loops cannot run here")


def library(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb


def given(batch: int, length: int, width: int, alike: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of 6 heads and keys of 2 as models leave them, and angles of each sequence or of all."""
    torch.manual_seed(length)
    query, key = (torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2) for heads in (6, 2))
    angle = torch.randn(1 if alike else batch, length, width // 2).repeat(1, 1, 2)
    return [query, key, angle.cos().to(dtype), angle.sin().to(dtype)]


def float64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, half = x.double(), x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.double()[:, None] + turned * sin.double()[:, None]


CASES = [(1, 1, 16, True), (8, 1, 64, False), (3, 37, 80, True), (2, 5, 128, False)]


@lent
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_it_is_the_librarys_function(family: str, case: Any) -> None:
    q, k, cos, sin = given(*case)
    ours = with_rotary_kernel(library(family))(q, k, cos, sin)
    for got, want, x in zip(ours, library(family)(q, k, cos, sin), (q, k), strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got.double(), float64(x, cos, sin), rtol=1e-5, atol=1e-6)


@lent
@pytest.mark.parametrize("length", [1, 9])
def test_what_loops_do_not_serve_is_the_librarys(length: int) -> None:
    asked: list[Any] = []

    def function(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return library("llama")(*args, **kwargs)

    apply = with_rotary_kernel(function)
    q, k, cos, sin = given(2, length, 32, False)
    assert apply(q, k, cos, sin) and not asked
    apply(q, k, cos, sin, unsqueeze_dim=1)
    apply(q, k.repeat_interleave(2, -1)[..., ::2], cos, sin)
    apply(*given(2, length, 32, False, torch.bfloat16))
    if length > 1:
        apply(q.contiguous(), k.contiguous(), cos, sin)
    assert len(asked) == (4 if length > 1 else 3)


@lent
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_is_what_it_was(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models are adapted; the same weights in a class that is not."""
    model = tiny_model(family).model
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    tokens = torch.tensor(prompts(20, 20))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, plain.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    turned = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert turned
    scopes = [module.forward.__globals__ for module in turned if "forward" in vars(module)]
    assert all(
        scope[kernels.ROTARY_FUNCTION] is with_rotary_kernel(library(type(turned[0]).__module__.split(".")[-2]))
        for scope in scopes
    )
    assert scopes, "no attention module took it"
    assert library(type(turned[0]).__module__.split(".")[-2]).__module__.startswith("transformers")


def test_a_wrapped_forward_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-mha").model
    module = model.model.layers[0].self_attn
    mine = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setitem(vars(module), "forward", mine)
    kernels.adapt_rotary(model)
    assert module.forward is mine


def test_a_kernel_that_fails_is_said_and_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def broken(*given: Any) -> Any:
        asked.append(given)
        raise RuntimeError("no ptxas\nmore words")

    tensors = given(1, 1, 16, True)
    monkeypatch.setattr(kernels, "_refused", {})
    monkeypatch.setitem(sys.modules, "d2obench.models.rotary_triton", SimpleNamespace(rotated=broken))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert kernels._rotate_on_gpu(*tensors) is kernels._rotate_on_gpu(*tensors) is None
    assert len(asked) == 1
    assert kernels.rotary_fallback(tensors[0].device) == "the kernel did not compile (RuntimeError: no ptxas)"


@pytest.fixture
def kernel() -> Iterator[Any]:
    """The Triton kernel in its interpreter."""
    name = "d2obench.models.rotary_triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module(name).rotated
    sys.modules.pop(name)


@pytest.mark.needs("triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernel runs on the GPU: pytest -m cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_for_gpus_is_it_too(kernel: Any, case: Any, dtype: torch.dtype) -> None:
    q, k, cos, sin = given(*case, dtype)
    for got, x in zip(kernel(q, k, cos, sin), (q, k), strict=True):
        expected = float64(x, cos, sin)
        assert got.dtype == dtype and got.stride() == x.stride()
        torch.testing.assert_close(got.double(), expected, rtol=2e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: Any) -> None:
    tensors = [tensor.cuda() for tensor in given(*case, torch.bfloat16)]
    ours = with_rotary_kernel(library("llama"))(*tensors)
    assert not kernels._refused
    for got, x in zip(ours, tensors, strict=False):
        torch.testing.assert_close(got.double(), float64(x, *tensors[2:]), rtol=8e-3, atol=1e-5)


@lent
def test_angles_of_some_channels_only_are_the_librarys() -> None:
    """GPT-NeoX turns a part of each head."""
    q, k, cos, sin = given(2, 3, 32, False)
    part = cos[..., :16].contiguous(), sin[..., :16].contiguous()
    for got, want in zip(
        with_rotary_kernel(library("gpt_neox"))(q, k, *part), library("gpt_neox")(q, k, *part), strict=True
    ):
        assert torch.equal(got, want)
