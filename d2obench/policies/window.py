"""Attention of the prompt's last queries, for policies that need more of it than its sums."""

from __future__ import annotations

import torch
from torch import Tensor

from d2obench.policies.base import Entries


def window_attention(entries: Entries, count: int) -> tuple[Tensor, Tensor]:
    """Attention of the last ``count`` queries over all entries.

    Args:
        entries: with :attr:`Entries.queries`.
        count: number of queries.

    Returns:
        The attention, float32 ``[B, H, G, n, N]``, 0 for a query that is padding; and which queries are tokens, bool
        ``[B, n]``. n is at most ``count``.
    """
    assert entries.queries is not None
    heads, queries = entries.keys.shape[1], entries.queries[:, :, -count:].float()
    batch, _, new, width = queries.shape
    grouped = queries.view(batch, heads, -1, new, width)
    asked = entries.length[:, None] - new + torch.arange(new, device=queries.device)
    position = entries.position[:, :, None]
    hidden = (position < 0) | (position > asked[:, None, :, None])
    logits = (grouped * entries.scale) @ entries.keys.float().transpose(2, 3)[:, :, None]
    if "bias" in entries.stats:
        logits += entries.stats["bias"][:, :, None, None]
    weights = torch.softmax(logits.masked_fill_(hidden[:, :, None], -torch.inf), -1)
    return weights.nan_to_num_(0.0), asked >= 0
