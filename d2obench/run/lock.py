"""One run to a folder: a file lock the kernel lets go of when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2obench.errors import RecordError
from d2obench.record import cannot_write

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for this process.

    The file keeps the owner's pid for the message only; what counts is the kernel's lock, so a lock left by a dead
    process is simply taken over.

    Raises:
        RecordError: another process holds the folder, or it can't be written.
    """
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        raise cannot_write(path, problem) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise RecordError(
                f"{folder} is in use by another run (pid {owner})",
                remedy="wait for it, or choose another folder with --out",
            ) from None
        except OSError as problem:
            raise cannot_write(path, problem) from None
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as problem:
            raise cannot_write(path, problem) from None
        yield
    finally:
        os.close(handle)
