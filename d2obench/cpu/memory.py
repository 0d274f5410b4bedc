"""Memory of the host: what lives long apart from what doesn't, and pages kept from one operator to the next.

Design. Reading a prompt on a CPU makes and drops tensors of tens of megabytes, thousands of times. The C library hands
each of them to the kernel and takes fresh pages for the next, which the kernel clears: eight million page faults and a
quarter of the time of a prefill of 8 × 2048 tokens. A process that only runs models lets it keep them (:func:`retain`)
and gives them back in one go where that is in no figure (:func:`release`). What lives on (slots, a prompt's keys and
values until they are compressed) would then stand between those pages and hold them apart, so it gets pages of its own
(:func:`lasting`), which go back to the kernel the moment it is dropped. The kernel may give huge ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGE = 2**16
"""Bytes from which a tensor gets pages of its own."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def lasting(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, huge: bool = False) -> Tensor:
    """Zeros for what lives long. On a CPU pages of their own, that exist once they are written to.

    ``huge`` asks for huge pages: right for what is read in every step; what soon goes again is better without.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class Rooms:
    """Zeros for what each layer puts aside until all have read the prompt.

    Whatever the first layer asks for is made for every layer at once, so that what lives on is made before what doesn't
    and never stands in the midst of it.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}

    def zeros(self, layer: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As :func:`lasting`, each time another tensor."""
        free = self._free.setdefault((*shape, dtype), [])
        if layer == 0 or not free:
            free += [lasting(shape, dtype, device) for _ in range(layer, self._layers)]
        return free.pop()


def retain() -> None:
    """Lets this process keep the pages of dropped tensors. Nothing happens where the C library is not glibc's."""
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release() -> None:
    """Gives the pages of dropped tensors back to the kernel."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if library is not None and hasattr(library, "gnu_get_libc_version") else None
