"""Several devices or processes for one model: layers on several devices, KV heads shared out over ranks.

**Layers on several devices** (``--device-map``). Each run of neighbouring layers keeps its slots on its own device.
Within a run, operations cover all its layers at once, as on a single device; a step goes from run to run in the order
of the model. Layers interact in one place only: when budgets are divided among them, which happens on the CPU, from
their statistics.

**KV heads over ranks** (``--tensor-parallel``). Every rank's cache holds its own KV heads, and policies rank, evict and
merge per KV head, so a step needs no communication in the cache. Two things need all heads of a layer: its budget
(D2O's density is a mean over heads) and the footprint of the whole cache. Both are gathered from all ranks here,
outside of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import chain, groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from d2obench.attention.interface import decoder_layers
from d2obench.cache.compress import Packing
from d2obench.cache.layer import PolicyLayer
from d2obench.decode.state import DecodeState
from d2obench.errors import PolicyError
from d2obench.policies.base import Policy, Stats


@dataclass(frozen=True)
class Run:
    """Compressed layers from ``first`` up to but not including ``last``, all on one device."""

    first: int
    last: int
    device: torch.device


def place_of(layer: torch.nn.Module) -> tuple[Any, torch.device]:
    """A key that is equal for decoder layers in the same place, and the device on which this layer computes."""
    device = next(layer.parameters()).device
    return device, device


def runs_of(model: Any, kinds: Sequence[int | None]) -> list[Run]:
    """The runs of compressed layers of a model; ``kinds`` as :class:`d2obench.cache.policy_cache.PolicyCache` has
    them."""
    layers = decoder_layers(model)
    places = [place_of(layer) for layer, kind in zip(layers, kinds, strict=True) if kind is None]
    found: list[Run] = []
    for (_, device), members in groupby(places):
        first = found[-1].last if found else 0
        found.append(Run(first, first + len(list(members)), device))
    return found


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a GPU is the current one, because our kernels are launched on the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class SplitPacking:
    """Several :class:`Packing` objects, one per run, with the interface of one."""

    def __init__(self, parts: Sequence[Packing]) -> None:
        self.parts = list(parts)
        self._of = [part for part in parts for _ in part.budgets]

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
    """The slots of all runs, for queries about all of them together."""

    capacities: list[int]
    bytes: int


class SplitState:
    """Several :class:`DecodeState` objects, one per run, with the interface of one."""

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
        """Ends a step on every device; no device waits for another."""
        for part in self.parts:
            with on(part.now.device):
                part.advance()

    def skip(self, tokens: int) -> None:
        """See :meth:`DecodeState.skip`."""
        for part in self.parts:
            part.skip(tokens)

    def read_pages(self, most: Tensor) -> None:
        """See :meth:`DecodeState.read_pages`."""
        for part in self.parts:
            with on(part.now.device):
                part.read_pages(most)

    @property
    def read_bytes(self) -> int | None:
        """See :attr:`DecodeState.read_bytes`."""
        found = [part.read_bytes for part in self.parts]
        return None if None in found else sum(one or 0 for one in found)

    def extend(self, tokens: int) -> None:
        """See :meth:`DecodeState.extend`."""
        for part in self.parts:
            with on(part.now.device):
                part.extend(tokens)

    def retract(self, tokens: int) -> None:
        """See :meth:`DecodeState.retract`."""
        for part in self.parts:
            with on(part.now.device):
                part.retract(tokens)

    def select(self, sequences: Tensor) -> SplitState:
        """See :meth:`DecodeState.select`."""
        found = []
        for part in self.parts:
            with on(part.now.device):
                found.append(part.select(sequences))
        return SplitState(found)

    def tensors(self) -> list[Tensor]:
        """Every tensor except keys and values."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def snapshot(self, decode_only: bool = False) -> list[Any]:
        """A copy of everything that decoding changes, for :meth:`restore`; see :meth:`DecodeState.snapshot`."""
        return [part.snapshot(decode_only) for part in self.parts]

    def restore(self, saved: list[Any]) -> None:
        """Copies the contents of a :meth:`snapshot` back, in place."""
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
        """Number of slots in each layer that the prompt occupies."""
        return [count for part in self.parts for count in part.prompts]

    @property
    def store(self) -> Stores:
        """Slots of all layers, and their bytes on all devices."""
        stores = [part.store for part in self.parts]
        capacities = [count for store in stores for count in store.capacities]
        return Stores(capacities, sum(store.bytes for store in stores))

    @property
    def kv_bytes(self) -> int:
        """See :attr:`DecodeState.kv_bytes`."""
        return sum(part.kv_bytes for part in self.parts)

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
        """What executes a step, as text for a result's decode path; listed per device if they differ."""
        return "; ".join(dict.fromkeys(part.decode_path for part in self.parts))

    @property
    def fallback(self) -> str:
        """Why a run does not use the fast decode path, if its device has one."""
        return next((part.fallback for part in self.parts if part.fallback), "")


T = TypeVar("T")


@dataclass(frozen=True)
class HeadShard:
    """This rank's place among the ranks that share every layer's heads; heads are in the order of ranks.

    Args:
        group: the process group of these ranks.
        rank: index of this process in the group.
        size: number of ranks.
        device: a device from which tensors can be sent to other ranks.
    """

    group: Any
    rank: int
    size: int
    device: torch.device

    def all_heads(self, stats: Stats) -> Stats:
        """Gathers the statistics ``[B, H, L]`` of all ranks' heads, in the model's order; every rank must call it."""
        return {name: torch.cat(self._gathered(stat), 1) for name, stat in stats.items()}

    def own(self, budgets: Tensor) -> Tensor:
        """Of budgets ``[layers, B, H]`` of all heads those of this rank's, ``[layers, B, H/size]``; those of layers,
        ``[layers, B]``, as they are."""
        return budgets.chunk(self.size, 2)[self.rank] if budgets.dim() == 3 else budgets

    def whole(self, footprint: T) -> T:
        """The footprint of the whole cache, from that of each rank's heads: counts are summed, a layer's tokens
        averaged. Every rank must call it."""
        values = {field.name: getattr(footprint, field.name) for field in fields(footprint)}  # type: ignore[arg-type]
        found = {
            name: self._sum(value) for name, value in values.items() if name.endswith(("_bytes", "_layers")) and value
        }
        for name in ("kept", "held", "effective"):
            found[name] = _scaled(self._sum(values[name]), 1 / self.size)
        return replace(footprint, **found)  # type: ignore[type-var]

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def _sum(self, value: Any) -> Any:
        """The sum over all ranks of a number or of each number in nested lists; integers stay integers."""
        total = torch.tensor(value, dtype=torch.int64 if _whole(value) else torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()


def shard_of(model: Any) -> HeadShard | None:
    """This rank's place among those that share a model's heads; None if this process holds all heads."""
    size = getattr(model, "tp_size", None) or 1
    if size == 1:
        return None
    group = dist.group.WORLD
    return HeadShard(group, dist.get_rank(group), size, model.device)


def check_shardable(policy: Policy) -> None:
    """Raises a PolicyError for a policy whose decode steps combine all heads of a layer."""
    if policy.judges_heads_together:
        raise PolicyError(
            f"policy '{policy.name}' can't run with --tensor-parallel",
            why="at every step it judges all heads of a layer together, and each rank sees its own",
            remedy="use --device-map auto, or another policy",
        )


def _whole(value: Any) -> bool:
    return all(map(_whole, value)) if isinstance(value, list) else isinstance(value, int)


def _scaled(value: Any, factor: float) -> Any:
    return [_scaled(item, factor) for item in value] if isinstance(value, list) else value * factor
