"""D2O's decode-time merge at the price of one more row in a product that is computed anyway.

Design. At the end of step t the policy evicts one entry per layer, sequence and KV head. Its merge needs the cosine
similarity to every conserved key, which would read the whole cache a second time. So the evictee *rides along*: it is
held aside (``key``, ``value``), and at step t+1 its unit vector is one more row of ``q·Kᵀ``. That row gives the
nearest host j and u = max cos before the softmax of step t+1; the host's key and value are merged in place, and its
logit follows by linearity, ``q·k'_j = (1−w)·q·k_j + w·q·k_e``. The result is exactly that of merging at the end of
step t (Eq. 8–12 of arXiv 2406.13035), because the token of step t+1, which took the evictee's slot, is kept out of the
hosts. Thresholds and norms, small, are settled for all layers at once after the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2obench.engine.ranges import span
from d2obench.policies.base import Carries

if TYPE_CHECKING:
    from d2obench.engine.state import DecodeState

TINY = 1e-6


class Carry:
    """The pending evictee of every layer and row, and the thresholds it is judged by.

    Args:
        state: the slots.
        plan: what is merged and under which threshold.

    ``state.extra["tau"]`` is the EMA threshold, float32 ``[layers, rows]``, −inf where nothing was evicted yet, and
    ``state.extra["merged"]`` the count of merges.
    """

    def __init__(self, state: DecodeState, plan: Carries) -> None:
        self.state, self.plan = state, plan
        store, (layers, rows, width) = state.store, state.position.shape
        device, key_width, value_width = store.device, *store.widths
        self.queries = torch.zeros(layers, rows, state.group + 1, key_width, dtype=store.dtype, device=device)
        self.key = torch.zeros(layers, rows, key_width, dtype=store.dtype, device=device)
        self.value = torch.zeros(layers, rows, value_width, dtype=store.dtype, device=device)
        self.pending = torch.zeros(layers, rows, dtype=torch.bool, device=device)
        self.similarity = torch.zeros(layers, rows, device=device)
        self.host = torch.zeros(layers, rows, dtype=torch.long, device=device)
        self.weight = torch.zeros(layers, rows, device=device)
        self.inverse_norm = torch.zeros(layers, rows, width, device=device)
        for layer in range(layers):
            norm = store.keys(layer).float().norm(dim=-1)
            self.inverse_norm[layer, :, : norm.shape[1]] = 1 / norm.clamp_min(TINY)
        self.host_bias = torch.zeros(layers, rows, width, device=device)
        self.host_bias.masked_fill_(state.position < 0, -torch.inf)
        self._cosine = torch.empty(rows, width, device=device)

    def logits(self, layer: int, scaled: Tensor, keys: Tensor, buffer: Tensor) -> Tensor:
        """Logits ``[rows, G, C]`` of the queries, after the pending evictee has been merged into its host.

        Args:
            layer: index among the compressed layers.
            scaled: queries times scale, ``[rows, G, d]``.
            keys: the layer's keys, ``[rows, C, d]``.
            buffer: work space of at least ``rows·(G+1)·C``.
        """
        rows, group, _ = scaled.shape
        width = keys.shape[1]
        queries = self.queries[layer]
        queries[:, :group] = scaled
        every = buffer[: rows * (group + 1) * width].view(rows, group + 1, width)
        torch.bmm(queries, keys.transpose(1, 2), out=every)
        with span("similarity"):
            cosine = self._cosine[:, :width]
            torch.addcmul(
                self.host_bias[layer, :, :width], every[:, group], self.inverse_norm[layer, :, :width], out=cosine
            )
            best, host = self.similarity[layer], self.host[layer]
            torch.max(cosine, -1, out=(best, host))
            passed = self._passes(layer, best)
            weight = self.weight[layer]
            torch.mul(torch.sigmoid(best - 1), passed, out=weight)
        with span("merge"):
            self._merge(layer, host, weight)
            own = every[:, :group]
            if self.plan.keys:
                at = host.view(rows, 1, 1).expand(rows, group, 1)
                evicted = torch.bmm(scaled, self.key[layer].unsqueeze(2))
                own.scatter_(2, at, own.gather(2, at).lerp_(evicted, weight.view(rows, 1, 1).to(own.dtype)))
        return own

    def settle(self) -> None:
        """After the last layer: thresholds, counts, and the norms of merged hosts and of the new token's key."""
        state, store = self.state, self.state.store
        newest = self.similarity if not self.plan.per_layer else self._mean(self.similarity)
        tau = state.extra["tau"]
        smoothed = torch.where(tau.isinf(), newest, torch.lerp(tau, newest, self.plan.beta))
        tau.copy_(torch.where(self.pending, smoothed, tau))
        state.extra["merged"] += (self.weight > 0).sum()
        for slot in (self.host, state.slot) if self.plan.keys else (state.slot,):
            norm = store.read_keys(store.base + slot).float().norm(dim=-1)
            self.inverse_norm.scatter_(2, slot[..., None], (1 / norm.clamp_min(TINY))[..., None])
        self.host_bias.scatter_(2, state.slot[..., None], 0.0)

    def take(self, victim: Tensor) -> None:
        """Holds the evicted entries aside; called with the freed slots before they are booked for the next token."""
        state, store = self.state, self.state.store
        index = store.base + victim
        self.key.copy_(store.read_keys(index))
        self.value.copy_(store.read_values(index))
        inverse = self.inverse_norm.gather(2, victim[..., None])
        self.queries[:, :, -1] = self.key * inverse.to(self.key.dtype)
        self.pending.copy_(state.position.gather(2, victim[..., None])[..., 0] >= 0)
        if self.plan.hosts == "important":
            newest = state.position > state.now[None, :, None] - state.extra["recent"]
            self.host_bias.zero_().masked_fill_((state.position < 0) | newest | state.score.isinf(), -torch.inf)
        self.host_bias.scatter_(2, victim[..., None], -torch.inf)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [
            self.queries, self.key, self.value, self.pending, self.similarity, self.host, self.weight,
            self.inverse_norm, self.host_bias, self._cosine,
        ]  # fmt: skip

    def _passes(self, layer: int, best: Tensor) -> Tensor:
        """u ≥ τ_t. With one evictee that is u ≥ τ_{t−1} for β < 1, which needs no rounding of the EMA."""
        tau = self.state.extra["tau"][layer]
        if self.plan.per_layer:
            smoothed = torch.lerp(tau, self._mean(best[None])[0], self.plan.beta)
            return (best >= torch.where(smoothed.isnan(), -torch.inf, smoothed)) & self.pending[layer]
        if self.plan.beta >= 1:
            return self.pending[layer]
        return (best >= tau) & self.pending[layer]

    def _merge(self, layer: int, host: Tensor, weight: Tensor) -> None:
        """Host ← (e·host + exp(u)·evictee) ÷ (e + exp(u)): a step of ``sigmoid(u − 1)`` towards the evictee."""
        store = self.state.store
        index = store.base[layer] + host
        value = torch.lerp(store.read_values(index).float(), self.value[layer].float(), weight[:, None])
        store.write_values(index, value.to(store.dtype))
        if self.plan.keys:
            key = torch.lerp(store.read_keys(index).float(), self.key[layer].float(), weight[:, None])
            store.write_keys(index, key.to(store.dtype))

    def _mean(self, similarity: Tensor) -> Tensor:
        """Mean over the KV heads of a sequence, ``[layers, rows]``."""
        grouped = similarity.view(similarity.shape[0], -1, self.state.heads)
        return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(similarity.shape)
