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
from d2obench.policies.base import Entries, Kept, Policy
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

    def positions(self, length: Tensor) -> Tensor:
        """The queries' positions in prompts of ``length`` ``[B]`` tokens, int64 ``[B, n]``; negative for padding."""
        count = self.queries.shape[2]
        return length[:, None] - count + torch.arange(count, device=length.device)

    def select(self, sequences: Tensor) -> LastQueries:
        """Those of other sequences."""
        return LastQueries(self.queries[sequences], self.outputs[sequences], self.scale)


@dataclass(frozen=True)
class Trial:
    """What the prompt's last queries get from a layer that was compressed on trial; H is the number of KV heads, and G
    that of the query heads of each.

    Args:
        kept: the kept entries, after merging.
        weights: attention of the queries over the kept entries, float32 ``[B, H, G, n, C]``.
        difference: ô − o, their outputs less those over all entries, float32 ``[B, H, G, n, d_v]``.
        asked: the queries' positions, int64 ``[B, n]``; negative for padding.
    """

    kept: Kept
    weights: Tensor
    difference: Tensor
    asked: Tensor

    def mean(self, held: Tensor) -> Tensor:
        """The mean of ``held`` ``[B, …, n]`` over the queries that are tokens, ``[B, …]``."""
        real = (self.asked >= 0).view(self.asked.shape[0], *[1] * (held.ndim - 2), -1)
        mean: Tensor = (held * real).sum(-1) / real.sum(-1).clamp_min(1)
        return mean


def compress_on_trial(
    policy: Policy, entries: Entries, keep: Tensor, last: LastQueries, there: Tensor | None = None
) -> Trial:
    """Compresses a layer to ``keep`` entries and lets the last queries attend to what was kept.

    Args:
        policy: what selects and merges.
        entries: the layer's entries; they stay as they are.
        keep: int64 ``[B]``, on the CPU.
        last: the queries to measure with.
        there: ``keep`` on the device of the entries, if it is there already.
    """
    heads, total = entries.position.shape[1:]
    # 1. compress on trial
    stats = dict(entries.stats)
    kept, _, _ = compress(policy, replace(entries, stats=stats), keep, there)
    at = kept.index.clamp_max(total - 1)
    # 2. attention of the last queries over what was kept, if it is not after them
    asked = last.positions(entries.length)
    hidden = (entries.position.gather(2, at)[:, :, None] > asked[:, None, :, None]) | ~kept.filled[:, :, None]
    bias = stats["bias"].gather(2, at) if "bias" in stats else None
    weights = attention(last, kept.keys, hidden, bias)
    found = (weights.flatten(2, 3) @ kept.values.float()).view(*weights.shape[:-1], -1)
    # 3. what that changes
    return Trial(kept, weights, found - by_head(last.outputs.transpose(1, 2), heads), asked)


def attention(last: LastQueries, keys: Tensor, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of the last queries over ``keys`` ``[B, H, C, d]``, float32 ``[B, H, G, n, C]``.

    Args:
        last: the queries.
        keys: of all entries, or of those that are kept.
        hidden: which entries a query does not see, bool ``[B, H, n, C]``.
        bias: added to the logits of an entry, ``[B, H, C]``.
    """
    queries = by_head(last.queries, keys.shape[1]) * last.scale
    logits = (queries.flatten(2, 3) @ keys.float().transpose(2, 3)).view(*queries.shape[:-1], -1)
    if bias is not None:
        logits += bias[:, :, None, None]
    return torch.softmax(logits.masked_fill_(hidden[:, :, None], -torch.inf), -1).nan_to_num_(0.0)


def projected(held: Tensor, projection: Tensor | None) -> Tensor:
    """What the outputs ``[B, H, G, n, d_v]`` of each KV head add to the layer's output, ``[B, H, n, hidden]``.

    Args:
        projection: W_O, ``[hidden, Hq·d_v]``; None to take the outputs themselves.
    """
    joined, heads = held.transpose(2, 3).flatten(3), held.shape[1]
    if projection is None:
        return joined
    # one product for each KV head, of all sequences together: its part of W_O need not be copied for each of them
    weight = projection.float().view(projection.shape[0], heads, -1).permute(1, 2, 0)
    found = torch.bmm(joined.transpose(0, 1).flatten(1, 2), weight)
    return found.view(heads, held.shape[0], -1, projection.shape[0]).transpose(0, 1)


def output_error(
    policy: Policy, entries: Entries, keep: Tensor, last: LastQueries, projection: Tensor | None,
    there: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The error that compression to ``keep`` entries causes for each KV head, float32 ``[B, H]``; arguments as in
    :func:`compress_on_trial` and :func:`projected`."""
    trial = compress_on_trial(policy, entries, keep, last, there)
    return trial.mean(projected(trial.difference, projection).square().sum(-1))


def by_head(held: Tensor, heads: int) -> Tensor:
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
