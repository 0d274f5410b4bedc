"""Other libraries' full caches in the same measurement loop, which ``full`` should not be slower than.

``hf-dynamic`` and ``hf-static`` are transformers' own. ``sdpa-static`` is a straightforward hand-written one: torch's
SDPA over the filled part of a preallocated cache; transformers' static cache attends to all of it with a mask.
``hf-quantized`` is transformers' quantised cache (on optimum-quanto), for comparison with ``quant``.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from d2obench.cache.session import Footprint, Session
from d2obench.errors import ModelError
from d2obench.models import LoadedModel
from d2obench.policies.yardsticks import HfQuantized, Yardstick
from d2obench.suite.grammar import Budget

PATHS = {
    "hf-dynamic": "transformers' DynamicCache",
    "hf-static": "transformers' StaticCache",
    "sdpa-static": "a preallocated cache",
    "hf-quantized": "transformers' QuantizedCache",
}
"""The cache named in the decode path of each yardstick."""


class FilledLayer(StaticLayer):
    """A preallocated layer that returns only its filled part; the host knows its length."""

    filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes ``[B, H, n, d]`` after the filled part; returns views of everything that is filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the next attention sees, and where they begin."""
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.filled


class LibrarySession(Session):
    """A session on one of transformers' full caches.

    Args:
        asked: the yardstick, which says which cache.
        options: as in :class:`Session`.
    """

    parts: ClassVar[tuple[str, ...]] = ("keys", "values")
    """Attribute names under which a layer of the cache holds tensors."""

    def __init__(self, loaded: LoadedModel, asked: Yardstick, budget: Budget | str | None, **options: Any) -> None:
        super().__init__(loaded, None, budget, **options)
        self.asked = asked

    def compress(self) -> None:
        """Compresses nothing; decoding begins."""
        self._check_begun("compress")
        self.mark("decode")

    @torch.inference_mode()
    def skip_to(self, tokens: int) -> None:
        """See :meth:`Session.skip_to`."""
        self._check_begun("skip_to")
        skip(self.cache, tokens)
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, tokens), value=1)
        self._positions += tokens

    @torch.inference_mode()
    def snapshot(self, decode_only: bool = False) -> Any:
        """The present state of the cache, to which :meth:`restore` can return any number of times.

        Keys and values are not copied: a growing cache makes new tensors, and a preallocated one only writes after its
        filled part, so that earlier contents do not change.

        Raises:
            ModelError: a layer with a sliding window, whose entries move.
        """
        self._check_begun("snapshot")
        for layer in self.cache.layers:
            if type(layer) not in (DynamicLayer, StaticLayer, FilledLayer):
                raise ModelError(f"a library cache with a {type(layer).__name__} can't go back to an earlier step")
        return [_standing(layer) for layer in self.cache.layers], self._positions.clone(), self._mask

    @torch.inference_mode()
    def restore(self, saved: Any) -> None:
        """Brings back a :meth:`snapshot` of this session."""
        for layer, held in zip(self.cache.layers, saved[0], strict=True):
            vars(layer).update({name: _own(name, value) for name, value in held.items()})
        self._positions, self._mask = saved[1].clone(), saved[2]

    @staticmethod
    def ready(asked: Yardstick) -> None:
        """Raises a UsageError if something that the session needs is missing."""
        asked.installed()

    def _footprint(self) -> Footprint:
        size = self._bytes()
        tokens = float(self.cache.get_seq_length())
        rows = [[tokens] * len(self._lengths) for _ in self.cache.layers]
        kept = [[float(length) for length in self._lengths] for _ in self.cache.layers]
        none = [0] * len(kept)
        return Footprint(size, size, 0, self._lengths, None, kept, rows, 1.0, none, none)

    @property
    def _masks_steps(self) -> bool:
        return True

    def _forked(self, sequences: Tensor) -> Any:
        found = copy.deepcopy(self.cache)
        found.reorder_cache(sequences.to(self._device))
        return found

    def _decode_path(self) -> str:
        path = PATHS.get(self.asked.name, "the library")
        return f"{path}, {self.loaded.model.config._attn_implementation} attention of PyTorch"

    def _bytes(self) -> int:
        """Storage of keys and values now."""
        return sum(_storage(getattr(layer, name, None)) for layer in self.cache.layers for name in self.parts)

    def _new_cache(self, longest: int) -> Any:
        return library_cache(self.asked.name, self.loaded.model, longest + self.max_new)


