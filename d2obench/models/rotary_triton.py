"""Triton kernel: rotary positions of the queries and keys of a token, all heads in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2obench.compiler import launch


@triton.jit
def _rotate_heads(
    held, out, heads, cos_low, cos_high, sin_low, sin_high, row, place, held_b, held_h, held_n, out_b, out_h, out_n,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Rotates the heads of one token, ``heads`` of the H that a block has."""
    h, i = tl.arange(0, H)[:, None], tl.arange(0, DP)[None, :]
    inside = (h < heads) & (i < D // 2)
    source = held + row * held_b + place * held_n + h * held_h + i
    to = out + row * out_b + place * out_n + h * out_h + i
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, (low * cos_low - high * sin_low).to(out.dtype.element_ty), mask=inside)
    tl.store(to + D // 2, (high * cos_high + low * sin_high).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "lines", "query_heads", "key_heads"])
def rotate(
    query, key, cos, sin, out_query, out_key, length, lines, query_heads, key_heads,
    query_b, query_h, query_n, key_b, key_h, key_n, out_query_b, out_query_h, out_query_n, out_key_b, out_key_h,
    out_key_n, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """``x·cos + (−x₂, x₁)·sin``; grid (tokens). ``cos`` and ``sin`` are ``[lines, D]``: token t uses line t mod
    lines."""
    token = tl.program_id(0)
    row, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    i = tl.arange(0, DP)
    line, half = (token % lines) * D + i, i < D // 2
    cos_low = tl.load(cos + line, mask=half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + line + D // 2, mask=half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + line, mask=half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + line + D // 2, mask=half, other=0.0).to(tl.float32)[None, :]
    _rotate_heads(
        query, out_query, query_heads, cos_low, cos_high, sin_low, sin_high, row, place, query_b, query_h, query_n,
        out_query_b, out_query_h, out_query_n, HQ, D, DP,
    )  # fmt: skip
    _rotate_heads(
        key, out_key, key_heads, cos_low, cos_high, sin_low, sin_high, row, place, key_b, key_h, key_n, out_key_b,
        out_key_h, out_key_n, HK, D, DP,
    )  # fmt: skip


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, H, L, d]`` rotated by angles ``[B or 1, L, d]``; laid out as those given are."""
    out, out_key = torch.empty_like(q), torch.empty_like(k)
    batch, heads, length, width = q.shape
    power = triton.next_power_of_2
    launch(
        rotate, (batch * length,), q, k, cos, sin, out, out_key, length, cos.numel() // width, heads, k.shape[1],
        *q.stride()[:3], *k.stride()[:3], *out.stride()[:3], *out_key.stride()[:3],
        HQ=power(heads), HK=power(k.shape[1]), D=width, DP=power(width // 2),
    )  # fmt: skip
    return out, out_key
