"""One compressed layer of a policy cache, as transformers sees it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from d2obench.policies.base import Stats

if TYPE_CHECKING:
    from d2obench.cache.policy_cache import PolicyCache


class PolicyLayer(CacheLayerMixin):
    """One compressed layer; ``index`` counts compressed layers only."""

    is_sliding = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, cache: PolicyCache, index: int) -> None:
        super().__init__()
        self.index = index
        self._cache = weakref.ref(cache)
        self.clear()

    def clear(self) -> None:
        """Lets go of the entries."""
        self.keys = self.values = None
        self.stats: Stats = {}
        self.position: Tensor | None = None
        """True position of each entry, ``[B, H, N]``; None while they are those of a prompt from its start."""
        self.starts: list[int] = []
        """The first entry of each sequence."""

    def append(self, keys: Tensor, values: Tensor, before: Tensor | None, *, brief: bool) -> None:
        """Adds a block ``[B, H, n, d]``.

        Args:
            before: int64 ``[B]``, tokens of each sequence before the block; None for the first one.
            brief: the entries are gone before the next layer runs, so that it doesn't matter what they keep alive.
        """
        if self.keys is None:
            self.keys, self.values = (
                (keys, values) if brief else (self.cache.set_aside(self, held) for held in (keys, values))
            )
            return
        assert self.values is not None and before is not None
        self.keys, self.values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        if self.position is not None:
            new = before[:, None, None].to(keys.device) + torch.arange(keys.shape[2], device=keys.device)
            self.position = torch.cat((self.position, new.expand(-1, keys.shape[1], -1)), 2)

    def positions(self) -> Tensor:
        """True position of each entry, ``[B, H, N]``, negative for padding."""
        if self.position is not None:
            return self.position
        assert self.keys is not None
        batch, heads, total = self.keys.shape[:3]
        starts = torch.tensor(self.starts, device=self.keys.device)
        return torch.arange(total, device=self.keys.device).expand(batch, heads, -1) - starts[:, None, None]

    @property
    def cache(self) -> PolicyCache:
        """The cache this layer is part of."""
        cache = self._cache()
        assert cache is not None
        return cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the new keys and values ``[B, H, n, d]``; returns tensors that stand for them and lead back here."""
        return self.cache.receive(self, key_states, value_states)

    def attend(self, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Attention of ``[B, Hq, n, d]`` over what the layer holds, ``[B, n, Hq, d_v]``."""
        return self.cache.attend(self, query, scale, mask)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: slots are made when the prompt's length is known."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is ours; what transformers asks for is the true length."""
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, so that positions stay true whatever was evicted."""
        return self.cache.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, as transformers before 5.3 asks for it."""
        return -1
