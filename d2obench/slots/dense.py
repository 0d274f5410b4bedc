"""Slots: the storage of the keys and values of all compressed layers, and what is known about each slot.

Design. All layers share one flat tensor of rows for the keys and one for the values; layer ℓ owns a contiguous range of
``B·H·C_ℓ`` rows, viewed as ``[B·H, C_ℓ, d]``. A decode step overwrites one row per layer, sequence and KV head, so
nothing is concatenated or moved, and an operation on "one slot in every layer" (read the evicted key, write a merge
target) is a single indexed operation for the whole model. What policies know about a slot (its token's position, its
score) is also stacked over layers, ``[layers, B·H, C]`` with ``C = max C_ℓ``.

A slot is filled, ``EMPTY`` (it will hold a token later, and every eviction chooses it first) or ``CLOSED`` (never used,
because its layer or sequence has fewer slots than the largest one). Attention does not depend on the order of slots,
because rotary positions are already applied to the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2obench.cpu.memory import lasting

EMPTY, CLOSED = -1, -2
NEVER = float("inf")
"""Score of a slot that must not be evicted: a sink or a closed slot."""
PROTECTED = 3e38
"""Score assigned to tokens of the recent window while choosing a victim: one is evicted only if nothing but sinks is
left."""


class DenseStore:
    """Keys and values in the model's dtype, as many slots for every KV head of a layer.

    Args:
        capacities: slots per KV head of each layer, ``C_ℓ``.
        rows: batch × KV heads.
        widths: head dimension of keys and of values.
        parts: optional initial contents: a list of all layers' keys ``[rows, n, d]`` and a list of their values. The
            lists are emptied as their tensors are copied, and keys are copied before memory for values is allocated, so
            that little exists twice.
    """

    quantised: ClassVar[bool] = False
    """Whether numbers are stored in fewer bits than the model's dtype has."""

    def __init__(
        self,
        capacities: Sequence[int],
        rows: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        parts: Sequence[list[Tensor]] | None = None,
    ) -> None:
        self._parts = parts or ([], [])
        self.capacities, self.rows, self.widths, self.dtype, self.device = list(capacities), rows, widths, dtype, device
        self.offsets = [rows * sum(self.capacities[:i]) for i in range(len(self.capacities) + 1)]
        starts = torch.tensor(self.offsets[:-1], device=device)[:, None]
        self.ends = torch.tensor(self.capacities, device=device)[:, None].expand(-1, rows).contiguous()
        """The slot behind the last one of each layer, sequence and head, ``[layers, rows]``."""
        self.begins = torch.zeros_like(self.ends)
        """The first slot of each layer, sequence and head, ``[layers, rows]``."""
        self.base = starts + self.ends * torch.arange(rows, device=device)
        """Row index of slot 0 of each layer, sequence and head, ``[layers, rows]``."""
        self._allocate()

    @property
    def slots(self) -> int:
        """Number of slots of all layers, sequences and heads."""
        return self.offsets[-1]

    def _allocate(self) -> None:
        self.key_rows, self.value_rows = map(self._rows, self.widths, self._parts)

    def _rows(self, width: int, parts: list[Tensor]) -> Tensor:
        flat = lasting((self.offsets[-1], width), self.dtype, self.device, huge=True)
        for layer in range(len(parts)):
            part = parts.pop(0)
            self._view(flat, layer)[:, : part.shape[1]] = part
        return flat

    def keys(self, layer: int) -> Tensor:
        """Keys of a layer, ``[rows, C_ℓ, d]``, a view."""
        return self._view(self.key_rows, layer)

    def values(self, layer: int) -> Tensor:
        """Values of a layer, ``[rows, C_ℓ, d_v]``, a view."""
        return self._view(self.value_rows, layer)

    def write(self, layer: int, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Overwrites the rows ``index`` (any shape ``[…]``) of a layer with keys and values ``[…, d]``."""
        flat = index.reshape(-1)
        self.key_rows.index_copy_(0, flat, keys.reshape(-1, self.widths[0]))
        self.value_rows.index_copy_(0, flat, values.reshape(-1, self.widths[1]))

    def write_keys(self, index: Tensor, keys: Tensor) -> None:
        """Overwrites keys only."""
        self.key_rows.index_copy_(0, index.reshape(-1), keys.reshape(-1, self.widths[0]))

    def write_values(self, index: Tensor, values: Tensor) -> None:
        """Overwrites values only."""
        self.value_rows.index_copy_(0, index.reshape(-1), values.reshape(-1, self.widths[1]))

    def read_keys(self, index: Tensor) -> Tensor:
        """Keys of the rows ``index``, ``[…, d]``, a copy."""
        return self.key_rows.index_select(0, index.reshape(-1)).view(*index.shape, -1)

    def read_values(self, index: Tensor) -> Tensor:
        """Values of the rows ``index``, ``[…, d_v]``, a copy."""
        return self.value_rows.index_select(0, index.reshape(-1)).view(*index.shape, -1)

    def fill(self, layer: int, keys: Tensor, values: Tensor, real: Tensor | None = None) -> None:
        """Writes ``[rows, n, d]`` to the first ``n`` slots of a layer; ``real`` ``[rows, n]`` marks those that hold an
        entry."""
        self.keys(layer)[:, : keys.shape[1]] = keys
        self.values(layer)[:, : values.shape[1]] = values

    def repeat(self, filled: Sequence[int], tokens: int) -> None:
        """Fills ``tokens`` slots after the first ``filled`` ones of each layer with copies of them, as placeholders."""
        for layer, count in enumerate(filled):
            for held in (self.keys(layer), self.values(layer)):
                for start in range(count, count + tokens, count):
                    size = min(count, count + tokens - start)
                    held[:, start : start + size] = held[:, :size]

    def work(self) -> list[Tensor]:
        """Work buffers that are needed besides the storage."""
        return []

    @property
    def bytes(self) -> int:
        """Bytes of storage."""
        return self.key_rows.untyped_storage().nbytes() + self.value_rows.untyped_storage().nbytes()

    def extended(self, slots: int) -> DenseStore:
        """A store with ``slots`` more slots in every layer and the same contents."""
        larger = type(self)([c + slots for c in self.capacities], self.rows, self.widths, self.dtype, self.device)
        for layer in range(len(self.capacities)):
            larger.fill(layer, self.keys(layer), self.values(layer))
        return larger

    def selected(self, rows: Tensor) -> DenseStore:
        """A store with copies of the rows ``rows``, int64 ``[n]``, of this one; an index may occur twice."""
        found = type(self)(self.capacities, rows.numel(), self.widths, self.dtype, self.device)
        for layer in range(len(self.capacities)):
            found.fill(layer, self.keys(layer)[rows], self.values(layer)[rows])
        return found

    def snapshot(self) -> tuple[Any, ...]:
        """A copy of the contents, for :meth:`restore`."""
        return self.key_rows.clone(), self.value_rows.clone()

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Copies the contents saved by :meth:`snapshot` back, in place."""
        self.key_rows.copy_(saved[0])
        self.value_rows.copy_(saved[1])

    def _view(self, flat: Tensor, layer: int) -> Tensor:
        run = flat[self.offsets[layer] : self.offsets[layer + 1]]
        return run.view(self.rows, self.capacities[layer], flat.shape[1])
