"""Causal attention over a prompt, with the statistics of the attention map by which policies rank tokens.

The L×L map is never stored. Without statistics, the device's own flash/SDPA kernel is used. With statistics, a CPU
makes a single pass over blocks of queries that gives the output and the column sums together: a block's probabilities
stay in the core's cache, are multiplied with the values, summed over the queries and discarded. (The flash kernel with
its log-sum-exp and a second pass of ``exp(q·k − lse)`` takes 1.25 times as long there, because matrix products dominate
and there would be three instead of two.) On a GPU the flash kernel gives the output and the log-sum-exp, and a Triton
kernel sums the columns (``d2obench.attention.triton_columns``). If that kernel can't run, a second pass over blocks of
queries gives the same results, and the reason is handed to the caller. Memory is O(L) in both cases.

The sequences of a padded batch are computed one by one over their own tokens, so padding costs nothing and a batch
gives the same results as single sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from d2obench.compiler import missing
from d2obench.cpu.memory import lasting
from d2obench.decode.triton import WIDEST
from d2obench.errors import in_a_line, is_device_fault, is_out_of_memory
from d2obench.policies.base import Needs, Stats
from d2obench.ranges import span

CPU_BLOCK, GPU_BLOCK = 64, 512
WIDEST_FLASH = 256
"""Largest head dimension of PyTorch's flash kernel."""
CPU_CACHE = 2**20
"""Bytes of probabilities that a core computes at once, so that they are still in its cache when they are summed."""


def prompt_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    starts: list[int],
    needs: Needs,
    zeros: Callable[[Sequence[int], torch.dtype, torch.device], Tensor] = lasting,
    earlier: Tensor | None = None,
    bias: Tensor | None = None,
    reasons: set[str] | None = None,
) -> tuple[Tensor, Stats]:
    """Causal attention and the statistics asked for.

    Args:
        query: ``[B, Hq, Q, d]``, the last Q positions of the sequence.
        keys: ``[B, H, L, d]`` with L ≥ Q and Hq a multiple of H (GQA, unexpanded).
        values: ``[B, H, L, d_v]``.
        scale: factor of the logits.
        starts: the first real position of each sequence (left padding).
        needs: which statistics; those of padding are 0.
        zeros: where they are put.
        earlier: the queries right before these, ``[B, Hq, n, d]``, where the window begins in front of the block.
        bias: what is added to the logits of the first n keys, float32 ``[B, H, n]`` with n ≤ L − Q; None for nothing.
            Attention is then computed block by block on every device.
        reasons: gets the reason why a GPU's column sums were not computed by our kernel.

    Returns:
        The output ``[B, Q, Hq, d_v]`` and float32 statistics ``[B, H, L]`` (``[B, Hq, L]`` with ``needs.heads``).
    """
    batch, heads, length = keys.shape[:3]
    out = query.new_zeros(batch, query.shape[2], query.shape[1], values.shape[-1])
    # 1. allocate the output and the requested statistics
    rows = query.shape[1] if needs.heads else heads
    names = [*needs.sums, *(["window"] if needs.window else [])]
    stats = {name: zeros((batch, rows, length), torch.float32, keys.device) for name in names}
    groups = (
        [(slice(None), starts[0])] if len(set(starts)) == 1 else [(slice(b, b + 1), s) for b, s in enumerate(starts)]
    )
    # 2. sequences with the same start are computed together, others one by one over their own tokens
    for part, start in groups:
        if start == length:  # a sequence that has no tokens yet
            continue
        skip = max(0, start - (length - query.shape[2]))
        q, k, v = query[part, :, skip:], keys[part, :, start:], values[part, :, start:]
        seen = {name: stat[part, :, start:] for name, stat in stats.items()}
        own = None if bias is None else bias[part, :, start:]
        # 3. attention, with column sums if they are needed
        if own is not None:
            _blocks(q, k, v, scale, out[part, skip:], seen, needs, own)
        elif needs.columns or needs.squares:
            if query.device.type == "cpu":
                _blocks(q, k, v, scale, out[part, skip:], seen, needs)
            else:
                _flash_then_columns(q, k, v, scale, out[part, skip:], seen, needs, reasons)
        else:
            out[part, skip:] = _flash(q, k, v, scale).transpose(1, 2)
        if needs.window:
            # 4. sums over the last queries only
            with span("scores"):
                every = q if earlier is None else torch.cat((earlier[part], query[part]), 2)[:, :, start - length :]
                seen["window"].copy_(_window(every, k, scale, needs.window, own))
    return out, stats