def _standing(layer: Any) -> dict[str, Any]:
    """The tensors of a layer and how much of them is filled."""
    return {name: _own(name, value) for name, value in vars(layer).items()}


def _own(name: str, value: Any) -> Any:
    """Copies a counter that is modified in place; returns keys and values themselves."""
    return value.clone() if isinstance(value, Tensor) and name not in LibrarySession.parts else value


def library_cache(name: str, model: PreTrainedModel, most: int) -> Cache:
    """The cache of a yardstick for ``most`` tokens."""
    if name == "hf-dynamic":
        return DynamicCache(config=model.config)
    cache = StaticCache(config=model.config, max_cache_len=most)
    if name == "sdpa-static":
        cache.layers = [FilledLayer(most) if type(layer) is StaticLayer else layer for layer in cache.layers]
    return cache


def skip(cache: Cache, tokens: int) -> None:
    """Advances as if ``tokens`` more had been decoded, by copies of present entries (sampled decoding).

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


class QuantisedSession(LibrarySession):
    """Keeps everything and quantises it to ``bits``: the prompt at once, decoded tokens every ``residual`` tokens.

    Raises:
        UsageError: optimum-quanto is not installed.
    """

    parts = ("_quantized_keys", "_quantized_values", "keys", "values")

    def __init__(self, loaded: LoadedModel, asked: HfQuantized, budget: Budget | str | None, **options: Any) -> None:
        super().__init__(loaded, asked, budget, **options)
        asked.installed()
        self._prompt_bytes = 0
        if self._device.type == "cpu":
            _compile_quanto()

    @torch.inference_mode()
    def compress(self) -> None:
        """Does not compress, since the prompt was quantised when it was read; records its size."""
        super().compress()
        self._prompt_bytes = self._bytes()

    @torch.inference_mode()
    def skip_to(self, tokens: int) -> None:
        """Not supported: placeholders would have to be quantised again."""
        raise ModelError("a quantised library cache can't be moved on", remedy="use --decode full")

    @torch.inference_mode()
    def footprint(self) -> Footprint:
        """As for any full cache, with the bytes of packed numbers, scales and zero points, and of the unquantised
        tokens."""
        size = self._bytes()
        return dataclasses.replace(super().footprint(), kv_bytes=size, prompt_kv_bytes=self._prompt_bytes or size)

    @torch.inference_mode()
    def snapshot(self, decode_only: bool = False) -> Any:
        """References to the tensors: its layers never modify a tensor in place, so no copy is needed."""
        return [dict(vars(layer)) for layer in self.cache.layers], self._positions.clone(), self._mask

    @torch.inference_mode()
    def restore(self, saved: Any) -> None:
        """Brings back a :meth:`snapshot` of this session."""
        for layer, held in zip(self.cache.layers, saved[0], strict=True):
            vars(layer).clear()
            vars(layer).update(held)
        self._positions, self._mask = saved[1].clone(), saved[2]

    def _forked(self, sequences: Tensor) -> Any:
        raise ModelError(
            "a quantised library cache can't be copied for several questions",
            remedy="use --set quality.batch=1 with one question a context, or query=seen",
        )

    def _new_cache(self, longest: int) -> Any:
        from transformers.cache_utils import QuantizedCache

        asked = self.asked
        assert isinstance(asked, HfQuantized)
        return QuantizedCache(
            backend="quanto",
            config=self.loaded.model.config,
            nbits=asked.bits,
            q_group_size=asked.group,
            residual_length=asked.residual,
        )


def _compile_quanto() -> None:
    """Lets optimum-quanto compile its CPU kernel before anything is timed; otherwise it would do so at its first use.

    Raises:
        ModelError: compilation fails; gives the reason.
    """
    from optimum.quanto.library.extensions import get_extension

    try:
        get_extension("quanto_cpp").lib  # noqa: B018 - compiles and loads
    except (OSError, RuntimeError, ImportError) as problem:
        raise ModelError(
            "optimum-quanto can't compile its kernel",
            why=str(problem).strip().splitlines()[0][:300],
            remedy="install a C++ compiler and ninja",
        ) from None


def _storage(tensor: Any) -> int:
    """Bytes of a tensor's storage; for a tensor subclass made of other tensors, the sum of theirs."""
    if not isinstance(tensor, Tensor):
        return 0
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if type(tensor) is Tensor or flatten is None:
        return tensor.untyped_storage().nbytes()
    return sum(_storage(getattr(tensor, name)) for name in flatten()[0])
