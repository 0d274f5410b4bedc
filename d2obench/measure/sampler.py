"""A thread that reads some values every few milliseconds, keeps every row, and counts what this costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

Row = tuple[float | None, ...]


class Sampler:
    """Collects rows ``(t, *read())``.

    Args:
        read: returns one value for each of ``columns``, None for a value that is missing. It must not raise.
        columns: the names of the values, with units, for example ``rss_bytes``.
        interval: seconds between two readings.
        now: the clock of ``t``; the same that the phase marks come from.
    """

    def __init__(
        self,
        read: Callable[[], Row],
        columns: Sequence[str],
        interval: float = 0.02,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.columns = tuple(columns)
        self.rows: list[Row] = []
        self._read, self._interval, self._now = read, interval, now
        self._busy = self._alive = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def sample(self) -> None:
        """Takes one row now. It is called at every change of phase, so that even a short phase has a row."""
        with self._lock:
            before = time.thread_time()
            t = self._now()
            self.rows.append((t, *self._read()))
            self._busy += time.thread_time() - before

    def start(self) -> None:
        """Forgets all rows and starts the thread."""
        self.stop()
        self.rows, self._busy, self._alive = [], 0.0, time.perf_counter()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="d2obench-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after one last row; does nothing where none runs."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self.sample()
        self._thread = None
        self._alive = time.perf_counter() - self._alive

    @property
    def overhead(self) -> float:
        """Share of one core that the sampling took, in [0, 1]; known after ``stop``."""
        return self._busy / self._alive if self._alive > 0 else 0.0

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self._interval)


def peak_between(rows: Sequence[Row], column: int, start: float, end: float) -> float | None:
    """The highest value of ``column`` with ``start <= t <= end``, None where there is none.

    Column 0 is the first one after the time.
    """
    found = [
        value
        for row in rows
        if row[0] is not None and start <= row[0] <= end and (value := row[column + 1]) is not None
    ]
    return max(found, default=None)
