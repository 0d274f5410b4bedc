"""Compiled loops on PyTorch's own threads (CPU).

Design. A decode step on a CPU consists of a few hundred short loops that are limited by memory bandwidth. PyTorch
operators do not reach that bandwidth, and a second thread pool would compete with PyTorch's for the cores. Therefore
numba compiles each loop to a C function (``d2obench.cpu.language``), and the OpenMP runtime that PyTorch has loaded
runs it: its function ``GOMP_parallel`` uses the threads of PyTorch's operators, which are still awake between two
operators. A launch costs about two microseconds. Threads fetch work items one by one, so that a core that is slowed
down by other work processes fewer of them.

If there is no such runtime (another operating system, a PyTorch with another thread library, no numba),
:func:`available` returns False and callers use PyTorch operators, which give the same results.
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
"""``RTLD_NOLOAD``: find only the library that PyTorch has already loaded; another copy would start another thread
pool."""


def _runtime(maps: str) -> str:
    """The file of the OpenMP runtime among those that a process has mapped (``maps`` is the text of
    ``/proc/self/maps``): PyTorch's own copy, whatever its wheel calls it, otherwise the system's."""
    found = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libgomp" in line}
    return min(found, key=lambda path: ("torch" not in path, path), default="libgomp.so.1")


@functools.cache
def _parallel() -> Any:
    """The runtime's function ``GOMP_parallel``, or None if it was not found."""
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
    """Whether compiled loops can run on PyTorch's threads in this process."""
    return _parallel() is not None


def suits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether compiled loops exist for tensors of this dtype and device, and can run in this process."""
    return dtype == torch.float32 and device.type == "cpu" and available()


Size = ctypes.c_int64
Real = ctypes.c_double


class Pointer(ctypes.c_int64):
    """The address of a tensor's storage; 0 for no tensor."""

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
    """The arguments of a loop as named fields. Each loop declares its own subclass: :data:`HEADER`, then its fields."""

    def point(self, **tensors: Tensor | None) -> None:
        """Sets fields to the addresses of tensors, and checks each tensor, because a loop cannot check an address.

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
"""The first fields of all arguments: the next work item, the number of items, and whether a loop raised an error."""


class Loop(NamedTuple):
    """A compiled loop.

    Args:
        name: name of the loop's function.
        address: address of its machine code.
        flops: function of the arguments that returns the floating-point operations of the loop's matrix products.
    """

    name: str
    address: int
    flops: Callable[[Any], int]


_watchers: list[Callable[[Loop, Arguments], None]] = []


def launch(loop: Loop, arguments: Any) -> None:
    """Runs all work items of a loop on PyTorch's threads and waits for them.

    Raises:
        RuntimeError: the loop raised an error; its output is then incomplete.
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
    """Inside this context, ``watch`` is called for every launch; PyTorch's own operator hooks do not see launches."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)
