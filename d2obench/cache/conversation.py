"""A further turn of a conversation: slots become entries again, to which a new block of tokens attends.

Every layer's slots are sorted by position, with empty ones on the left, so that ``d2obench.attention.prompt`` can treat
them like a left-padded prompt. A pending merge is completed first. The new block then attends to these entries and,
causally, to itself; its column sums are added to the statistics that the policy still has of the entries; and all
entries are compressed together. Layer budgets are those of the first prompt, scaled to the conversation's length: Eq. 5
can't be computed again, because the columns of evicted tokens are gone. Thresholds start anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2obench.decode.state import DecodeState
from d2obench.policies.base import Stats


@dataclass
class Turn:
    """The entries of one layer when a new block begins.

    Args:
        keys: ``[B, H, N, d]``.
        values: ``[B, H, N, d_v]``.
        position: int64 ``[B, H, N]``, ascending; negative for empty entries, which are on the left.
        starts: index of the first real entry of each sequence, whichever KV head has it.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    starts: list[int]
    stats: Stats


def reopen(state: DecodeState, batch: int) -> list[Turn]:
    """The entries of all layers, sorted by position. They are copies, so that the slots can be freed afterwards."""
    if state.merge is not None:
        state.merge.commit_now()
    everywhere = state.where()
    stats = {} if state.grows else dict(state.policy.recall(state))
    if state.biased and state.bias is not None:
        stats["bias"] = state.bias
    turns = []
    for layer, capacity in enumerate(state.store.capacities):
        position = everywhere[layer, :, :capacity]
        held = (position >= 0).sum(-1)
        count = int(held.max())
        order = position.argsort(dim=-1, stable=True)[:, capacity - count :]
        position = position.gather(1, order).clamp_min(-1).long()
        empty = position < 0
        keys, values = (
            rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1])).view(batch, -1, count, rows.shape[-1])
            for rows in (state.store.keys(layer), state.store.values(layer))
        )
        known = {
            name: stat[layer].gather(1, order).masked_fill(empty, 0.0).view(batch, -1, count)
            for name, stat in stats.items()
        }
        starts = (count - held.view(batch, -1).amax(1)).tolist()
        turns.append(Turn(keys, values, position.view(batch, -1, count), starts, known))
    return turns


def add(earlier: Stats, newer: Stats, total: int) -> Stats:
    """Statistics after a new block: column sums are added up; "window" is that of the new block alone; "bias" stays,
    and is 0 for the new block.

    Args:
        earlier: ``[B, H, N]`` by name.
        newer: ``[B, H, total]`` by name, with the tokens of the block.
        total: number of entries after the block.
    """
    out = dict(newer)
    for name in ("sum", "square"):
        if name in earlier and name in newer:
            tokens = newer[name].shape[2] - earlier[name].shape[2]
            out[name] = newer[name] + torch.nn.functional.pad(earlier[name], (0, tokens))
    if "bias" in earlier:
        out["bias"] = torch.nn.functional.pad(earlier["bias"], (0, total - earlier["bias"].shape[2]))
    return out
