"""Layer budgets: what compression to equal budgets would cost each head, and the budgets of later turns.

The cost is measured (for policies that ask for it, ``Needs.errors``). When the prompt has been read, every layer is
compressed once on trial, to the budget that it would get if all layers got the same: selection, merging and biases as
the policy does them. The prompt's last LAST queries then attend to what was kept. Their outputs ô are compared with the
outputs o over the full prompt where these enter the model, after the projection W_O: KV head h is charged with the mean
of ``‖(ô − o)_h W_O^h‖²`` over the queries, where (·)_h are the channels of its query heads. The policy makes budgets of
that. A trial changes nothing; it costs about as much as the compression itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2obench.cache.compress import compress
from d2obench.policies.allocation import water_fill
from d2obench.policies.base import Entries, Policy
from d2obench.suite.grammar import Budget

LAST = 64
"""Number of the prompt's last queries whose outputs are compared."""


@dataclass(frozen=True)
class LastQueries:
    """The prompt's last queries of a layer and their outputs.

    Args:
        queries: ``[B, Hq, n, d]``.
        outputs: ``[B, n, Hq, d_v]``.
        scale: factor of the logits.
    """

    queries: Tensor
    outputs: Tensor
    scale: float

    def and_then(self, queries: Tensor, outputs: Tensor) -> LastQueries:
        """The last ones after another block."""
        queries = torch.cat((self.queries, queries[:, :, -LAST:]), 2)[:, :, -LAST:]
        outputs = torch.cat((self.outputs, outputs[:, -LAST:]), 1)[:, -LAST:]
        return LastQueries(queries, outputs, self.scale)

    def select(self, sequences: Tensor) -> LastQueries:
        """Those of other sequences."""
        return LastQueries(self.queries[sequences], self.outputs[sequences], self.scale)


def output_error(
    policy: Policy, entries: Entries, keep: Tensor, last: LastQueries, projection: Tensor | None
) -> Tensor:
    """The error that compression to ``keep`` entries causes for each KV head, float32 ``[B, H]``.

    Args:
        policy: what selects and merges.
        entries: the layer's entries; they stay as they are.
        keep: int64 ``[B]``.
        last: the queries to measure with.
        projection: W_O, ``[hidden, Hq·d_v]``; None to compare the outputs themselves.
    """
    heads, total = entries.position.shape[1:]
    count = last.queries.shape[2]
    # 1. compress on trial
    stats = dict(entries.stats)
    kept, _, _ = compress(policy, replace(entries, stats=stats), keep)
    at = kept.index.clamp_max(total - 1)
    # 2. attention of the last queries over what was kept, if it is not after them
    asked = entries.length[:, None] - count + torch.arange(count, device=entries.length.device)
    position = entries.position.gather(2, at)
    hidden = (position[:, :, None] > asked[:, None, :, None]) | ~kept.filled[:, :, None]
    queries = _by_head(last.queries, heads) * last.scale
    logits = queries @ kept.keys.float().transpose(2, 3)[:, :, None]
    if "bias" in stats:
        logits += stats["bias"].gather(2, at)[:, :, None, None]
    weights = torch.softmax(logits.masked_fill(hidden[:, :, None], -torch.inf), -1).nan_to_num(0.0)
    found = weights @ kept.values.float()[:, :, None]
    # 3. the difference, per KV head, after the projection
    difference = found - _by_head(last.outputs.transpose(1, 2), heads)
    joined = difference.transpose(2, 3).flatten(3)
    if projection is not None:
        joined = joined @ projection.float().view(projection.shape[0], heads, -1).permute(1, 2, 0)
    squared: Tensor = joined.square().sum(-1)
    # 4. the mean over the queries that are tokens
    real = (asked >= 0)[:, None]
    return (squared * real).sum(-1) / real.sum(-1).clamp_min(1)


def _by_head(held: Tensor, heads: int) -> Tensor:
    """``[B, Hq, n, d]`` as float32 ``[B, H, G, n, d]``."""
    batch, queries, count, width = held.shape
    return held.float().reshape(batch, heads, queries // heads, count, width)


def rescale(first: Tensor, before: list[int], now: list[int], budget: Budget) -> Tensor:
    """Budgets ``[layers, B]`` or ``[layers, B, H]`` for a whole conversation, computed from those of the first prompt.

    Their sum grows in proportion to a sequence's budget. A layer or KV head that kept the whole first prompt keeps the
    whole conversation.
    """
    if first.dim() == 3:  # heads are treated as layers
        layers, _, heads = first.shape
        flat = rescale(first.transpose(1, 2).flatten(0, 1), before, now, budget)
        return flat.view(layers, heads, -1).transpose(1, 2)
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
