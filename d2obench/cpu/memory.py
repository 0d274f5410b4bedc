"""Memory of a CPU: the pages of freed tensors are reused, and long-lived tensors get separate pages.

Design. Prefill on a CPU allocates and frees tensors of tens of megabytes, thousands of times. By default the C library
returns the pages of each to the kernel and requests new ones, which the kernel must clear: eight million page faults
and a quarter of the time of a prefill of 8 × 2048 tokens. In a process that only runs models, :func:`retain` tells the
library to keep the pages, and :func:`release` returns them to the kernel at a time that is not measured. Long-lived
tensors (slots; a prompt's keys and values until they are compressed) would fragment the reused memory, so
:func:`lasting` gives them separate pages, which return to the kernel as soon as the tensor is freed. The kernel may
back them with huge pages.
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
"""Size in bytes from which a tensor gets separate pages."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def lasting(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, huge: bool = False) -> Tensor:
    """Zeros for a long-lived tensor; on a CPU in separate pages, which take up memory only once they are written to.

    ``huge`` requests huge pages: useful for tensors that are read in every step, not for tensors that are freed soon.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # this kernel has no huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class LayerBuffers:
    """Zeros for the tensors that each layer keeps until all layers have read the prompt.

    The first layer's request allocates memory for every layer at once. So these long-lived tensors lie together in
    memory, and not between the short-lived tensors of each layer.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}

    def zeros(self, layer: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros as :func:`lasting` returns them; a different tensor for every call."""
        free = self._free.setdefault((*shape, dtype), [])
        if layer == 0 or not free:
            free += [lasting(shape, dtype, device) for _ in range(layer, self._layers)]
        return free.pop()


def retain() -> None:
    """Lets this process keep the pages of freed tensors. Has no effect if the C library is not glibc."""
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release() -> None:
    """Returns the pages of freed tensors to the kernel."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if library is not None and hasattr(library, "gnu_get_libc_version") else None
