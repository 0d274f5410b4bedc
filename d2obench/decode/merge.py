"""D2O's merge during decoding, at the cost of one extra row in a matrix product that is computed anyway (PyTorch).

Design. At the end of step t the policy evicts one entry per layer, sequence and KV head. To merge it
(``d2obench.policies.merging``), its key must be compared with every kept key, which would read the whole cache a second
time. The evictee is therefore *staged*: its key and value are copied to a buffer, and in step t+1 its unit vector is
appended to the queries as one more row of ``q·Kᵀ``. Before the softmax of step t+1 that row yields the merge target j
and u = max cos. The target's value is then merged in place, and its logit follows by linearity, ``q·k'_j = (1−w)·q·k_j
+ w·q·k_e`` with ``w = exp(u) ÷ (e + exp(u)) = sigmoid(u − 1)``. No other computation of this step reads the target's
key, so the keys of all layers are merged together at the end of the step (*commit*), along with thresholds and norms.
The result is exactly that of merging at the end of step t, because the token of step t+1, which occupies the evictee's
slot, is excluded from the possible merge targets.

``d2obench.decode.cpu.merge`` and ``d2obench.decode.triton.merge`` implement the same algorithm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench.policies.merging import TINY, follow, merge_evicted, merge_weight, nearest
from d2obench.policies.rules import MergeSpec
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

TARGET_BIAS = -1.0
"""Bias of a slot that may be a merge target. It makes the stored similarity u − 1, whose sigmoid is the merge
weight."""


class StagedEntries(ABC):
    """The staged evictee of every layer and row; a row is one KV head of one sequence. What becomes of it is decided by
    the classes derived from this one.

    Args:
        state: the slots.
        spec: the merge, as the policy declares it.

    Attributes:
        queries: ``[layers, rows, G + 1, d]``, work buffer for the step's queries; the last row is the evictee's unit
            vector.
        value: the evictee's value, ``[layers, rows, d_v]``.
        score: a score of it, float32 ``[layers, rows]``.
        similarity: u − 1 between the evictee and its merge target, float32 ``[layers, rows]``; −inf if there is no
            possible target.
        target: slot of the merge target, int64 ``[layers, rows]``.
        weight: weight of the evictee in the merge, float32 ``[layers, rows]``; 0 if it is dropped instead of merged.
        inverse_norm: 1 ÷ the norm of the key in every slot, float32 ``[layers, rows, C]``.
        target_bias: TARGET_BIAS for slots that may be merge targets and −inf for all others, ``[layers, rows, C]``.
    """

    def __init__(self, state: DecodeState, spec: Any) -> None:
        self.state, self.spec = state, spec
        store, (layers, rows, width) = state.store, state.position.shape
        device = store.device
        key_width, value_width = store.widths
        self.queries = torch.zeros(layers, rows, state.group + 1, key_width, dtype=store.dtype, device=device)
        self.value = torch.zeros(layers, rows, value_width, dtype=store.dtype, device=device)
        self.score = torch.zeros(layers, rows, device=device)
        self.similarity = torch.zeros(layers, rows, device=device)
        self.target = torch.zeros(layers, rows, dtype=torch.long, device=device)
        self.weight = torch.zeros(layers, rows, device=device)
        self.inverse_norm = torch.zeros(layers, rows, width, device=device)
        for layer in range(layers):
            norm = store.keys(layer).float().norm(dim=-1)
            self.inverse_norm[layer, :, : norm.shape[1]] = 1 / norm.clamp_min(TINY)
        self.target_bias = torch.full((layers, rows, width), TARGET_BIAS, device=device)
        self.target_bias.masked_fill_(state.position < 0, -torch.inf)
        self._cosine = torch.zeros(rows, width, device=device)

    @abstractmethod
    def logits(
        self, layer: int, query: Tensor, scale: float, keys: Tensor, bias: Tensor | None, buffer: Tensor
    ) -> Tensor:
        """Logits ``[rows, G + 1, C]`` of the queries, computed as if the staged evictee had already been merged. The
        last row belongs to the evictee itself; attention must ignore it.

        Args:
            layer: index among the compressed layers.
            query: ``[B, Hq, 1, d]``.
            scale: factor of the logits.
            keys: the layer's keys, ``[rows, C, d]``.
            bias: what is added to the logits of every slot, ``[rows, 1, C]``, or None.
            buffer: work space of at least ``rows·(G+1)·C``.
        """

    @abstractmethod
    def commit(self) -> None:
        """Finishes the merge after the last layer of a step."""

    @abstractmethod
    def stage(self, victim: Tensor) -> None:
        """Copies the evicted entries ``[layers, rows]`` to the staging buffers, before their slots are reserved for the
        next token."""

    @abstractmethod
    def commit_now(self) -> None:
        """Performs the staged merges immediately, without a decode step; used when the next input is a new turn's
        block."""

    def tensors(self) -> list[Tensor]:
        """All tensors of the pending merge; the last one is work space."""
        return [
            self.queries, self.value, self.score, self.similarity, self.target, self.weight, self.inverse_norm,
            self.target_bias, self._cosine,
        ]  # fmt: skip

    def _products(
        self, layer: int, query: Tensor, scale: float, keys: Tensor, bias: Tensor | None, buffer: Tensor
    ) -> Tensor:
        """One product of the keys with the queries and the evictee's unit vector, ``[rows, G + 1, C]``."""
        queries = self.queries[layer]
        rows, group, width = queries.shape[0], queries.shape[1] - 1, keys.shape[1]
        queries[:, :group].copy_(query.view(rows, group, -1))
        every = buffer[: rows * (group + 1) * width].view(rows, group + 1, width)
        given, beta = (every, 0) if bias is None else (bias, 1)
        return torch.baddbmm(given, queries, keys.transpose(1, 2), beta=beta, alpha=scale, out=every)

    def _find(self, layer: int, products: Tensor, scale: float) -> None:
        """The merge target and u − 1, from the evictee's products ``[rows, C]``."""
        width = products.shape[1]
        cosine, inverse = self._cosine[:, :width], self.inverse_norm[layer, :, :width]
        torch.addcmul(self.target_bias[layer, :, :width], products, inverse, value=1 / scale, out=cosine)
        torch.max(cosine, -1, out=(self.similarity[layer], self.target[layer]))

    def _copy(self, victim: Tensor) -> None:
        """Copies the evictees' values and unit vectors."""
        store = self.state.store
        index = store.base + victim
        self.value.copy_(store.read_values(index))
        self.queries[:, :, -1] = store.read_keys(index).float() * self.inverse_norm.gather(2, victim[..., None])

    def _admit_newest(self) -> None:
        """Allows the token just decoded as a merge target from now on."""
        state, store = self.state, self.state.store
        self._note_norms(state.slot, store.read_keys(store.base + state.slot))
        self.target_bias.scatter_(2, state.slot[..., None], TARGET_BIAS)

    def _note_norms(self, slot: Tensor, keys: Tensor) -> None:
        """Stores the inverse norms of the keys ``[layers, rows, d]`` that were written to the slots ``slot`` ``[layers,
        rows]``."""
        norm = keys.float().norm(dim=-1, keepdim=True)
        self.inverse_norm.scatter_(2, slot[..., None], norm.clamp_min_(TINY).reciprocal_())


