"""Decode steps that hold everything and read some pages of it (``d2obench.policies.quest`` states the rule)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2obench.decode.reference import Backend
from d2obench.policies.rules import PagedReads
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


class Pages:
    """Bounds of the keys of every page of a growing cache.

    Args:
        state: the cache; its entries are stored in the order of their positions, without gaps.
        spec: how tokens are divided, and what is always read.
        most: tokens that a step may read, int64 ``[rows]``.

    Attributes:
        low, high: lowest and highest number of each channel, in the keys' dtype, ``[layers, rows, pages, d]``; +inf and
            −inf for pages without tokens.
    """

    def __init__(self, state: DecodeState, spec: PagedReads, most: Tensor) -> None:
        self.state, self.spec, self.most = state, spec, most
        self.count = (most // spec.size).clamp_min(1)
        """Pages that a step reads, ``[rows]``."""
        self.widest = int(self.count.max())
        filled = torch.tensor(state.prompts, device=state.now.device)[:, None] + state.added
        self.first = filled - (state.now.long() + 1)
        """The slot of position 0 of each layer and row; it may be negative only where a row has no tokens."""
        self.refresh()

    def refresh(self) -> None:
        """Computes all bounds from the slots."""
        state, size, store = self.state, self.spec.size, self.state.store
        layers, rows, width = state.position.shape
        shape = (layers, rows, -(-width // size), store.widths[0])
        self.low = torch.full(shape, torch.inf, dtype=store.dtype, device=state.now.device)
        self.high = torch.full_like(self.low, -torch.inf)
        for layer, prompt in enumerate(state.prompts):
            keys = store.keys(layer)[:, : prompt + state.added]
            position = torch.arange(keys.shape[1], device=keys.device) - self.first[layer][:, None]
            real = (position >= 0)[..., None]
            page = (position.clamp_min(0) // size)[..., None].expand_as(keys)
            self.low[layer].scatter_reduce_(1, page, keys.masked_fill(~real, torch.inf), "amin")
            self.high[layer].scatter_reduce_(1, page, keys.masked_fill(~real, -torch.inf), "amax")

    def write(self, layer: int, keys: Tensor) -> None:
        """Takes the new token's keys ``[B, H, 1, d]`` into the bounds of its page."""
        new = keys.reshape(len(self.count), 1, -1)
        at = ((self.state.now.long() + 1) // self.spec.size)[:, None, None].expand_as(new)
        self.low[layer].scatter_reduce_(1, at, new, "amin")
        self.high[layer].scatter_reduce_(1, at, new, "amax")

    def chosen(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The slots that a step reads, int64 ``[rows, n]``, and which of them hold a token that it may read.

        Args:
            queries: ``[rows, G, d]``.
        """
        now, size = self.state.now.long() + 1, self.spec.size
        queries, low, high = queries.float(), self.low[layer].float(), self.high[layer].float()
        # 1. the bound of each page: a positive channel meets the highest keys, a negative one the lowest
        bound = queries.clamp_min(0) @ high.transpose(1, 2) + queries.clamp_max(0) @ low.transpose(1, 2)
        page, newest = torch.arange(bound.shape[2], device=now.device), (now // size)[:, None]
        recent = page > newest - self.count[:, None].clamp_max(self.spec.recent)
        bound = bound.mean(1).masked_fill(recent, torch.inf).masked_fill(page > newest, -torch.inf)
        # 2. the pages of the highest bounds, the earlier of equals, and their tokens
        found = bound.sort(descending=True, stable=True).indices[:, : self.widest]
        read = torch.arange(found.shape[1], device=now.device) < self.count[:, None]
        position = found[..., None] * size + torch.arange(size, device=now.device)
        real = read[..., None] & (position <= now[:, None, None])
        slots = (position + self.first[layer][:, None, None]).clamp_(0, self.state.store.capacities[layer] - 1)
        return slots.flatten(1), real.flatten(1)

    def reads_all(self, layer: int) -> bool:
        """Whether a layer is one of those that read everything."""
        return self.state.first_layer + layer < self.spec.dense

    @property
    def bytes(self) -> int:
        """Bytes of the bounds."""
        return self.low.nbytes + self.high.nbytes

    @property
    def read_bytes(self) -> int:
        """Bytes of keys, values and bounds that the last step has read."""
        state, size, store = self.state, self.spec.size, self.state.store
        token, bounds = store.bytes / store.slots, 2 * store.widths[0] * self.low.element_size()
        held = state.now.long() + 1
        there = (held + size - 1) // size
        # the newest page is read, which may not be full; all others are
        tokens = (torch.minimum(self.count, there) - 1) * size + (held - 1) % size + 1
        dense = sum(self.reads_all(layer) for layer in range(len(state.prompts)))
        some = len(state.prompts) - dense
        return round(int(held.sum()) * dense * token + some * (int(tokens.sum()) * token + int(there.sum()) * bounds))

    def tensors(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return [self.low, self.high]

    def selected(self, state: DecodeState, rows: Tensor) -> Pages:
        """Those of another state that has copies of the rows ``rows``."""
        return Pages(state, self.spec, self.most[rows])


class ReadsPages(Backend):
    """Executes decode steps of a state with :class:`Pages`."""

    def __init__(self, state: DecodeState) -> None:
        super().__init__(state, "it reads chosen pages")

    @property
    def needs_buffers(self) -> bool:
        pages = self.state.pages
        return pages is not None and pages.reads_all(0)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        super().write(layer, keys, values)
        assert self.state.pages is not None
        self.state.pages.write(layer, keys)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        state, pages = self.state, self.state.pages
        assert pages is not None
        if pages.reads_all(layer):
            return super().attend(layer, query, scale)
        queries = query.reshape(state.store.rows, state.group, -1)
        with span("page bounds"):
            slots, real = pages.chosen(layer, queries)
        with span("decode attention"):
            at = (state.store.base[layer][:, None] + slots) if not state.store.quantised else slots
            keys, values = self._read(layer, at)
            logits = (queries @ keys.transpose(1, 2)).float() * scale
            weights = torch.softmax(logits.masked_fill_(~real[:, None], -torch.inf), -1)
            mixed = weights.to(values.dtype) @ values
        return mixed.view(query.shape[0], 1, query.shape[1], -1)

    def _read(self, layer: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the chosen slots, ``[rows, n, d]``; a quantised cache is dequantised as a whole."""
        store = self.state.store
        if not store.quantised:
            return store.read_keys(at), store.read_values(at)
        keys, values = store.keys(layer), store.values(layer)
        return tuple(held.gather(1, at[..., None].expand(-1, -1, held.shape[2])) for held in (keys, values))  # type: ignore[return-value]
