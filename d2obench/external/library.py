"""Full caches that are not ours, measured on the same loop: the yardsticks ``full`` has to be as fast as.

``hf-dynamic`` and ``hf-static`` are transformers' own. ``sdpa-static`` is what one would write by hand: torch's SDPA
over a preallocated cache, up to where it is filled; transformers' static cache attends to all of it under a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from d2obench.errors import ModelError

PATHS = {
    "hf-dynamic": "transformers' DynamicCache",
    "hf-static": "transformers' StaticCache",
    "sdpa-static": "a preallocated cache",
    "hf-quantized": "transformers' QuantizedCache",
}
"""Whose cache a yardstick's decode step works on."""


class FilledLayer(StaticLayer):
    """A preallocated layer that hands out what it holds and no more; its length is known to the host."""

    filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes ``[B, H, n, d]`` behind what is there; returns views of all that is filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys the next attention sees, and where they begin."""
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.filled


def library_cache(name: str, model: PreTrainedModel, most: int) -> Cache:
    """The cache of a yardstick for ``most`` tokens."""
    if name == "hf-dynamic":
        return DynamicCache(config=model.config)
    cache = StaticCache(config=model.config, max_cache_len=most)
    if name == "sdpa-static":
        cache.layers = [FilledLayer(most) if type(layer) is StaticLayer else layer for layer in cache.layers]
    return cache


def decode_path(name: str, model: PreTrainedModel) -> str:
    """What executes a yardstick's decode step, in words."""
    return (
        f"{PATHS.get(name.partition('(')[0], 'the library')}, {model.config._attn_implementation} attention of PyTorch"
    )


def skip(cache: Cache, tokens: int) -> None:
    """Moves on as if ``tokens`` more had been decoded, with copies of what is held (sampled decode).

    Raises:
        ModelError: a layer with a sliding window.
    """
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, StaticLayer, FilledLayer):
            raise ModelError(
                f"a library cache with a {type(layer).__name__} can't be moved on", remedy="use --decode full"
            )
        held = int(layer.get_seq_length())
        for name in ("keys", "values"):
            entries: Tensor = getattr(layer, name)
            copies = entries[:, :, torch.arange(tokens, device=entries.device) % held]
            if isinstance(layer, StaticLayer):
                entries[:, :, held : held + tokens] = copies
            else:
                setattr(layer, name, torch.cat((entries, copies), 2))
        if isinstance(layer, FilledLayer):
            layer.filled += tokens
        elif isinstance(layer, StaticLayer):
            layer.cumulative_length.add_(tokens)
