"""Locks between the gates of one machine: while one measures times, or makes an environment, the others wait."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from d2obench.record import cannot_write

CACHE = "free some space or set D2OBENCH_CACHE to another folder"


@contextmanager
def exclusive(path: Path, busy: str, watch: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file ``path`` while the block runs; waits for the process that holds it.

    The lock belongs to this process alone and ends with it, even if its children live on.

    Args:
        path: the lock file; it is made if it does not exist, and stays.
        busy: what the other process does, for the line that says that this one waits.
        watch: receives that line.

    Raises:
        RecordError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as problem:
        raise cannot_write(path, problem, CACHE) from None
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno not in (errno.EACCES, errno.EAGAIN):
                raise cannot_write(path, problem, CACHE) from None
            owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
            watch(f"{busy} (pid {owner or 'unknown'}): waiting for it")
            fcntl.lockf(handle, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # a full disk: then the other processes can't say whom they wait for
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
