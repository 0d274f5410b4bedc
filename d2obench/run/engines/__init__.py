"""Where cells run: this machine, or a cluster. One engine is chosen for a run, and only its file is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from d2obench.errors import UsageError
from d2obench.policies import other
from d2obench.run.check import Checked
from d2obench.run.client import Client
from d2obench.run.ledger import Ledger
from d2obench.suite.definition import Suite

ENGINES = ("local", "ray", "slurm")


class Engine(Protocol):
    """Brings cells to their rows; how a cell is measured and recorded is the same in all of them."""

    suite: Suite
    """The suite, its devices named as far as the engine decides them."""

    @property
    def client(self) -> Client:
        """A worker to ask about models and devices before anything runs."""

    def environment(self, device: str, like: str = "") -> dict[str, Any]:
        """The fingerprint of the hardware and software that the cells will run on.

        Args:
            device: of the suite.
            like: the hash of an earlier part of the run; where there is hardware of several kinds, that one is chosen.
        """

    def run(self, checked: Checked, ledger: Ledger) -> None:
        """Every cell that has no row yet gets one.

        Raises:
            RecordError: the run folder can't be written any more.
            WorkerError: nothing is left to run on.
        """

    def vitals(self) -> str:
        """A few words on what works now, for the display. Any thread may ask."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_engine(
    name: str,
    suite: Suite,
    *,
    address: str = "",
    cpus: float = 0.0,
    resource: str = "",
    allow_busy: bool = False,
    python: Path | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Engine:
    """The engine ``local`` or ``ray``; the others are arguments of :class:`d2obench.run.engines.ray.RayEngine`."""
    if name == "ray":
        apart = [text for text in suite.axes.policy if (found := other(text)) is not None and found.apart]
        if apart:
            raise UsageError(
                f"{apart[0]} can't run on ray", why="it needs a worker of its own", remedy="use --engine local"
            )
        from d2obench.run.engines.ray import RayEngine

        return RayEngine(suite, address, cpus=cpus, resource=resource, allow_busy=allow_busy, say=say)
    from d2obench.run.engines.local import LocalEngine

    return LocalEngine(suite, python=python)
