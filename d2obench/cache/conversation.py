"""A conversation goes on: from slots back to entries that a new block of tokens attends to.

Every layer's slots are put in the order of their positions, what is empty on the left, so that they look like a left
padded prompt to ``d2obench.attention.prompt``. A merge still pending is carried out first. The new block then
attends to
these entries and, causally, to itself; its column sums are added to what the policy remembers of the entries; and all
of them are compressed together. Layer budgets are the first prompt's, scaled to the conversation's length: Eq. 5 can't
be asked again, because the columns of evicted tokens are gone. Thresholds start anew.
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
    """What a layer holds when a new block begins.

    Args:
        keys: ``[B, H, N, d]``.
        values: ``[B, H, N, d_v]``.
        position: int64 ``[B, H, N]``, ascending; negative for what is empty, on the left.
        starts: the first entry of each sequence.
        stats: float32 ``[B, H, N]`` by name.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    starts: list[int]
    stats: Stats


def reopen(state: DecodeState, batch: int) -> list[Turn]:
    """The entries of all layers, in the order of their positions; copies, so that the slots can go."""
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
    """Statistics after a block: column sums go on, a window is the block's own.

    Args:
        earlier: ``[B, H, N]`` by name.
        newer: ``[B, H, N + n]``, n tokens of the block.
    """
    out = dict(newer)
    for name in ("sum", "square"):
        if name in earlier and name in newer:
            tokens = newer[name].shape[2] - earlier[name].shape[2]
            out[name] = newer[name] + torch.nn.functional.pad(earlier[name], (0, tokens))
    return out


def rescale(first: Tensor, before: list[int], now: list[int], budget: Budget) -> Tensor:
    """Layer budgets ``[layers, B]`` of the whole conversation from the first prompt's.

    The sum over layers grows as the budget of a sequence does. A layer that was given the whole first prompt keeps
    the whole conversation.
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
