"""The bridge into transformers: an attention function and a mask function under a name of ours.

Models whose attention goes through transformers' attention interface need nothing else. Falcon's class calls
``scaled_dot_product_attention`` itself: its keys are handed out as :class:`BridgedKeys`, a tensor type that answers
that one call (``__torch_function__``) with the same attention, so no model code is copied or patched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from d2obench.errors import PolicyError

IMPLEMENTATION = "d2obench"


def policy_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # in this place by some callers, as in transformers' own SDPA
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface: the layer that rides on ``key`` attends; without one (a sliding layer)
    this is transformers' own SDPA."""
    layer = getattr(key, "slot_layer", None)
    if layer is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    return layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask), None


def policy_mask(*args: Any, mask_function: Any = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """The padding mask ``[B, L]`` itself for compressed layers; a sliding layer's own 4D mask otherwise."""
    if mask_function is causal_mask_function:
        mask: Tensor | None = kwargs.get("attention_mask")
        return mask
    sliding: Tensor | None = sdpa_mask(*args, mask_function=mask_function, **kwargs)
    return sliding


class BridgedKeys(Tensor):
    """Keys that answer ``scaled_dot_product_attention`` with their layer's attention."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, keys = args[0], args[1]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            return keys.slot_layer.attend(query, scale, kwargs.get("attn_mask")).transpose(1, 2)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def real_tokens(mask: Tensor, total: int) -> Tensor:
    """Tokens that are not padding, ``[B]``, from a 2D mask ``[B, total]`` or the last row of a 4D one; padding must
    stand on the left."""
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask == 0
    real = mask[:, -total:].bool()
    counts = real.sum(1)
    if not bool((real == (torch.arange(total, device=mask.device) >= (total - counts)[:, None])).all()):
        raise PolicyError("the batch is padded on the right or inside", remedy="pad on the left")
    return counts


AttentionInterface.register(IMPLEMENTATION, policy_attention)
AttentionMaskInterface.register(IMPLEMENTATION, policy_mask)
