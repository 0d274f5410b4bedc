"""Triton kernels: column sums of a prompt's causal attention map in O(L) memory.

Design. A flash kernel gives the output and, for each query, the logarithm of its softmax's denominator (LSE). With the
LSE any probability can be computed independently, ``exp(scale·q·k − LSE)``, in any order. So :func:`_sum_columns` is
*key-stationary*: a program holds a block of one KV head's keys, iterates over the queries that attend to them, for all
query heads of the group, and sums the attention that each key receives. Programs share nothing: there are no atomics,
and the order of additions is fixed. Only the blocks on the diagonal are masked. If no kernel gives the LSE (float32, or
a block of queries after an earlier one), :func:`_sum_rows` computes it in one more pass over the keys.

Sums are float32. Lengths are not specialised, so that one compilation works for all of them; strides are, to allow wide
loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2obench.compiler import interpreted, launch
from d2obench.decode.triton.attend import product

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
SIZES = ["rows", "share", "new", "length"]


@triton.jit
def _block(held, at, step, last, D: tl.constexpr, DP: tl.constexpr):
    """Rows ``at`` of queries or keys, ``[BLOCK, DP]``; zeros from ``last`` on."""
    d = tl.arange(0, DP)
    inside = (at < last)[:, None] & (d < D)[None, :]
    return tl.load(held + at[:, None].to(tl.int64) * step + d[None, :], mask=inside, other=0.0)


@triton.jit
def _given(
    query, lse, k, g, i, new, query_h, query_n, scale, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The attention of one query head to a block of keys, ``[BK, BQ]``; 0 for queries from ``new`` on."""
    q = _block(query + g * query_h, i, query_n, new, D, DP)
    norm = tl.load(lse + g * new + i, mask=i < new, other=float("inf"))
    return tl.exp2(product(k, tl.trans(q), WIDE) * (scale * LOG2E) - (norm * LOG2E)[None, :])


