"""Compiled loops on PyTorch's own threads (CPU).

Design. A decode step on a CPU is a few hundred short loops that read memory. As PyTorch operators they don't read it at
the speed it has, and a second pool of threads would fight with PyTorch's for the cores. So numba compiles a loop to a C
function (``d2obench.cpu.language``), and the OpenMP runtime that PyTorch has loaded runs it: its ``GOMP_parallel`` uses
the threads of PyTorch's operators, which are awake between them. A launch costs some two microseconds. Items of the
work are handed out one by one, so that a core that is held up does fewer of them.

Where there is no such runtime (another system, a PyTorch with other threads, no numba), :func:`available` is False and
callers use PyTorch's operators, which give the same results.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

_LOADED = 4
"""``RTLD_NOLOAD``: only what PyTorch has loaded; another copy would be another set of threads."""


def _runtime(maps: str) -> str:
    """The runtime's file among those a process has mapped: PyTorch's own, whatever its wheel calls it, or else the
    system's."""
    found = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libgomp" in line}
    return min(found, key=lambda path: ("torch" not in path, path), default="libgomp.so.1")


@functools.cache
def _parallel() -> Any:
    """The runtime's entry point, or None."""
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        return None
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        entry = ctypes.CDLL(_runtime(Path("/proc/self/maps").read_text()), mode=_LOADED).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    entry.restype = None
    return entry


def available() -> bool:
    """Whether compiled loops can run on PyTorch's threads here."""
    return _parallel() is not None


def suits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are loops for tensors of this kind here."""
    return dtype == torch.float32 and device.type == "cpu" and available()


Size = ctypes.c_int64
Real = ctypes.c_double


class Pointer(ctypes.c_int64):
    """The address of a tensor's storage; 0 where there is none."""

    dtype: ClassVar[torch.dtype]


class Floats(Pointer):
    """Address of float32 numbers."""

    dtype = torch.float32


class Longs(Pointer):
    """Address of int64 numbers."""

    dtype = torch.int64


class Ints(Pointer):
    """Address of int32 numbers."""

    dtype = torch.int32


class Flags(Pointer):
    """Address of truth values, one byte each."""

    dtype = torch.bool


class Arguments(ctypes.Structure):
    """What a loop is given, as named fields. Each loop declares its own: :data:`HEADER` first, then its fields."""

    def point(self, **tensors: Tensor | None) -> None:
        """Sets addresses, after a check that each tensor is what its field says: a loop trusts its addresses.

        Raises:
            TypeError: a tensor of another dtype, on another device, or not contiguous.
        """
        kinds: dict[str, Any] = {name: kind for name, kind, *_ in self._fields_}
        for name, tensor in tensors.items():
            wanted = kinds[name].dtype
            if tensor is not None and not (tensor.dtype == wanted and tensor.is_cpu and tensor.is_contiguous()):
                found = f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
                raise TypeError(f"{type(self).__name__}.{name} must be contiguous {wanted} on the CPU, not {found}")
            setattr(self, name, 0 if tensor is None else tensor.data_ptr())


HEADER = (("next_item", Size), ("items", Size), ("failed", Size))
"""The first fields of all arguments: the next item of work, how many there are, and whether a loop raised an error."""


class Loop(NamedTuple):
    """A compiled loop.

    Args:
        name: of the function.
        address: of its machine code.
        flops: floating-point operations of the products it makes when it is given these arguments.
    """

    name: str
    address: int
    flops: Callable[[Any], int]


_watchers: list[Callable[[Loop, Arguments], None]] = []


def launch(loop: Loop, arguments: Any) -> None:
    """Runs the items of a loop on PyTorch's threads, and waits for them.

    Raises:
        RuntimeError: an error inside the loop; what it was to write is then unfinished.
    """
    arguments.next_item = 0
    _parallel()(loop.address, ctypes.byref(arguments), min(arguments.items, torch.get_num_threads()), 0)
    if arguments.failed:
        arguments.failed = 0
        raise RuntimeError(f"the compiled loop '{loop.name}' stopped at an error")
    for watch in _watchers:
        watch(loop, arguments)


@contextmanager
def watched(watch: Callable[[Loop, Arguments], None]) -> Iterator[None]:
    """Tells ``watch`` of every launch: PyTorch's own means to look at operators don't see them."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)
