"""A prompt's attention with column sums on a GPU: PyTorch's flash kernel and ours (``columns``), where both serve.

What they don't serve goes the way of ``d2obench.attention.prompt``, in blocks of queries, with the same results; the
reason is kept for the record (:func:`fallback`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from d2obench.compiler import missing
from d2obench.decode.triton import WIDEST
from d2obench.policies.base import Needs, Stats
from d2obench.ranges import span

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_refused: dict[torch.device, str] = {}


def fallback(device: torch.device) -> str:
    """Why a prompt's columns were not made by kernels on a GPU, in words; empty where they were, or nothing was
    asked for."""
    return _refused.get(device, "") if device.type == "cuda" else ""


def unserved(q: Tensor, k: Tensor) -> str:
    """Why the kernels don't serve a prompt; empty where they do."""
    reason = missing(q.device)
    if reason:
        return reason
    if q.dtype not in DTYPES:
        return f"there are no kernels for {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > WIDEST:
        return f"heads have {q.shape[-1]} channels, more than {WIDEST}"
    return "" if q.stride(-1) == k.stride(-1) == 1 else "channels are not side by side in memory"


def attend_with_columns(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, stats: Stats, needs: Needs) -> bool:
    """Writes the output ``[B, Q, Hq, d_v]`` and the columns that ``needs`` asks for; False, and nothing written, where
    kernels don't serve. Arguments as in :func:`d2obench.attention.prompt.prompt_attention`, without padding."""
    if q.device in _refused:
        return False
    reason = unserved(q, k)
    if not reason:
        try:
            from d2obench.attention import triton_columns as columns

            found, lse = flash_with_lse(q, k, v, scale)
            with span("scores"):
                lse = columns.log_sum_exp(q, k, scale) if lse is None else lse
                squares = stats["square"] if needs.squares and not needs.heads else None
                columns.sum_columns(q, k, scale, lse, stats["sum"], squares)
            out.copy_(found.transpose(1, 2))
            return True
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a compiler may throw: blocks give the same
            first = str(problem).strip().partition("\n")[0][:120]
            reason = f"the kernels did not compile ({type(problem).__name__}: {first})"
    _refused[q.device] = f"column sums of the prompt without a kernel: {reason}"
    return False


def flash_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Causal attention ``[B, Hq, Q, d_v]`` and, where PyTorch's flash kernel serves the sizes, the natural logarithm of
    each query's softmax denominator, ``[B, Hq, Q]``."""
    new, length, width = q.shape[2], k.shape[2], q.shape[3]
    if new != length:
        mask = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True), None
    half = q.dtype in (torch.float16, torch.bfloat16) and k.dtype == v.dtype == q.dtype
    if q.device.type == "cuda" and half and v.shape[3] == width and width % 8 == 0:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        found, lse = flash(q, k, v, 0.0, True, scale=scale)[:2]
        return found, lse
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True), None
