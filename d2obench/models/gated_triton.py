"""Triton kernel: the middle of a gated feed-forward layer, ``activation(gate)·up``, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2obench.compiler import launch

BLOCK = 1024
"""Elements of a program."""


@triton.jit(do_not_specialize=["width"])
def gate(given, out, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one token; grid (tokens, blocks). ``given`` is ``[tokens, 2·width]``: the gate, then what it
    multiplies. Computed in float32 and rounded once."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    x = tl.load(given + row * 2 * width + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(given + (row * 2 + 1) * width + i, mask=inside, other=0.0).to(tl.float32)
    # GELU in its tanh form, by (1 + tanh z) ÷ 2 = sigmoid(2z); SiLU is x·sigmoid(x)
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU else x
    tl.store(out + row * width + i, (x * tl.sigmoid(z) * up).to(out.dtype.element_ty), mask=inside)


def gated(given: Tensor, gelu: bool) -> Tensor:
    """``[…, 2·width]``, contiguous, to ``[…, width]``."""
    width = given.shape[-1] // 2
    out = torch.empty(*given.shape[:-1], width, dtype=given.dtype, device=given.device)
    launch(gate, (out.numel() // width, triton.cdiv(width, BLOCK)), given, out, width, GELU=gelu, BLOCK=BLOCK)
    return out
