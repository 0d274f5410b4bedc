"""D2O's decode-time merge at the price of one more row in a product that is computed anyway.

Design. At the end of step t the policy evicts one entry per layer, sequence and KV head. Its merge needs the cosine
similarity to every conserved key, which would read the whole cache a second time. So the evictee *rides along*: it is
held aside (``key``, ``value``), and at step t+1 its unit vector is one more row of ``q·Kᵀ``. That row gives the
nearest host j and u = max cos before the softmax of step t+1. The host's value is merged in place, its logit follows by
linearity, ``q·k'_j = (1−w)·q·k_j + w·q·k_e`` with ``w = exp(u) ÷ (e + exp(u)) = sigmoid(u − 1)``, and its key, which
nothing else reads in this step, is merged for all layers at once when the step is over, with thresholds and norms. The
result is exactly that of merging at the end of step t (Eq. 8–12 of arXiv 2406.13035), because the token of step t+1,
which took the evictee's slot, is kept out of the hosts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2obench.policies.base import MergeSpec
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

TINY = 1e-6
HOST = -1.0
"""Bias of a slot that may host: similarities are kept as u − 1, for the weight of a merge is sigmoid(u − 1)."""


class PendingMerge:
    """The pending evictee of every layer and row, and the thresholds it is judged by.

    Args:
        state: the slots.
        spec: what is merged and under which threshold.

    ``state.extra["tau"]`` is the EMA threshold, float32 ``[layers, rows]``, −inf where nothing was evicted yet, and
    ``state.extra["merged"]`` the count of merges, int64 ``[layers]``.
    """

    def __init__(self, state: DecodeState, spec: MergeSpec) -> None:
        self.state, self.spec = state, spec
        store, (layers, rows, width) = state.store, state.position.shape
        device = store.device
        key_width, value_width = store.widths
        self.queries = torch.zeros(layers, rows, state.group + 1, key_width, dtype=store.dtype, device=device)
        self.key = torch.zeros(layers, rows, key_width, dtype=store.dtype, device=device)
        self.value = torch.zeros(layers, rows, value_width, dtype=store.dtype, device=device)
        self.pending = torch.zeros(layers, rows, dtype=torch.bool, device=device)
        self.score = torch.zeros(layers, rows, device=device)
        self.similarity = torch.zeros(layers, rows, device=device)
        self.host = torch.zeros(layers, rows, dtype=torch.long, device=device)
        self.weight = torch.zeros(layers, rows, device=device)
        self.inverse_norm = torch.zeros(layers, rows, width, device=device)
        for layer in range(layers):
            norm = store.keys(layer).float().norm(dim=-1)
            self.inverse_norm[layer, :, : norm.shape[1]] = 1 / norm.clamp_min(TINY)
        self.host_bias = torch.full((layers, rows, width), HOST, device=device)
        self.host_bias.masked_fill_(state.position < 0, -torch.inf)
        self.bar = torch.full((layers, rows), torch.inf, device=device)
        self._cosine = torch.empty(rows, width, device=device)
        # views made once: a step has no time to spare for slicing
        self._lanes = [self._lane(layer) for layer in range(layers)]

    def _lane(self, layer: int) -> tuple[Tensor, ...]:
        rows, group = self.queries.shape[1], self.queries.shape[2] - 1
        queries, weight, host = self.queries[layer], self.weight[layer], self.host[layer]
        key, value, best = self.key[layer].unsqueeze(2), self.value[layer], self.similarity[layer]
        at = host.view(rows, 1, 1).expand(rows, group, 1)
        base = self.state.store.base[layer]
        return (
            queries,
            queries[:, :group],
            key,
            value,
            self.bar[layer],
            weight,
            weight.unsqueeze(1),
            best,
            host,
            at,
            base,
        )

    def logits(
        self, layer: int, query: Tensor, scale: float, keys: Tensor, bias: Tensor | None, buffer: Tensor
    ) -> Tensor:
        """Logits ``[rows, G + 1, C]`` of the queries, after the pending evictee was merged into its host; the last
        row is the evictee's own and means nothing to attention.

        Args:
            layer: index among the compressed layers.
            query: ``[B, Hq, 1, d]``.
            scale: factor of the logits.
            keys: the layer's keys, ``[rows, C, d]``.
            bias: −inf for slots that hold nothing, ``[rows, 1, C]``, or None where all are filled.
            buffer: work space of at least ``rows·(G+1)·C``.
        """
        queries, own_queries, key, value, bar, weight, share, best, host, at, base = self._lanes[layer]
        rows, group, width = queries.shape[0], own_queries.shape[1], keys.shape[1]
        own_queries.copy_(query.view(rows, group, -1))
        every = buffer[: rows * (group + 1) * width].view(rows, group + 1, width)
        given, beta = (every, 0) if bias is None else (bias, 1)
        torch.baddbmm(given, queries, keys.transpose(1, 2), beta=beta, alpha=scale, out=every)
        with span("similarity"):
            cosine = self._cosine[:, :width]
            hosts, inverse = self.host_bias[layer, :, :width], self.inverse_norm[layer, :, :width]
            torch.addcmul(hosts, every[:, group], inverse, value=1 / scale, out=cosine)
            torch.max(cosine, -1, out=(best, host))
            passed = self.passes(layer, best) if self.spec.per_layer else best >= bar
            torch.mul(torch.sigmoid(best), passed, out=weight)
        with span("merge"):
            store = self.state.store
            index = base + host
            store.write_values(index, torch.lerp(store.read_values(index), value, share.to(value.dtype)))
            if self.spec.keys:
                own = every[:, :group]
                before = own.gather(2, at)
                evicted = torch.baddbmm(before, own_queries, key, beta=0, alpha=scale)
                own.scatter_(2, at, torch.lerp(before, evicted, share.unsqueeze(2).to(own.dtype)))
        return every

    def settle(self) -> None:
        """After the last layer: thresholds, counts, the merged keys, and the norms of what changed."""
        state, store = self.state, self.state.store
        similarity = self.similarity + 1
        newest = self._mean(similarity) if self.spec.per_layer else similarity
        tau = state.extra["tau"]
        smoothed = torch.where(tau.isinf() | newest.isinf(), newest, torch.lerp(tau, newest, self.spec.beta))
        tau.copy_(torch.where(self.pending, smoothed, tau))
        state.extra["merged"] += (self.weight > 0).sum(1)
        if self.spec.keys:
            index = store.base + self.host
            merged = torch.lerp(store.read_keys(index), self.key, self.weight.unsqueeze(-1).to(self.key.dtype))
            store.write_keys(index, merged)
            self._norm(self.host, merged)
        if self.spec.inherit:
            gained = torch.where(self.weight > 0, self.score, 0.0)
            state.score.scatter_add_(2, self.host[..., None], gained[..., None])
        self._norm(state.slot, store.read_keys(store.base + state.slot))
        self.host_bias.scatter_(2, state.slot[..., None], HOST)

    def take(self, victim: Tensor) -> None:
        """Holds the evicted entries aside; called with the freed slots before they are booked for the next token."""
        state, store = self.state, self.state.store
        index = store.base + victim
        self.key.copy_(store.read_keys(index))
        self.value.copy_(store.read_values(index))
        inverse = self.inverse_norm.gather(2, victim[..., None])
        self.queries[:, :, -1] = self.key.float() * inverse
        self.score.copy_(state.score.gather(2, victim[..., None])[..., 0])
        self.pending.copy_(state.position.gather(2, victim[..., None])[..., 0] >= 0)
        if self.spec.hosts == "important":
            newest = state.position > state.now[None, :, None] - state.extra["recent"]
            self.host_bias.fill_(HOST).masked_fill_((state.position < 0) | newest | state.score.isinf(), -torch.inf)
        self.host_bias.scatter_(2, victim[..., None], -torch.inf)
        # u ≥ τ_t is u ≥ τ_{t−1} for β < 1, and always true for β = 1 (one evictee, Eq. 10): no rounding of the EMA
        bar = state.extra["tau"] - 1 if self.spec.beta < 1 else torch.full_like(self.bar, -torch.inf)
        self.bar.copy_(torch.where(self.pending, bar, torch.inf))

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [
            self.queries, self.key, self.value, self.pending, self.score, self.similarity, self.host, self.weight,
            self.inverse_norm, self.host_bias, self.bar, self._cosine,
        ]  # fmt: skip

    def passes(self, layer: int, best: Tensor) -> Tensor:
        """Whether what is pending in a layer is merged, ``[rows]``; ``best`` is u − 1."""
        if not self.spec.per_layer:
            return best >= self.bar[layer]
        smoothed = torch.lerp(self.state.extra["tau"][layer], self._mean(best[None])[0] + 1, self.spec.beta)
        return (best + 1 >= torch.where(smoothed.isnan(), -torch.inf, smoothed)) & self.pending[layer]

    def _norm(self, slot: Tensor, keys: Tensor) -> None:
        """Books the norms of keys ``[layers, rows, d]`` that now stand in ``slot``."""
        norm = keys.float().norm(dim=-1, keepdim=True)
        self.inverse_norm.scatter_(2, slot[..., None], norm.clamp_min_(TINY).reciprocal_())

    def _mean(self, similarity: Tensor) -> Tensor:
        """Mean over the KV heads of a sequence, ``[layers, rows]``."""
        grouped = similarity.view(similarity.shape[0], -1, self.state.heads)
        return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(similarity.shape)