def window_sums(queries: Tensor, keys: Tensor, scale: float, starts: list[int], window: int) -> Tensor:
    """The statistic "window" of prompts that were read in one block, from their last queries.

    Args:
        queries: at least the last ``window`` queries, or all of them, ``[B, Hq, n, d]``.
        keys: ``[B, H, L, d]``.
        scale: factor of the logits.
        starts: the first real position of each sequence.
        window: number of queries to sum over.
    """
    batch, heads, length = keys.shape[:3]
    found = lasting((batch, heads, length), torch.float32, keys.device)
    # sequences with the same start are computed together, as in :func:`prompt_attention`
    groups = (
        [(slice(None), starts[0])] if len(set(starts)) == 1 else [(slice(b, b + 1), s) for b, s in enumerate(starts)]
    )
    for part, start in groups:
        own = queries[part, :, -min(queries.shape[2], length - start) :]
        found[part, :, start:] = _window(own, keys[part, :, start:], scale, window, None)
    return found


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention ``[B, Hq, Q, d_v]`` by PyTorch's SDPA; the Q queries are the last positions.

    On a GPU only the flash kernels take keys of fewer heads than the queries have, and none of the fast kernels takes
    a mask as a tensor together with them: PyTorch would fall back to the whole L×L map in memory. Where flash does not
    serve, keys and values are therefore expanded, and the mask of a later block is given by its kind.
    """
    new, length, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if q.device.type != "cuda":
        if new == length:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        mask = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if not _flash_serves(q, k, v) and group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if new == length:
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    if _flash_serves(q, k, v):
        return _flash_kernel(q, k, v, scale)[0]
    by_kind: Any = causal_lower_right(new, length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=by_kind, scale=scale)


def _flash_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's flash kernel for CUDA takes these tensors."""
    half = q.dtype in (torch.float16, torch.bfloat16) and k.dtype == v.dtype == q.dtype
    width = q.shape[3]
    fits = v.shape[3] == width and width % 8 == 0 and width <= WIDEST_FLASH
    return q.device.type == "cuda" and half and fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _flash_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention ``[B, Hq, Q, d_v]`` by PyTorch's flash kernel, and the natural logarithm of each query's softmax
    denominator, ``[B, Hq, Q]``. In this operator, unlike in SDPA, causal means that the Q queries are the last
    positions (``torch.nn.attention.bias``)."""
    found, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[:2]
    return found, lse


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, stats: Stats, needs: Needs, bias: Tensor | None = None
) -> None:
    """Computes the output and the column statistics in one pass over blocks of queries. On a CPU a block has the heads
    of one KV head per core, so that its probabilities (``G·64·L`` floats) fit the core's cache; elsewhere it has all
    heads. Logits are turned into probabilities in place. ``bias`` as in :func:`prompt_attention`."""
    # 1. One row is a KV head of a sequence; its query heads are computed together.
    batch, heads, length, _ = k.shape
    new, group, rows = q.shape[2], q.shape[1] // heads, batch * heads
    on_cpu = q.device.type == "cpu"
    tall = CPU_BLOCK if on_cpu else GPU_BLOCK
    ahead = torch.full((tall, tall), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    grouped = q.view(batch, heads, group, new, -1)
    flat_k, flat_v = k.reshape(rows, length, -1).transpose(1, 2), v.reshape(rows, length, -1)
    mixed = out.view(batch, new, heads, group, -1).permute(0, 2, 3, 1, 4)
    added = None if bias is None else bias.reshape(rows, 1, -1).to(q.dtype)
    # 2. One buffer for the logits of all blocks, as large as the largest.
    cores = torch.get_num_threads() if on_cpu else rows
    most = max(group * tall * length * cores, min(cores * CPU_CACHE // 4, rows * group * tall * length))
    logits_of = q.new_empty(most)
    weights_of = logits_of if q.dtype == torch.float32 else torch.empty(most, device=q.device)
    for first in range(0, new, tall):
        last = min(new, first + tall)
        size, end = last - first, length - new + last
        block = (grouped[:, :, :, first:last] * scale).reshape(rows, group * size, -1)
        some = cores * max(1, CPU_CACHE // (group * size * end * 4))
        for low in range(0, rows, some):
            part = slice(low, min(rows, low + some))
            shape = (part.stop - low, group * size, end)
            logits, weights = (held[: math.prod(shape)].view(shape) for held in (logits_of, weights_of))
            # 3. Logits, the mask of the block's own corner, probabilities in place.
            torch.bmm(block[part], flat_k[part, :, :end], out=logits)
            if added is not None:
                logits[..., : added.shape[2]] += added[part]
            logits.view(-1, group, size, end)[..., end - size :].add_(ahead[:size, :size])
            torch.softmax(logits, -1, dtype=torch.float32, out=weights)
            # 4. The output, and the column sums while the probabilities are still in the cache.
            found = torch.bmm(weights.to(v.dtype), flat_v[part, :end]).view(-1, group, size, v.shape[-1])
            for row, one in enumerate(found, low):
                mixed[row // heads, row % heads, :, first:last] = one
            with span("scores"):
                _tally(weights.view(-1, group, size, end), part, stats, needs)


def _flash_then_columns(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, stats: Stats, needs: Needs,
    reasons: set[str] | None = None,
) -> None:  # fmt: skip
    """The output by the flash kernel, then the column sums by the Triton kernel, or block by block if it can't run."""
    if reason := attend_with_columns(q, k, v, scale, out, stats, needs):
        if reasons is not None:
            reasons.add(reason)
        out.copy_(_flash(q, k, v, scale).transpose(1, 2))
        _column_blocks(q, k, scale, stats, needs)


