"""Rotary positions of queries and keys by one kernel instead of fourteen operators.

In a decode step these are a few vectors of the hidden size, and every operator costs its launch: of a step of
Llama-3-8B at batch 32 on a GPU they are a third of all launches. Attention modules of transformers call a function of
their module's globals, ``apply_rotary_pos_emb``. A module is given the same code with that one name bound to ours
(:func:`rebind`): no code of a model is copied, and nothing of the library is changed for others.

The results are those of the library's function, in one rounding instead of four for types of 16 bits. What the kernels
don't serve goes to that function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from d2obench import cpu
from d2obench.compiler import missing

NAME = "apply_rotary_pos_emb"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt_neox", "falcon")
"""Model packages of transformers whose function of that name is the one below."""
SHARE = 16
"""Tokens of one item of the loop on a CPU."""
Pair = tuple[Tensor, Tensor]
_refused: dict[torch.device, str] = {}


def fallback(device: torch.device) -> str:
    """Why rotary positions go by the library's operators on a GPU, in words; empty where they don't."""
    return _refused.get(device, "")


def adapt(model: Any) -> None:
    """Lets the attention modules of a model use the kernels, where there are any for its device."""
    on_cpu = model.device.type == "cpu"
    if not (cpu.suits(model.dtype, model.device) if on_cpu else not missing(model.device)):
        return
    for module in model.modules():
        family = type(module).__module__.split(".")[-2:-1]
        # an instance's own forward is somebody's wrapper, of several devices perhaps
        if family and family[0] in FAMILIES and "forward" not in vars(module):
            rebind(module)


def rebind(module: Any) -> None:
    """Gives a module whose code calls the library's function the same code, with ours under that name."""
    code = inspect.unwrap(type(module).forward)
    if NAME not in code.__code__.co_names or code.__closure__:
        return
    scope = {**code.__globals__, NAME: turning(code.__globals__[NAME])}
    forward = FunctionType(code.__code__, scope, code.__name__, code.__defaults__)
    forward.__kwdefaults__ = code.__kwdefaults__
    module.forward = MethodType(forward, module)


@functools.cache
def turning(library: Callable[..., Pair]) -> Callable[..., Pair]:
    """The function that serves in the library's place, and asks it where no kernel serves."""

    @functools.wraps(library)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Pair:
        if not args and not kwargs and _fits(q, k, cos, sin):
            if q.device.type == "cuda":
                if (turned := _on_gpu(q, k, cos, sin)) is not None:
                    return turned
            elif (given := _by_token(q, k)) is not None:
                return _on_cpu(*given, cos, sin)
        return library(q, k, cos, sin, *args, **kwargs)

    return apply


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are queries and keys ``[B, H, L, d]`` with angles ``[B or 1, L, d]`` for all channels."""
    width, tokens = q.shape[-1], q.shape[0] * q.shape[2]
    lines = cos.numel() // width
    same = q.dtype == k.dtype == cos.dtype == sin.dtype and q.stride(-1) == k.stride(-1) == 1
    whole = cos.shape[-1] == width and width % 2 == 0 and lines in (tokens, q.shape[2])
    return q.dim() == 4 and same and whole and cos.is_contiguous() and sin.is_contiguous() and tokens > 0


def _by_token(q: Tensor, k: Tensor) -> Pair | None:
    """Both as ``[B, L, H, d]``, if that is how they lie in memory and loops serve them."""
    queries, keys = q.transpose(1, 2), k.transpose(1, 2)
    whole = queries.is_contiguous() and keys.is_contiguous() and cpu.suits(q.dtype, q.device)
    return (queries, keys) if whole else None


def _on_cpu(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    batch, length, heads, width = queries.shape
    out, out_keys = torch.empty_like(queries), torch.empty_like(keys)
    tokens = batch * length
    loops = _loops()
    arguments = loops.RotateArguments(
        items=-(-tokens // SHARE), queries=queries.data_ptr(), keys=keys.data_ptr(), cos=cos.data_ptr(),
        sin=sin.data_ptr(), out_queries=out.data_ptr(), out_keys=out_keys.data_ptr(), tokens=tokens, query_heads=heads,
        key_heads=keys.shape[2], width=width, lines=cos.numel() // width, share=SHARE,
    )  # fmt: skip
    cpu.launch(loops.rotate, arguments)
    return out.transpose(1, 2), out_keys.transpose(1, 2)


@functools.cache
def _loops() -> Any:
    """The compiled loops; the first call imports numba."""
    from d2obench.cpu import products

    return products


def _on_gpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair | None:
    """By the Triton kernel; None where it can't be compiled, which is asked once a device."""
    if q.device in _refused:
        return None
    try:
        from d2obench.models.rotary_triton import rotated

        with torch.cuda.device(q.device):
            return rotated(q, k, cos, sin)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as problem:  # whatever a compiler may throw: the library's function is there
        first = str(problem).strip().partition("\n")[0][:120]
        _refused[q.device] = f"the kernel did not compile ({type(problem).__name__}: {first})"
        return None