@triton.jit
def _walk(
    query, lse, k, summed, squared, first, last, new, offset, j, query_h, query_n, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    MASKED: tl.constexpr, SQUARES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds the attention that a block of keys receives from queries ``first`` to ``last``, and optionally its
    square."""
    if SQUARES:  # squares are of the mean over the group, so all query heads of a block come before the next block
        for start in range(first, last, BQ):
            i = start + tl.arange(0, BQ)
            given = tl.zeros((BK, BQ), tl.float32)
            for g in range(G):
                given += _given(query, lse, k, g, i, new, query_h, query_n, scale, D, DP, WIDE)
            if MASKED:
                given = tl.where(j[:, None] <= (i + offset)[None, :], given, 0.0)
            summed += given
            squared += given * given
    else:  # a single loop, so that its loads are pipelined
        for step in range(first // BQ * G, tl.cdiv(last, BQ) * G):
            i = step // G * BQ + tl.arange(0, BQ)
            given = _given(query, lse, k, step % G, i, new, query_h, query_n, scale, D, DP, WIDE)
            if MASKED:
                given = tl.where(j[:, None] <= (i + offset)[None, :], given, 0.0)
            summed += given
    return summed, squared


@triton.jit(do_not_specialize=SIZES)
def _sum_columns(
    query, keys, lse, out, out_square, scale,
    rows, share, new, length, query_b, query_h, query_n, key_b, key_h, key_n, out_b, out_r,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SQUARES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Column sums for one block of keys and one row; there are ``rows`` rows per sequence, ``share`` rows per KV
    head."""
    # 1. the block's keys
    batch, row = (tl.program_id(1) // rows).to(tl.int64), (tl.program_id(1) % rows).to(tl.int64)
    start = tl.program_id(0) * BK
    offset = length - new
    j = start + tl.arange(0, BK)
    k = _block(keys + batch * key_b + (row // share) * key_h, j, key_n, length, D, DP)
    query += batch * query_b + row * G * query_h
    lse += (batch * rows + row) * G * new
    # 2. queries on the diagonal need the causal mask; all later ones see the whole block
    first = tl.maximum(start - offset, 0) // BQ * BQ
    edge = tl.minimum(tl.cdiv(tl.maximum(start + BK - 1 - offset, 0), BQ) * BQ, tl.cdiv(new, BQ) * BQ)
    summed = tl.zeros((BK, BQ), tl.float32)
    squared = tl.zeros((BK, BQ), tl.float32)
    summed, squared = _walk(
        query, lse, k, summed, squared, first, edge, new, offset, j, query_h, query_n, scale,
        G, D, DP, BQ, BK, True, SQUARES, WIDE,
    )  # fmt: skip
    summed, squared = _walk(
        query, lse, k, summed, squared, edge, new, new, offset, j, query_h, query_n, scale,
        G, D, DP, BQ, BK, False, SQUARES, WIDE,
    )  # fmt: skip
    # 3. the mean over the group, summed over queries
    at = batch * out_b + row * out_r + j
    tl.store(out + at, tl.sum(summed, 1) / G, mask=j < length)
    if SQUARES:
        tl.store(out_square + at, tl.sum(squared, 1) / (G * G), mask=j < length)


@triton.jit(do_not_specialize=SIZES)
def _sum_rows(
    query, keys, lse, scale, rows, share, new, length, query_b, query_h, query_n, key_b, key_h, key_n,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """LSE of one block of queries of one query head; there are ``rows`` query heads per sequence, ``share`` per KV
    head."""
    batch, row = (tl.program_id(1) // rows).to(tl.int64), (tl.program_id(1) % rows).to(tl.int64)
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)
    offset = length - new
    q = _block(query + batch * query_b + row * query_h, i, query_n, new, D, DP)
    keys += batch * key_b + (row // share) * key_h
    top = tl.full((BQ,), -float("inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for start in range(0, tl.minimum(tl.program_id(0) * BQ + BQ + offset, length), BK):
        j = start + tl.arange(0, BK)
        k = _block(keys, j, key_n, length, D, DP)
        logits = product(q, tl.trans(k), WIDE) * (scale * LOG2E)
        logits = tl.where(j[None, :] <= (i + offset)[:, None], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        top = higher
    tl.store(lse + (batch * rows + row) * new + i, (top + tl.log2(total)) / LOG2E, mask=i < new)


def log_sum_exp(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Natural logarithm of every query's softmax denominator, float32 ``[B, Hq, Q]``; arguments as in
    :func:`sum_columns`."""
    batch, heads, new, _ = query.shape
    out = torch.empty(batch, heads, new, device=query.device)
    sizes = _sizes(query, keys, heads)
    blocks = _blocks(query)
    launch(_sum_rows, (triton.cdiv(new, blocks["BQ"]), batch * heads), query, keys, out, scale, *sizes, **blocks)
    return out


def sum_columns(
    query: Tensor, keys: Tensor, scale: float, lse: Tensor, out: Tensor, out_square: Tensor | None = None
) -> None:
    """Writes, for each key, the attention it receives from all queries.

    Args:
        query: ``[B, Hq, Q, d]``, the last Q positions; the last dimension is contiguous.
        keys: ``[B, H, L, d]``, L ≥ Q, likewise.
        scale: factor of the logits.
        lse: natural logarithm of the softmax denominators, float32 ``[B, Hq, Q]``.
        out: float32 ``[B, R, L]``, contiguous in the last dimension; R = H for means over a KV head's query heads, or R
            = Hq.
        out_square: like ``out``, for the sums of the squares of these means.
    """
    rows, group = out.shape[1], query.shape[1] // out.shape[1]
    blocks = _blocks(query)
    if out_square is not None:  # two sums a thread
        blocks["num_warps"] = 8
    square = out if out_square is None else out_square
    launch(
        _sum_columns, (triton.cdiv(keys.shape[2], blocks["BK"]), out.shape[0] * rows), query, keys, lse.contiguous(),
        out, square, scale, *_sizes(query, keys, rows), out.stride(0), out.stride(1),
        G=group, SQUARES=out_square is not None, **blocks,
    )  # fmt: skip


def _sizes(query: Tensor, keys: Tensor, rows: int) -> tuple[int, ...]:
    strides = (*query.stride()[:3], *keys.stride()[:3])
    return rows, rows // keys.shape[1], query.shape[2], keys.shape[2], *strides


def _blocks(query: Tensor) -> dict[str, int | bool]:
    """Block sizes, stages and warps for which keys and queries fit registers and shared memory of every generation
    since Ampere."""
    width = query.shape[3]
    padded = max(16, triton.next_power_of_2(width))
    wide = query.dtype == torch.float32
    side = 32 if wide or padded > 128 else 64
    return {
        "D": width,
        "DP": padded,
        "BQ": side,
        "BK": side,
        "WIDE": wide or interpreted(),
        "num_stages": 2 if wide else 3,
        "num_warps": 8 if wide else 4,  # float32 products are made in registers
    }
