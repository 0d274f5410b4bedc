"""KV heads shared out over the ranks of a tensor-parallel model.

Every rank's cache holds its own KV heads, and policies rank, evict and merge per KV head, so nothing of a step crosses
ranks. Two things need all heads of a layer: its budget (D2O's density is a mean over heads) and what is told of the
cache as a whole. Both are asked of all ranks here, outside of decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Policy, Stats

T = TypeVar("T")


@dataclass(frozen=True)
class HeadShard:
    """This rank's place among those that share every layer's heads, in their order.

    Args:
        group: the ranks.
        rank: of this process in it.
        size: how many there are.
        device: where a tensor can be sent from.
    """

    group: Any
    rank: int
    size: int
    device: torch.device

    def all_heads(self, stats: Stats) -> Stats:
        """Statistics ``[B, H, L]`` of this rank's heads → those of all heads, in the model's order."""
        return {name: torch.cat(self._gathered(stat), 1) for name, stat in stats.items()}

    def whole(self, footprint: T) -> T:
        """A footprint of this rank's heads → that of all: counts are sums, tokens of a layer the mean over heads."""
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
        """A number, or lists of them, added up over the ranks; whole ones stay whole."""
        total = torch.tensor(value, dtype=torch.int64 if _whole(value) else torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()


def shard_of(model: Any) -> HeadShard | None:
    """The ranks that share a model's heads; None where this process holds them all."""
    size = getattr(model, "tp_size", None) or 1
    if size == 1:
        return None
    group = dist.group.WORLD
    return HeadShard(group, dist.get_rank(group), size, model.device)


def check_apart(policy: Policy) -> None:
    """A PolicyError for a policy that judges the heads of a layer together at every step."""
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
