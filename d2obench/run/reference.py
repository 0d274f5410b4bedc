"""What figures of a device are held against: its copy bandwidth and its idle power, each measured once a run."""

from __future__ import annotations

from d2obench.errors import D2OBenchError
from d2obench.run.client import Client
from d2obench.run.ledger import Watcher
from d2obench.run.protocol import again

_ASKED = {"bandwidth": ("bytes_per_s", "copy bandwidth"), "idle": ("idle_w", "idle power")}
"""Operation of the worker → the key of its answer, and what it is in words."""


class Reference:
    """Asks the worker when a figure is first needed; None where it can't be told, with a note where that is a fault."""

    def __init__(self, client: Client, watcher: Watcher) -> None:
        self._client, self._watcher = client, watcher
        self._known: dict[tuple[str, str], float | None] = {}

    def bandwidth(self, device: str) -> float | None:
        """Read and written bytes per second of a copy on ``device``."""
        return self._of("bandwidth", device)

    def idle_w(self, device: str) -> float | None:
        """Watts of ``device`` while nothing runs on it; None on a CPU."""
        return self._of("idle", device)

    def known(self, device: str) -> dict[str, float | None]:
        """Both, for a cell's details."""
        return {"copy_bytes_per_s": self.bandwidth(device), "idle_w": self.idle_w(device)}

    def _of(self, op: str, device: str) -> float | None:
        if (op, device) not in self._known:
            key, words = _ASKED[op]
            try:
                found = again(lambda: self._client.call(op, {"device": device}))[key]
            except D2OBenchError as problem:
                found = None
                self._watcher.note(f"the {words} of {device} could not be measured: {problem}")
            self._known[op, device] = None if found is None else float(found)
        return self._known[op, device]
