"""Where the slots of each layer, sequence and KV head lie in a flat tensor, if heads have unequal numbers of them."""

from __future__ import annotations

import torch
from torch import Tensor


class Spans:
    """Spans of a flat tensor, one for each layer and row, right behind one another. A row is a KV head of a sequence.

    Args:
        begins: the first slot of each layer and row, int64 ``[layers, rows]``.
        ends: the slot behind the last one, which is larger.

    Attributes:
        base: where slot 0 would lie, ``[layers, rows]``; slot s lies at ``base + s``.
        total: number of all slots.
        widest: the largest end of each layer.
    """

    def __init__(self, begins: Tensor, ends: Tensor) -> None:
        self.begins, self.ends = begins, ends
        sizes = (ends - begins).flatten()
        behind = sizes.cumsum(0)
        self.base, self.total = (behind - sizes).view_as(begins) - begins, int(sizes.sum())
        self.widest: list[int] = ends.amax(1).tolist()
        self._behind, self._firsts = behind, self.base[:, 0].tolist()
        self._even = bool((begins == 0).all() and (ends == ends[:, :1]).all())

    def of(self, flat: Tensor, layer: int) -> Tensor:
        """The slots of a layer, ``[rows, C, …]`` of ``flat`` ``[total, …]``, where C is the largest end. Those that a
        row does not own repeat one that it does. A view if all rows own the same ones, otherwise a copy."""
        rows, widest = self.base.shape[1], self.widest[layer]
        if self._even:
            first = self._firsts[layer]
            return torch.unflatten(flat[first : first + rows * widest], 0, (rows, widest))
        slots = torch.arange(widest, device=flat.device)
        owned = torch.minimum(torch.maximum(slots, self.begins[layer, :, None]), self.ends[layer, :, None] - 1)
        found = flat.index_select(0, (self.base[layer, :, None] + owned).view(-1))
        return torch.unflatten(found, 0, (rows, widest))

    def put(self, flat: Tensor, layer: int, first: int, held: Tensor) -> None:
        """Writes ``held`` ``[rows, n, …]`` to the slots from ``first`` on that the rows own."""
        if self._even:
            mine = self.of(flat, layer)[:, first:]
            mine[:, : held.shape[1]] = held[:, : mine.shape[1]]
            return
        slots = first + torch.arange(held.shape[1], device=flat.device)
        owned = (slots >= self.begins[layer, :, None]) & (slots < self.ends[layer, :, None])
        flat.index_copy_(0, (self.base[layer, :, None] + slots)[owned], held[owned])

    def locate(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The row, counted over all layers, and the slot in it, of places ``[n]`` in a flat tensor."""
        row = torch.bucketize(flat, self._behind, right=True)
        return row, flat - self.base.flatten()[row]
