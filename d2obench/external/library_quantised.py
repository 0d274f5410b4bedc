"""transformers' own quantised cache (``QuantizedCache`` on optimum-quanto), a yardstick for ``quant``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from d2obench.attention import families
from d2obench.cache.session import Footprint, Session
from d2obench.errors import ModelError
from d2obench.policies import other
from d2obench.policies.others import HfQuantized

PARTS = ("_quantized_keys", "_quantized_values", "keys", "values")


class QuantisedSession(Session):
    """Everything is kept: the prompt and, every ``residual`` tokens, what was decoded since, in ``bits``.

    Raises:
        UsageError: optimum-quanto is not installed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asked = other(str(self.yardstick))
        assert isinstance(self._asked, HfQuantized)
        self._asked.installed()
        self._prompt_bytes = 0
        if self._device.type == "cpu":
            _compiled()

    @staticmethod
    def ready(asked: HfQuantized) -> None:
        """Raises a UsageError where optimum-quanto is missing."""
        asked.installed()

    @torch.inference_mode()
    def compress(self) -> None:
        """The prompt was quantised when it was read; remembers how much it takes."""
        super().compress()
        self._prompt_bytes = self._held()

    @torch.inference_mode()
    def skip_to(self, tokens: int) -> None:
        """Stand-ins would have to be quantised anew: not offered."""
        raise ModelError("a quantised library cache can't be moved on", remedy="use --decode full")

    @torch.inference_mode()
    def footprint(self) -> Footprint:
        """As of any full cache, with the bytes of packed numbers, scales and shifts, and of what is still in full."""
        size = self._held()
        return dataclasses.replace(super().footprint(), kv_bytes=size, prompt_kv_bytes=self._prompt_bytes or size)

    @torch.inference_mode()
    def snapshot(self) -> Any:
        """Its layers never write into a tensor they hold, so that holding the tensors is enough."""
        return [dict(vars(layer)) for layer in self.cache.layers], self._positions.clone(), self._mask

    @torch.inference_mode()
    def restore(self, saved: Any) -> None:
        """Brings back a :meth:`snapshot` of this session."""
        for layer, held in zip(self.cache.layers, saved[0], strict=True):
            vars(layer).clear()
            vars(layer).update(held)
        self._positions, self._mask = saved[1].clone(), saved[2]

    def _held(self) -> int:
        return sum(_bytes(getattr(layer, name, None)) for layer in self.cache.layers for name in PARTS)

    def _new_cache(self, longest: int) -> Any:
        from transformers.cache_utils import QuantizedCache

        asked = self._asked
        assert isinstance(asked, HfQuantized)
        families.restore(self.loaded.model)
        return QuantizedCache(
            backend="quanto",
            config=self.loaded.model.config,
            nbits=asked.bits,
            q_group_size=asked.group,
            residual_length=asked.residual,
        )


def _compiled() -> None:
    """Has optimum-quanto compile its CPU kernel, which it does at the first use on a machine, before anything is timed.

    Raises:
        ModelError: it can't; its reason.
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


def _bytes(tensor: Any) -> int:
    """Storage of a tensor; of a tensor made of others, theirs."""
    if not isinstance(tensor, Tensor):
        return 0
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if type(tensor) is Tensor or flatten is None:
        return tensor.untyped_storage().nbytes()
    return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
