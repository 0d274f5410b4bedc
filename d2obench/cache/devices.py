"""A model whose layers lie on several devices: each run of neighbouring layers keeps its slots where it lies.

Within a run everything is done for all its layers at once, as on one device; a step goes from run to run as the model
does. Layers meet in one place only, where budgets are shared out among them: on the CPU, by their statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from d2obench.cache.compress import Packing
from d2obench.cache.layer import PolicyLayer
from d2obench.decode.state import DecodeState


@dataclass(frozen=True)
class Run:
    """Compressed layers ``first`` to ``last`` (not included) on one device."""

    first: int
    last: int
    device: torch.device


def place_of(layer: torch.nn.Module) -> tuple[Any, torch.device]:
    """What tells the places of decoder layers apart, and the device they compute on."""
    device = next(layer.parameters()).device
    return device, device


def runs_of(model: Any, kinds: Sequence[int | None]) -> list[Run]:
    """The runs of compressed layers of a model; ``kinds`` as :class:`d2obench.cache.policy_cache.PolicyCache` has
    them."""
    base = model.base_model
    layers = base.layers if hasattr(base, "layers") else base.h
    places = [place_of(layer) for layer, kind in zip(layers, kinds, strict=True) if kind is None]
    found: list[Run] = []
    for (_, device), members in groupby(places):
        first = found[-1].last if found else 0
        found.append(Run(first, first + len(list(members)), device))
    return found


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: a kernel of ours is launched on that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class SplitPacking:
    """A :class:`Packing` for each run, as one."""

    def __init__(self, parts: Sequence[Packing]) -> None:
        self.parts = list(parts)
        self._of = [part for part in parts for _ in part.sizes]

    def add(self, layer: PolicyLayer) -> None:
        """Packs the next layer."""
        part = self._of[layer.index]
        with on(part.layout.device):
            part.add(layer)

    def finish(self, group: int, rotary: Tensor | None) -> SplitState:
        """The decode states of all runs."""
        states = []
        for part in self.parts:
            with on(part.layout.device):
                states.append(part.finish(group, None if rotary is None else rotary.to(part.layout.device)))
        return SplitState(states)

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """Entries merged and entries evicted in each layer."""
        merged, evicted = zip(*(part.counts for part in self.parts), strict=True)
        return [*chain(*merged)], [*chain(*evicted)]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held so far."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Stores:
    """What is asked of the slots of all runs together."""

    capacities: list[int]
    bytes: int


class SplitState:
    """A :class:`DecodeState` for each run, as one."""

    def __init__(self, parts: Sequence[DecodeState]) -> None:
        self.parts = list(parts)
        self._of = [(part, layer) for part in parts for layer in range(len(part.prompts))]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See :meth:`DecodeState.write`."""
        part, at = self._of[layer]
        with on(keys.device):
            part.write(at, keys, values)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """See :meth:`DecodeState.attend`."""
        part, at = self._of[layer]
        with on(query.device):
            return part.attend(at, query, scale)

    def advance(self) -> None:
        """Ends a step on every device; none waits for another."""
        for part in self.parts:
            with on(part.now.device):
                part.advance()

    def skip(self, tokens: int) -> None:
        """See :meth:`DecodeState.skip`."""
        for part in self.parts:
            part.skip(tokens)

    def extend(self, tokens: int) -> None:
        """See :meth:`DecodeState.extend`."""
        for part in self.parts:
            with on(part.now.device):
                part.extend(tokens)

    def tensors(self) -> list[Tensor]:
        """Every tensor beside keys and values."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def snapshot(self) -> list[Any]:
        """A copy of what decoding changes."""
        return [part.snapshot() for part in self.parts]

    def restore(self, saved: list[Any]) -> None:
        """Brings back a :meth:`snapshot`, in place."""
        for part, old in zip(self.parts, saved, strict=True):
            part.restore(old)

    def held(self) -> Tensor:
        """Entries held per layer and row, on the CPU."""
        return torch.cat([part.held().cpu() for part in self.parts])

    @property
    def now(self) -> Tensor:
        """Position of the last token of each row's sequence."""
        return self.parts[0].now

    @property
    def added(self) -> int:
        """Tokens decoded into a growing cache."""
        return self.parts[0].added

    @property
    def prompts(self) -> list[int]:
        """Slots of each layer that the prompt takes."""
        return [count for part in self.parts for count in part.prompts]

    @property
    def store(self) -> Stores:
        """Slots of all layers, and their bytes on all devices."""
        stores = [part.store for part in self.parts]
        capacities = [count for store in stores for count in store.capacities]
        return Stores(capacities, sum(store.bytes for store in stores))

    @property
    def evicted(self) -> Tensor:
        """Entries evicted while decoding, per layer, on the CPU."""
        return torch.cat([part.evicted.cpu() for part in self.parts])

    @property
    def merged(self) -> Tensor:
        """Entries merged while decoding, per layer, on the CPU."""
        return torch.cat([part.merged.cpu() for part in self.parts])

    @property
    def decode_path(self) -> str:
        """What executes a step, in the words of a result's decode path; of each device where they differ."""
        return "; ".join(dict.fromkeys(part.decode_path for part in self.parts))

    @property
    def fallback(self) -> str:
        """Why a run goes without the fast decode path, where one could have been expected."""
        return next((part.fallback for part in self.parts if part.fallback), "")