def _column_blocks(q: Tensor, k: Tensor, scale: float, stats: Stats, needs: Needs) -> None:
    """Computes the probabilities again, in blocks of queries, for the column sums."""
    batch, heads, length, _ = k.shape
    new, group = q.shape[2], q.shape[1] // heads
    for first in range(0, new, GPU_BLOCK):
        last = min(new, first + GPU_BLOCK)
        size, end = last - first, length - new + last
        block = (q[:, :, first:last] * scale).reshape(batch, heads, group * size, -1)
        logits = (block @ k[:, :, :end].transpose(2, 3)).float().view(batch, heads, group, size, end)
        ahead = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        logits[..., end - size :].masked_fill_(ahead, -math.inf)
        with span("scores"):
            _tally(torch.softmax(logits, -1).flatten(0, 1), slice(None), stats, needs)


def _tally(weights: Tensor, part: slice, stats: Stats, needs: Needs) -> None:
    """Adds a block ``[R, G, Q, L']`` of probabilities to the column statistics of the rows ``part`` of ``B·H``."""
    end, group = weights.shape[-1], weights.shape[1]
    if needs.heads:
        seen = stats["sum"]
        seen.view(seen.shape[0], -1, group, seen.shape[2]).flatten(0, 1)[part, :, :end] += weights.sum(2)
        return
    if "sum" in stats:
        stats["sum"].flatten(0, 1)[part, :end].add_(weights.flatten(1, 2).sum(1), alpha=1 / group)
    if needs.squares:
        stats["square"].flatten(0, 1)[part, :end].add_(weights.mean(1).square_().sum(1))


def _window(q: Tensor, k: Tensor, scale: float, window: int, bias: Tensor | None) -> Tensor:
    """Column sums over the last ``window`` queries, ``[B, H, L]``; ``bias`` as in :func:`prompt_attention`."""
    batch, heads, length, _ = k.shape
    size = min(window, q.shape[2])
    group = q.shape[1] // heads
    last = (q[:, :, -size:] * scale).reshape(batch, heads, group * size, -1)
    logits = (last @ k.transpose(2, 3)).float().view(batch, heads, group, size, length)
    if bias is not None:
        logits[..., : bias.shape[2]] += bias[:, :, None, None]
    ahead = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    logits[..., length - size :].masked_fill_(ahead, -math.inf)
    return torch.softmax(logits, -1).sum(3).mean(2)


def kept_stats(stats: Stats, index: Tensor) -> dict[str, Any]:
    """Statistics of the kept entries: each ``[B, H, L]`` gathered at ``index`` ``[B, H, C]``."""
    return {name: stat.gather(2, index) for name, stat in stats.items() if stat.shape[1] == index.shape[1]}


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_refused: dict[Hashable, str] = {}
"""Why kernels can't be used: those that did not compile, by what selects them."""


def unserved(q: Tensor, k: Tensor) -> str:
    """Why the kernels can't compute a prompt's column sums; empty if they can."""
    reason = missing(q.device)
    if reason:
        return reason
    if q.dtype not in DTYPES:
        return f"there are no kernels for {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > WIDEST:
        return f"heads have {q.shape[-1]} channels, more than {WIDEST}"
    return "" if q.stride(-1) == k.stride(-1) == 1 else "channels are not side by side in memory"


def attend_with_columns(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, stats: Stats, needs: Needs) -> str:
    """Writes the output ``[B, Q, Hq, d_v]`` and the column sums that ``needs`` asks for. Arguments as in
    :func:`d2obench.attention.prompt.prompt_attention`, without padding.

    Returns:
        Why the kernels can't be used, and then nothing is written; empty if all is done.

    Raises:
        RuntimeError: the device is out of memory, or broken.
    """
    kind = q.device, q.dtype, q.shape[1] // k.shape[1], q.shape[3], needs.squares, needs.heads
    if reason := unserved(q, k) or _refused.get(kind, ""):
        return reason
    try:
        from d2obench.attention import triton_columns as columns

        found, lse = flash_with_lse(q, k, v, scale)
        with span("scores"):
            lse = columns.log_sum_exp(q, k, scale) if lse is None else lse
            squares = stats["square"] if needs.squares and not needs.heads else None
            columns.sum_columns(q, k, scale, lse, stats["sum"], squares)
        out.copy_(found.transpose(1, 2))
        return ""
    except Exception as problem:  # a compiler may raise anything; blocks give the same results
        if is_out_of_memory(problem) or is_device_fault(problem):
            raise
        _refused[kind] = f"the kernels did not compile ({in_a_line(problem)})"
        return _refused[kind]


def flash_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Causal attention ``[B, Hq, Q, d_v]`` and, if PyTorch's flash kernel supports the sizes, the natural logarithm of
    each query's softmax denominator, ``[B, Hq, Q]``, otherwise None."""
    return _flash_kernel(q, k, v, scale) if _flash_serves(q, k, v) else (_flash(q, k, v, scale), None)