class PendingMerge(StagedEntries):
    """D2O's merge of the staged evictees.

    Args:
        state: the slots; commits update ``state.threshold`` and ``state.merged``.
        spec: parameters of the merge rule.

    Attributes:
        key: the evictee's key, ``[layers, rows, d]``.
        pending: whether a row has a staged evictee, bool ``[layers, rows]``.
        required: smallest u − 1 at which the evictee is merged, float32 ``[layers, rows]``.
    """

    spec: MergeSpec

    def __init__(self, state: DecodeState, spec: MergeSpec) -> None:
        super().__init__(state, spec)
        (layers, rows, _), store = state.position.shape, state.store
        self.key = torch.zeros(layers, rows, store.widths[0], dtype=store.dtype, device=store.device)
        self.pending = torch.zeros(layers, rows, dtype=torch.bool, device=store.device)
        self.required = torch.full((layers, rows), torch.inf, device=store.device)

    def logits(
        self, layer: int, query: Tensor, scale: float, keys: Tensor, bias: Tensor | None, buffer: Tensor
    ) -> Tensor:
        # 1. one product for the queries and for the evictee's unit vector
        every = self._products(layer, query, scale, keys, bias, buffer)
        queries = self.queries[layer]
        rows, group = queries.shape[0], queries.shape[1] - 1
        # 2. its last row gives the merge target, u − 1, and the weight
        with span("similarity"):
            self._find(layer, every[:, group], scale)
        # 3. the target's value is merged, and its logits follow by linearity
        with span("merge"):
            self._weigh(layer)
            self._merge_value(layer)
            if self.spec.keys:
                own, at = every[:, :group], self.target[layer].view(rows, 1, 1).expand(rows, group, 1)
                before = own.gather(2, at)
                evicted = torch.baddbmm(before, queries[:, :group], self.key[layer, ..., None], beta=0, alpha=scale)
                own.scatter_(2, at, torch.lerp(before, evicted, self.weight[layer].view(rows, 1, 1).to(own.dtype)))
        return every

    def commit(self) -> None:
        """Thresholds, counts, merged keys, and the norms of changed keys."""
        state, store = self.state, self.state.store
        # 1. thresholds and counts
        followed = follow(state.threshold, self._newest(self.similarity) + 1, self.spec.beta)
        state.threshold.copy_(torch.where(self.pending, followed, state.threshold))
        state.merged += (self.weight > 0).sum(1)
        # 2. merge the targets' keys and scores
        if self.spec.keys:
            index = store.base + self.target
            merged = torch.lerp(store.read_keys(index), self.key, self.weight.unsqueeze(-1).to(self.key.dtype))
            store.write_keys(index, merged)
            self._note_norms(self.target, merged)
        if self.spec.inherit:
            gained = torch.where(self.weight > 0, self.score, 0.0)
            state.score.scatter_add_(2, self.target[..., None], gained[..., None])
        # 3. allow the token just decoded as a merge target from now on
        self._admit_newest()

    def stage(self, victim: Tensor) -> None:
        state, at = self.state, victim[..., None]
        # 1. copy the entry's key, unit vector, value and score
        self._copy(victim)
        self.key.copy_(state.store.read_keys(state.store.base + victim))
        self.score.copy_(state.score.gather(2, at)[..., 0])
        self.pending.copy_(state.position.gather(2, at)[..., 0] >= 0)
        # 2. mark the slots that may be merge targets
        if self.spec.targets == "important":
            self.target_bias.fill_(TARGET_BIAS).masked_fill_(~state.important(), -torch.inf)
        self.target_bias.scatter_(2, at, -torch.inf)
        # 3. set the similarity required for the merge
        # For β < 1, u ≥ τ_t holds exactly if u ≥ τ_{t−1}; for β = 1 it always holds (one evictee, Eq. 10). Comparing
        # with τ_{t−1} avoids the rounding of the moving average.
        least = state.threshold - 1 if self.spec.beta < 1 else torch.full_like(self.required, -torch.inf)
        self.required.copy_(torch.where(self.pending, least, torch.inf))

    def commit_now(self) -> None:
        store = self.state.store
        for layer in range(len(store.capacities)):
            keys = store.keys(layer)
            may = self.target_bias[layer, :, : keys.shape[1]] > -torch.inf
            similarity, target = nearest(self.key[layer][:, None], keys, may)
            self.similarity[layer], self.target[layer] = similarity[:, 0] - 1, target[:, 0]
            self._weigh(layer)
            self._merge_value(layer)
        self.commit()

    def tensors(self) -> list[Tensor]:
        return [self.key, self.pending, self.required, *super().tensors()]

    def _weigh(self, layer: int) -> None:
        """Sets the merge weights of a layer; 0 for an evictee whose similarity is below the threshold."""
        found = self.similarity[layer]
        if self.spec.per_layer:
            threshold = follow(self.state.threshold[layer], self._newest(found) + 1, self.spec.beta)
            passed = (found + 1 >= threshold) & self.pending[layer]
        else:
            passed = found >= self.required[layer]
        torch.mul(merge_weight(found), passed, out=self.weight[layer])

    def _merge_value(self, layer: int) -> None:
        """Merges the evictees' values of a layer into their merge targets, in place."""
        store, share = self.state.store, self.weight[layer].unsqueeze(1)
        index = store.base[layer] + self.target[layer]
        store.write_values(index, torch.lerp(store.read_values(index), self.value[layer], share.to(store.dtype)))

    def _newest(self, similarity: Tensor) -> Tensor:
        """The similarity that updates the threshold: u itself, or its mean over the KV heads of a sequence
        (``per_layer``)."""
        if not self.spec.per_layer:
            return similarity
        grouped = similarity.view(*similarity.shape[:-1], -1, self.state.heads)
        return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(similarity.shape)


def merge_together(state: DecodeState, spec: MergeSpec, victims: Tensor) -> None:
    """Merges several entries per row that one step evicts, slots ``victims`` ``[layers, rows, n]``, immediately and in
    place."""
    store = state.store
    for layer in range(victims.shape[0]):
        index = store.base[layer, :, None] + victims[layer]
        leaving = state.position[layer].gather(1, victims[layer]) >= 0
        may = state.important()[layer] if spec.targets == "important" else state.position[layer] >= 0
        may = may.scatter(1, victims[layer], False)[:, : store.capacities[layer]]
        kept, evicted = (store.keys(layer), store.values(layer)), (store.read_keys(index), store.read_values(index))
        merged = merge_evicted(spec, kept, evicted, may, leaving, state.heads, state.threshold[layer])
        store.fill(layer, merged.keys, merged.values, may)
        state.threshold[layer] = merged.threshold
        state.merged[layer] += merged.passed.sum()
        if spec.inherit:
            score = state.score[layer]
            gained = torch.where(merged.passed, score.gather(1, victims[layer]), 0.0)
            score.scatter_add_(1, merged.target, gained)
