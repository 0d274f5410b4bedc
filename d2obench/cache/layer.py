"""One compressed layer of a policy cache, as transformers sees it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from d2obench.attention.prompt import window_sums
from d2obench.policies.base import Entries, Needs, Stats
from d2obench.policies.rotary import QueryMoments

if TYPE_CHECKING:
    from d2obench.cache.budgets import LastQueries
    from d2obench.cache.policy_cache import PolicyCache


@dataclass(frozen=True)
class Block:
    """How a block of a prompt is placed among the entries of every layer.

    Args:
        columns: number of entries that the block adds.
        before: number of padding columns before each sequence's tokens that are kept.
        padding: number of columns that are padding in all sequences and are removed.
    """

    columns: int
    before: list[int]
    padding: int = 0


class PolicyLayer(CacheLayerMixin):
    """One compressed layer; ``index`` counts compressed layers only."""

    is_sliding = False
    supports_early_init = True
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, cache: PolicyCache, index: int) -> None:
        super().__init__()
        self.index = index
        self._cache = weakref.ref(cache)
        self.moments: QueryMoments | None = None
        """Statistics of the queries of all blocks, for a policy that needs them."""
        self.scale = 1.0
        """Factor of the logits."""
        self.clear()

    def clear(self) -> None:
        """Frees the entries."""
        self.keys = self.values = None
        self.stats: Stats = {}
        self.position: Tensor | None = None
        """True position of each entry, ``[B, H, N]``; None if the entries are a prompt from its start."""
        self.starts: list[int] = []
        """Index of the first real entry of each sequence."""
        self.queries: Tensor | None = None
        """The last queries, ``[B, Hq, n, d]``, for a window that begins before the next block, and for a policy that
        needs them."""
        self.last: LastQueries | None = None
        """The last queries of the prompt with their outputs, for a policy whose budgets need them."""

    def append(self, keys: Tensor, values: Tensor, *, short_lived: bool) -> None:
        """Adds a block ``[B, H, n, d]``.

        Args:
            short_lived: the entries go before the next layer runs, so that it doesn't matter what they keep alive.
        """
        if self.keys is None:
            self.keys, self.values = (
                (keys, values) if short_lived else (self.cache.keep_entries(self, held) for held in (keys, values))
            )
            return
        assert self.values is not None
        self.keys, self.values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)

    def place(self, block: Block, lengths: Tensor) -> None:
        """Assigns positions to the entries of the block that was appended last.

        Args:
            block: how the block is placed.
            lengths: int64 ``[B]``, tokens of each sequence up to the block's end.
        """
        assert self.keys is not None and self.values is not None
        # 1. Padding of a block before a sequence's first token moves that token to the right.
        self.starts = [
            start + padded for start, padded in zip(self.starts or [0] * len(block.before), block.before, strict=True)
        ]
        # 2. If positions are stored, the block's tokens get the last positions of each sequence.
        if self.position is not None:
            new = block.columns + block.padding
            last = lengths[:, None, None].to(self.keys.device) - new + torch.arange(new, device=self.keys.device)
            self.position = torch.cat((self.position, last.expand(-1, self.keys.shape[1], -1)), 2)
        # 3. Remove columns that are padding in all sequences; they would only occupy slots.
        self._trim(block.padding)

    def _trim(self, padding: int) -> None:
        """Removes the first ``padding`` entries."""
        if not padding:
            return
        self.starts = [start - padding for start in self.starts]
        for name in ("keys", "values", "position"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[:, :, padding:])
        self.stats = {name: held[:, :, padding:] for name, held in self.stats.items()}

    def remember(self, query: Tensor, count: int) -> None:
        """Stores the last ``count`` queries of the prompt until the next block arrives."""
        every = query if self.queries is None else torch.cat((self.queries, query), 2)
        self.queries = every[:, :, -count:].clone()

    def begin_from(self, read: PolicyLayer, needs: Needs) -> None:
        """Takes over the entries of a layer that has read a prompt in one block, which nothing changes, and those of
        its statistics that ``needs`` names."""
        assert read.keys is not None
        self.__dict__.update({name: held for name, held in vars(read).items() if name not in ("_cache", "index")})
        self.stats = {name: read.stats[name] for name in needs.sums}
        if needs.window:
            assert read.queries is not None
            self.stats["window"] = window_sums(read.queries, read.keys, read.scale, read.starts, needs.window)
        self.queries = None if not needs.queries or read.queries is None else read.queries[:, :, -needs.queries :]
        self.last = read.last if needs.errors else None

    def entries(self, layers: int, lengths: Tensor, seed: int, first_head: int) -> Entries:
        """The layer's entries as a policy sees them; arguments as in :class:`Entries`. What the policy does to their
        statistics leaves the layer's own as they are."""
        assert self.keys is not None and self.values is not None
        device, cache = self.keys.device, self.cache
        rotary = None if cache.rotary is None else cache.rotary.to(device)
        projection = cache.output_projection(self) if cache.policy.needs.projection else None
        return Entries(
            self.index, layers, self.keys, self.values, self.positions(), lengths.to(device), dict(self.stats), seed,
            first_head, self.queries, self.scale, self.moments, rotary, projection,
        )  # fmt: skip

    def logit_bias(self, new: int) -> Tensor | None:
        """What attention adds to the logits of the entries before the last ``new`` ones, float32 ``[B, H, n]``: biases
        of a merge by mass, and −inf for padding where the KV heads of a sequence hold different numbers of entries."""
        bias = self.stats.get("bias")
        if self.position is None or not self.cache.policy.ragged:
            return bias
        position = self.position[:, :, : self.position.shape[2] - new]
        bias = torch.zeros(position.shape, device=position.device) if bias is None else bias
        return bias.masked_fill(position < 0, -torch.inf)

    def positions(self) -> Tensor:
        """True position of each entry, ``[B, H, N]``, negative for padding."""
        if self.position is not None:
            return self.position
        assert self.keys is not None
        batch, heads, total = self.keys.shape[:3]
        starts = self.cache.on_device(self.starts, self.keys.device)
        return torch.arange(total, device=self.keys.device).expand(batch, heads, -1) - starts[:, None, None]

    @property
    def cache(self) -> PolicyCache:
        """The cache this layer is part of."""
        cache = self._cache()
        assert cache is not None
        return cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Passes the new keys and values ``[B, H, n, d]`` to the cache; returns tensors that lead the attention
        function back to this layer."""
        return self.cache.receive(self, key_states, value_states)

    def attend(self, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Attention of the queries ``[B, Hq, n, d]`` over everything the layer holds, ``[B, n, Hq, d_v]``."""
        return self.cache.attend(self, query, scale, mask)

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds anything."""
        return self.cache.seen > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Ignored: transformers' base class sets it, but it follows from what the cache holds."""

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be removed again, see :meth:`PolicyCache.crop`."""
        return self.cache.is_croppable

    def select(self, sequences: Tensor) -> None:
        """The entries of other sequences, see :meth:`PolicyCache.batch_select_indices`."""
        for name in ("keys", "values", "position", "queries"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[sequences.to(held.device)])
        self.stats = {name: held[sequences.to(held.device)] for name, held in self.stats.items()}
        if self.last is not None:
            self.last = self.last.select(sequences.to(self.last.queries.device))
        if self.moments is not None:
            self.moments = self.moments.select(sequences.to(self.moments.count.device))
        self.starts = [self.starts[i] for i in sequences.tolist()] if self.starts else []
        self._trim(min(self.starts, default=0))

    def crop(self, tokens: int) -> None:
        """Removes the last ``tokens`` entries."""
        for name in ("keys", "values", "position"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[:, :, :-tokens])
        if self.keys is not None:
            self.starts = [min(start, self.keys.shape[2]) for start in self.starts]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: slots are allocated when the prompt's length is known."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The true length and offset; our attention makes its own mask."""
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens seen, including evicted ones, so that positions stay true."""
        return self.cache.seen

    def get_max_length(self) -> int:
        """−1: there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """−1; the name of :meth:`get_max_length` in transformers before 5.3."""
        return -1
