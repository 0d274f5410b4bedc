"""Slots for KV heads that hold different numbers of entries: each head has as many as it needs, and no more.

Design. As in :class:`d2obench.slots.dense.DenseStore`, all layers share one flat tensor of keys and one of values, and
slot s of a head is the row ``base + s`` of both. Here a head owns the slots from its ``begins`` up to its ``ends``
only, right behind those of the head before it. So an operation on one slot per head is the same as in a dense store,
and a compiled loop or kernel reads exactly what a head holds. What policies know about a slot (its position, its score)
is stored for all C slots of every head; slots that a head does not own are ``CLOSED``.

Decoded tokens are appended in a growing cache, in the same slot of every head. Its heads therefore end together, and a
head with fewer entries begins later. In a bounded cache every head begins at slot 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2obench.cpu.memory import lasting
from d2obench.slots.dense import CLOSED, DenseStore
from d2obench.slots.spans import Spans


class RaggedStore(DenseStore):
    """Keys and values in the model's dtype, with the interface of :class:`DenseStore`.

    PyTorch operators need rectangles: :meth:`keys` and :meth:`values` copy a layer into one, in which the slots that a
    head does not own repeat one that it does; attention must not see them.

    Args:
        begins: the first slot of each layer, sequence and head, int64 ``[layers, rows]``.
        ends: the slot behind the last one, which is larger.
        widths: head dimension of keys and of values.
        parts: optional initial contents, see :class:`DenseStore`: keys and values ``[n, d]`` of each layer, those of
            the slots in ``filled``, in the order of rows and of slots.
        filled: bool ``[layers, rows, C]``.
    """

    def __init__(
        self,
        begins: Tensor,
        ends: Tensor,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        parts: Sequence[list[Tensor]] | None = None,
        filled: Tensor | None = None,
    ) -> None:
        self.begins, self.ends, self.widths, self.dtype, self.device = begins, ends, widths, dtype, device
        self.places = Spans(begins, ends)
        self.rows, self.capacities, self.base = begins.shape[1], self.places.widest, self.places.base
        self.key_rows, self.value_rows = (
            self._flat(width, part, filled) for width, part in zip(widths, parts or ([], []), strict=True)
        )

    @classmethod
    def of_positions(
        cls, position: Tensor, widths: tuple[int, int], dtype: torch.dtype, parts: Sequence[list[Tensor]]
    ) -> RaggedStore:
        """A store with the slots that are not CLOSED in ``position`` ``[layers, rows, C]``; ``parts`` are the contents
        of those that have a position."""
        return cls(*owned(position), widths, dtype, position.device, parts, position >= 0)

    @property
    def slots(self) -> int:
        """Number of slots of all layers, sequences and heads."""
        return self.places.total

    def keys(self, layer: int) -> Tensor:
        """Keys of a layer, ``[rows, C_ℓ, d]``, a copy."""
        return self.places.of(self.key_rows, layer)

    def values(self, layer: int) -> Tensor:
        """Values of a layer, ``[rows, C_ℓ, d_v]``, a copy."""
        return self.places.of(self.value_rows, layer)

    def fill(self, layer: int, keys: Tensor, values: Tensor, real: Tensor | None = None) -> None:
        """Writes those of ``[rows, n, d]``, the first ``n`` slots of every head, that the heads own."""
        self.places.put(self.key_rows, layer, 0, keys)
        self.places.put(self.value_rows, layer, 0, values)

    def repeat(self, filled: Sequence[int], tokens: int) -> None:
        """See :meth:`DenseStore.repeat`."""
        for layer, count in enumerate(filled):
            begin, added = self.begins[layer, :, None], torch.arange(tokens, device=self.device)
            source = self.base[layer, :, None] + begin + added % (count - begin).clamp_min(1)
            index = self.base[layer, :, None] + count + added
            self.write(layer, index, self.read_keys(source), self.read_values(source))

    def extended(self, slots: int) -> RaggedStore:
        """A store with ``slots`` more slots for every head and the same contents."""
        return self._copied(self.begins, self.ends + slots, torch.arange(self.rows, device=self.device))

    def selected(self, rows: Tensor) -> RaggedStore:
        """See :meth:`DenseStore.selected`."""
        return self._copied(self.begins[:, rows], self.ends[:, rows], rows)

    def _copied(self, begins: Tensor, ends: Tensor, rows: Tensor) -> RaggedStore:
        found = RaggedStore(begins, ends, self.widths, self.dtype, self.device)
        for layer in range(len(self.capacities)):
            found.fill(layer, self.keys(layer)[rows], self.values(layer)[rows])
        return found

    def _flat(self, width: int, parts: list[Tensor], filled: Tensor | None) -> Tensor:
        flat = lasting((self.places.total, width), self.dtype, self.device, huge=True)
        for layer in range(len(parts)):
            assert filled is not None
            slots = torch.arange(filled.shape[2], device=self.device)
            index = (self.base[layer, :, None] + slots)[filled[layer]]
            flat.index_copy_(0, index, parts.pop(0))
        return flat


def owned(position: Tensor) -> tuple[Tensor, Tensor]:
    """The first slot of every row that is not CLOSED in ``position`` ``[layers, rows, C]``, and the slot behind the
    last one; they are neighbours in every row."""
    mine = position != CLOSED
    begins = mine.int().argmax(-1)
    return begins, begins + mine.sum(-1)
