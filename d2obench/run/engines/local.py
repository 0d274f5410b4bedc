"""This machine: one worker, one group of cells after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from d2obench.run.apart import Apart
from d2obench.run.bench import Bench
from d2obench.run.check import Checked
from d2obench.run.ledger import Ledger
from d2obench.run.live import Vitals
from d2obench.run.plan import group
from d2obench.run.protocol import WorkerClient, again
from d2obench.run.ranks import client_for
from d2obench.suite.definition import Suite


class LocalEngine:
    """Runs in the order of the suite, on ``client`` or on the worker that the suite asks for.

    ``python`` is the interpreter for cells of another library that can't share ours.
    """

    def __init__(self, suite: Suite, client: WorkerClient | None = None, python: Path | None = None) -> None:
        self.suite, self.client = suite, client or client_for(suite)
        self._apart = Apart(suite, python)
        self._versions: dict[str, dict[str, Any]] = {}
        self._vitals = Vitals(self.client)

    def environment(self, device: str, like: str = "") -> dict[str, Any]:
        """The fingerprint of this machine."""
        facts = again(lambda: self.client.call("environment", {"device": device}))
        return {**facts, "environments": self._versions} if self._versions else facts

    def run(self, checked: Checked, ledger: Ledger) -> None:
        """Brings every cell to its row."""
        bench = Bench(checked, self.client, ledger, self._apart)
        for together in group(checked.cells):
            bench.run(together)

    def vitals(self) -> str:
        """Memory of the worker."""
        return self._vitals()

    def __enter__(self) -> Self:
        self._versions = self._apart.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._apart.remove()
