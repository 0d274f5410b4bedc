"""Which entry of the driver's list of processes is this one.

Inside a container the driver may number processes as the host does, where this one has another pid that it can't see
(pid_namespaces(7)). It is then known by what nobody else does: it takes a block of memory, and the one entry that
appears or grows by as much is this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from d2obench.measure.nvml import Nvml

BLOCK = 66 * 2**20
"""Bytes: a segment of its own in PyTorch's allocator, and no common size."""


def own_pids(status: Path = Path("/proc/self/status")) -> frozenset[int]:
    """This process's pid in every namespace that can be seen from here (``NSpid``, proc(5))."""
    found = {os.getpid()}
    try:
        lines = status.read_text("ascii", "replace").splitlines()
    except OSError:
        return frozenset(found)
    for line in lines:
        if line.startswith("NSpid:"):
            found |= {int(word) for word in line.split()[1:] if word.isdecimal()}
    return frozenset(found)


def recognise(gpu: Nvml, occupied: Callable[[], AbstractContextManager[None]]) -> bool:
    """Finds this process in the driver's list and notes it in ``gpu.pids``; true where there is no doubt.

    Args:
        gpu: whose list.
        occupied: a block of BLOCK bytes of it is held inside.
    """
    before = {owner.pid: owner.bytes for owner in gpu.owners()}
    try:
        with occupied():
            after = {owner.pid: owner.bytes for owner in gpu.owners()}
    except (RuntimeError, AssertionError):  # no memory left, none for a second process, or a torch without CUDA
        return False
    changed = [pid for pid, held in after.items() if pid not in before or (held or 0) - (before[pid] or 0) == BLOCK]
    if len(changed) != 1:
        return False
    gpu.pids = frozenset(changed)
    return True


@contextmanager
def block_on(device: torch.device) -> Iterator[None]:
    """Holds BLOCK bytes of a CUDA device."""
    import torch

    held = torch.empty(BLOCK, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()
