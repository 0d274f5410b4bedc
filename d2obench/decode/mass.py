"""The merge by mass during decoding (PyTorch); ``d2obench.policies.mass`` states the rule.

As for D2O's merge (``d2obench.decode.merge``), the evicted entry is staged: in the next step its unit vector is one
more query, whose row of ``q·Kᵀ`` gives the merge target j before the softmax. At that point, with ``r = min(1, s_e ÷
s_j)``, the target's value becomes ``lerp(v_j, v_e, r ÷ (1 + r))`` and ln(1 + r) is added to its logits, so that the
step sees the cache as if the entry had been merged when it was evicted. When the step ends (*commit*), ``b_j`` and
``S_j`` follow for all layers together. Keys do not change, and there is no threshold: apart from one vector and two
numbers nothing is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2obench.decode.merge import TARGET_BIAS, StagedEntries
from d2obench.policies.mass import mass_ratio, mixed
from d2obench.policies.merging import nearest, sums_by_target
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


class PendingMass(StagedEntries):
    """The staged evictee of every layer and row, and the state of its merge.

    Attributes:
        score: its mean attention, float32 ``[layers, rows]``; 0 if a row has no staged evictee.
        weight: r, float32 ``[layers, rows]``.
    """

    def logits(
        self, layer: int, query: Tensor, scale: float, keys: Tensor, bias: Tensor | None, buffer: Tensor
    ) -> Tensor:
        every = self._products(layer, query, scale, keys, None, buffer)
        with span("similarity"):
            self._find(layer, every[:, -1], scale)
        with span("merge"):
            self._merge_value(layer)
            own, at = every[:, :-1], self.target[layer].view(-1, 1, 1).expand(-1, every.shape[1] - 1, 1)
            if bias is not None:
                own += bias
            gain = self.weight[layer].log1p().view(-1, 1, 1)
            own.scatter_add_(2, at, gain.to(own.dtype).expand(at.shape))
        return every

    def commit(self) -> None:
        """Biases and accumulated attention of the targets, and counts."""
        state, at = self.state, self.target[..., None]
        assert state.bias is not None
        state.merged += (self.weight > 0).sum(1)
        state.bias.scatter_add_(2, at, self.weight.log1p()[..., None])
        for sums, factor in scaled_sums(state, 1 + self.weight[..., None]):
            sums.scatter_(2, at, sums.gather(2, at) * factor)
        self._admit_newest()

    def stage(self, victim: Tensor) -> None:
        at = victim[..., None]
        self._copy(victim)
        real = self.state.position.gather(2, at)[..., 0] >= 0
        self.score.copy_(torch.where(real, mean_attention(self.state, at)[..., 0], 0.0))
        self.target_bias.scatter_(2, at, -torch.inf)

    def commit_now(self) -> None:
        for layer in range(len(self.state.store.capacities)):
            keys = self.state.store.keys(layer)
            may = self.target_bias[layer, :, : keys.shape[1]] > -torch.inf
            similarity, target = nearest(self.queries[layer, :, -1:], keys, may)
            self.similarity[layer], self.target[layer] = similarity[:, 0] + TARGET_BIAS, target[:, 0]
            self._merge_value(layer)
        self.commit()

    def _merge_value(self, layer: int) -> None:
        """Sets r of the evictees of a layer, and merges their values into those of their targets."""
        state, store, at = self.state, self.state.store, self.target[layer][:, None]
        seen = state.now[:, None] - state.position[layer].gather(1, at) + 1
        found = mass_ratio(self.score[layer][:, None], state.score[layer].gather(1, at) / seen)
        ratio = torch.where(self.similarity[layer][:, None] > -torch.inf, found, 0.0)
        self.weight[layer] = ratio[:, 0]
        index = store.base[layer] + self.target[layer]
        share = (ratio / (1 + ratio)).to(store.dtype)
        store.write_values(index, torch.lerp(store.read_values(index), self.value[layer], share))


def mean_attention(state: DecodeState, slots: Tensor) -> Tensor:
    """``s`` of the entries in ``slots`` ``[layers, rows, n]``."""
    return state.score.gather(2, slots) / (state.now[None, :, None] - state.position.gather(2, slots) + 1)


def scaled_sums(state: DecodeState, factor: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The sums that a merge by mass changes, ``[layers, rows, C]``, and the factor of each: sums of attention grow by
    ``factor``, those of squared attention by its square."""
    return [(state.score, factor), *([(state.square, factor * factor)] if state.square.numel() else [])]


def merge_together(state: DecodeState, victims: Tensor) -> None:
    """Merges several entries per row that one step evicts, slots ``victims`` ``[layers, rows, n]``, immediately and in
    place."""
    store, bias = state.store, state.bias
    assert bias is not None
    score = mean_attention(state, victims)
    for layer, capacity in enumerate(store.capacities):
        # 1. the merge targets, and the evicted entries' mass relative to theirs
        index = store.base[layer, :, None] + victims[layer]
        leaving = state.position[layer].gather(1, victims[layer]) >= 0
        may = (state.position[layer] >= 0).scatter(1, victims[layer], False)[:, :capacity]
        similarity, target = nearest(store.read_keys(index), store.keys(layer), may)
        seen = state.now[:, None] - state.position[layer].gather(1, target) + 1
        ratio = mass_ratio(score[layer], state.score[layer].gather(1, target) / seen)
        ratio = torch.where(leaving & (similarity > -torch.inf), ratio, 0.0)
        # 2. values, biases and accumulated attention of the targets
        total, summed = sums_by_target(target, ratio, capacity, [store.read_values(index)])
        values = mixed(store.values(layer), total, summed)
        at = target[..., None].expand(-1, -1, values.shape[2])
        store.write_values(store.base[layer, :, None] + target, values.gather(1, at))
        bias[layer, :, :capacity] += total[..., 0].log1p()
        for sums, factor in scaled_sums(state, 1 + total[..., 0]):
            sums[layer, :, :capacity] *= factor
        state.merged[layer] += (ratio > 0).sum()
