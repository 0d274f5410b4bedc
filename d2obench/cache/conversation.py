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
from d2obench.policies.allocation import water_fill
from d2obench.policies.base import Stats
from d2obench.suite.grammar import Budget


@dataclass
class Turn:
    """The entries of one layer when a new block begins.

    Args:
        keys: ``[B, H, N, d]``.
        values: ``[B, H, N, d_v]``.
        position: int64 ``[B, H, N]``, ascending; negative for empty entries, which are on the left.
        starts: index of the first real entry of each sequence.
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
    stats = {} if state.grows else state.policy.recall(state)
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
        starts = (count - held.view(batch, -1)[:, 0]).tolist()
        turns.append(Turn(keys, values, position.view(batch, -1, count), starts, known))
    return turns


def add(earlier: Stats, newer: Stats) -> Stats:
    """Statistics after a new block: column sums are added up; "window" is that of the new block alone.

    Args:
        earlier: ``[B, H, N]`` by name.
        newer: ``[B, H, N + n]`` by name, with n tokens of the block.
    """
    out = dict(newer)
    for name in ("sum", "square"):
        if name in earlier and name in newer:
            tokens = newer[name].shape[2] - earlier[name].shape[2]
            out[name] = newer[name] + torch.nn.functional.pad(earlier[name], (0, tokens))
    return out


def rescale(first: Tensor, before: list[int], now: list[int], budget: Budget) -> Tensor:
    """Layer budgets ``[layers, B]`` for the whole conversation, computed from those of the first prompt.

    The sum over layers grows in proportion to a sequence's budget. A layer that kept the whole first prompt keeps the
    whole conversation.
    """
    columns = []
    for budgets, old, new in zip(first.T.tolist(), before, now, strict=True):
        bounded = [count for count in budgets if count >= 0 and (count < old or count <= budget.of(old))]
        if budget.tokens is not None or not bounded:
            columns.append(budgets)
            continue
        total = round(sum(bounded) * budget.of(new) / budget.of(old))
        parts = iter(water_fill([count / sum(bounded) for count in bounded], total, 1, new))
        columns.append(
            [
                count if count < 0 else next(parts) if count < old or count <= budget.of(old) else new
                for count in budgets
            ]
        )
    return torch.tensor(columns).T
