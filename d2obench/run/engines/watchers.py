"""A watcher for several threads."""

from __future__ import annotations

import threading

from d2obench.run.ledger import Watcher


class OneAtATime:
    """Passes everything on to ``watcher``, which hears one thing at a time."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher, self._lock = watcher, threading.Lock()

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """A cell is running or ended."""
        with self._lock:
            self._watcher.cell(cell, state, text, share)

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """What is going on now."""
        with self._lock:
            self._watcher.phase(text, done, total)

    def note(self, text: str) -> None:
        """Something to know about the whole run."""
        with self._lock:
            self._watcher.note(text)
