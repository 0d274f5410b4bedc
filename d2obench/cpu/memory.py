"""Memory of a CPU: memory pages of dropped tensors are used again, and long-lived tensors have pages of their own.

Design. Reading a prompt on a CPU makes and drops tensors of tens of megabytes, thousands of times. The C library gives
the pages of each back to the kernel and takes fresh ones for the next, which the kernel clears: eight million page
faults and a quarter of the time of a prefill of 8 × 2048 tokens. A process that only runs models lets the library keep
the pages (:func:`retain`) and gives them back at a time that no figure covers (:func:`release`). Long-lived tensors
(slots; a prompt's keys and values until they are compressed) would split the memory that is used again into pieces, so
they get pages of their own (:func:`lasting`), which go back to the kernel the moment the tensor is dropped. The kernel
may give huge pages.
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
    """Zeros for a long-lived tensor: on a CPU with pages of its own, which take memory once they are written to.

    ``huge`` asks for huge pages: right for what is read in every step, and not for what is dropped soon.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class LayerBuffers:
    """Zeros for what each layer keeps until all layers have read the prompt.

    What the first layer asks for is allocated for every layer at once. So these long-lived tensors lie together in
    memory and not between the short-lived ones of each layer.
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
