"""Instructions that this thread executes, counted by the processor: Linux's ``perf_event_open``.

Other load hardly changes such a count, so it shows small changes where times are noisy. Most virtual machines have no
counter, and containers often may not use it; then there is no count. Only instructions outside of the kernel count.

Source: the manual page perf_event_open(2); the struct is that of its first version, which every kernel knows.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HARDWARE, SOFTWARE = 0, 1
"""``type`` of an event: of the processor, or of the kernel's own."""
INSTRUCTIONS, PAGE_FAULTS = 1, 2
"""``config``: PERF_COUNT_HW_INSTRUCTIONS, and PERF_COUNT_SW_PAGE_FAULTS, which every kernel can count."""
_CALLS = {"x86_64": 298, "aarch64": 241}
"""Machine → number of the system call."""
_FLAGS = 1 << 2 | 1 << 5 | 1 << 6
"""Pinned, so that no count is an estimate; neither the kernel nor the hypervisor."""
_REASONS = {
    errno.ENOENT: "the processor's counters are not there, as in most virtual machines",
    errno.EOPNOTSUPP: "the processor's counters are not there, as in most virtual machines",
    errno.EACCES: "the kernel does not allow it: see /proc/sys/kernel/perf_event_paranoid",
    errno.EPERM: "the kernel does not allow it: see /proc/sys/kernel/perf_event_paranoid",
}


def open_counter(kind: int = HARDWARE, config: int = INSTRUCTIONS) -> int:
    """Opens a counter of the calling thread, which counts from now on.

    Returns: its file descriptor; reading 8 bytes gives the count.

    Raises:
        OSError: this machine has no such counter, or does not allow it.
    """
    number = _CALLS.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    about = struct.pack("=IIQQQQQIIQ", kind, 64, config, 0, 0, 0, _FLAGS, 0, 0, 0)
    this_thread, any_cpu, no_group, no_flags = 0, -1, -1, 0
    found = ctypes.CDLL(None, use_errno=True).syscall(number, about, this_thread, any_cpu, no_group, no_flags)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)


@contextmanager
def counting(kind: int = HARDWARE, config: int = INSTRUCTIONS) -> Iterator[Callable[[], int] | None]:
    """Yields a function that returns the count up to now; None where nothing is counted."""
    try:
        handle = open_counter(kind, config)
    except OSError:
        yield None
        return
    try:
        # a pinned counter that others took away has nothing to read
        yield lambda: int.from_bytes(os.read(handle, 8).ljust(8, b"\0"), "little")
    finally:
        os.close(handle)


def why_not() -> str:
    """Why instructions are not counted here, in words; empty where they are."""
    try:
        os.close(open_counter())
    except OSError as problem:
        return _REASONS.get(problem.errno or 0, problem.strerror or str(problem))
    return ""
