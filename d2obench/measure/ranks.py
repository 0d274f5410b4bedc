"""Time where several processes share a model: all start together and go by rank 0's clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2obench.measure.clock import Clock
from d2obench.measure.disturbance import Load


class SharedClock:
    """A rank's clock. A sample begins when every rank is there, so that none waits for another inside it, and what is
    read is rank 0's on all: what depends on it (how long to warm up) is decided alike.

    Args:
        own: this rank's.
        device: where a tensor can be sent from.
    """

    def __init__(self, own: Clock, device: Any) -> None:
        self._own, self._device = own, device

    def now(self) -> float:
        return self._own.now()

    def start(self) -> None:
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1, device=self._device))  # a barrier, in either backend
        self._own.start()

    def stamp(self) -> Any:
        return self._own.stamp()

    def read(self, stamps: Sequence[Any]) -> list[float]:
        import torch
        import torch.distributed as dist

        times = torch.tensor(self._own.read(stamps), dtype=torch.float64, device=self._device)
        dist.broadcast(times, 0)
        found: list[float] = times.tolist()
        return found


def shared_load(found: Load, model: Any) -> Load:
    """``found`` with the CPU time of all ranks as one's own: to each of them the others are no other load."""
    if (getattr(model, "tp_size", None) or 1) == 1:
        return found
    import torch
    import torch.distributed as dist

    own = torch.tensor(found.own, dtype=torch.float64, device=model.device)
    dist.all_reduce(own)
    return found._replace(own=float(own))


def shared(clock: Clock, model: Any) -> Clock:
    """``clock``, or where ranks share ``model`` the clock they share."""
    return clock if (getattr(model, "tp_size", None) or 1) == 1 else SharedClock(clock, model.device)
