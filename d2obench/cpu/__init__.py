"""PyTorch's own threads, lent to loops of ours (CPU).

Design. A decode step on a CPU is a few hundred short loops that read memory. As operators they don't read it at the
speed it has, and a second pool of threads would fight with PyTorch's over the cores. So a loop is compiled by numba to
a C function (``d2obench.cpu.language``) and handed to the OpenMP runtime that PyTorch has loaded: its
``GOMP_parallel`` runs a function on the team that PyTorch's operators run on, which is awake between them. A launch
costs some two microseconds. Pieces of the work are handed out one by one, so that a core that is held up takes fewer
of them.

Where there is no such runtime (another system, a PyTorch with other threads, no numba), :func:`here` says so and
callers go their PyTorch way, which gives the same.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

_LOADED = 4
"""``RTLD_NOLOAD``: only what PyTorch has loaded; another copy would be another team."""


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


def here() -> bool:
    """Whether there is a team to lend."""
    return _parallel() is not None


def suits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are loops for tensors of this kind here."""
    return dtype == torch.float32 and device.type == "cpu" and here()


class Arguments(ctypes.c_int64 * 64):  # type: ignore[misc]
    """What a loop is given: a counter, the number of pieces, then addresses and sizes. Once filled, it can be given
    again and again."""


class Loop(NamedTuple):
    """A compiled loop.

    Args:
        name: of the function.
        address: of its machine code.
        flops: floating-point operations of the products it makes when it is given these words.
    """

    name: str
    address: int
    flops: Callable[[Arguments], int]


_watchers: list[Callable[[Loop, Arguments], None]] = []


def launch(loop: Loop, words: Arguments) -> None:
    """Runs the pieces of a loop on the team, and waits for them."""
    words[0] = 0
    _parallel()(loop.address, words, min(words[1], torch.get_num_threads()), 0)
    for watch in _watchers:
        watch(loop, words)


@contextmanager
def watched(watch: Callable[[Loop, Arguments], None]) -> Iterator[None]:
    """Tells ``watch`` of every launch: PyTorch's own means to look at operators don't see them."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def bits(number: float) -> int:
    """A float64 as a word."""
    found: int = struct.unpack("q", struct.pack("d", number))[0]
    return found
