"""Keys channel by channel: the storage of a growing cache on a CPU.

``q·Kᵀ`` of a few queries reads the keys at 17 to 23 GB/s where the slots of a channel lie side by side, and at 12 GB/s
where the channels of a slot do (MKL, float32, two cores of a Xeon, 64 channels; memory gives 25). So a layer's keys are
stored ``[B·H, d, C]``; all else sees them as ``[B·H, C, d]``. One slot's key is then spread over d cache lines: a cache
that only appends writes each of them once and reads none again, but one that overwrites slots, reads what it evicts
and merges into hosts loses more there than it gains, and keeps its keys slot by slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2obench.engine.slots import DenseStore


class TransposedStore(DenseStore):
    """As :class:`DenseStore`, its keys stored ``[B·H, d, C]`` layer by layer."""

    def write(self, layer: int, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Overwrites one slot of each row of a layer, ``index`` ``[rows]``, by keys and values ``[rows…, d]``."""
        slot = (index - self.base[layer]).view(-1, 1, 1).expand(-1, 1, self.widths[0])
        self.keys(layer).scatter_(1, slot, keys.reshape(self.rows, 1, -1))
        self.write_values(index, values)

    def write_keys(self, index: Tensor, keys: Tensor) -> None:
        """Overwrites keys only."""
        self.key_rows.view(-1).index_copy_(0, self._places(index), keys.reshape(-1))

    def read_keys(self, index: Tensor) -> Tensor:
        """Keys of the rows ``index``, ``[…, d]``, a copy."""
        return self.key_rows.view(-1).index_select(0, self._places(index)).view(*index.shape, -1)

    def _places(self, index: Tensor) -> Tensor:
        """Where in the storage the keys of the rows ``index`` are, ``[n·d]``."""
        flat = index.reshape(-1)
        layer = torch.searchsorted(torch.tensor(self.offsets[1:]), flat, right=True)
        size = torch.tensor(self.capacities)[layer]
        slot = (flat - self.base[layer, 0]) % size
        first = (flat - slot) * self.widths[0] + slot
        return (first[:, None] + size[:, None] * torch.arange(self.widths[0])).view(-1)

    def _key_view(self, flat: Tensor, layer: int) -> Tensor:
        run = flat[self.offsets[layer] : self.offsets[layer + 1]]
        return run.view(self.rows, self.widths[0], self.capacities[layer]).transpose(1, 2)
