"""The groups of cells that wait for a device; several threads take from it, and a lost device gives its group back."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from d2obench.tasks.base import Cell

LOSSES = 3
"""How often a group may lose its device before its cells are given up."""
Model = tuple[str, str]


def model_of(cells: Sequence[Cell]) -> Model:
    """What a worker must have loaded for a group."""
    return cells[0].axes.model, cells[0].axes.dtype


class GroupQueue:
    """All groups of a run. A thread that takes one has it alone until it is done."""

    def __init__(self, groups: Sequence[Sequence[Cell]]) -> None:
        self._waiting = [list(one) for one in groups]
        self._taken = 0
        self._losses: dict[str, int] = {}
        self._over = False
        self._change = threading.Condition()

    def next(self, warm: Model | None = None) -> list[Cell] | None:
        """The next group: the first whose model is ``warm``, or else the first. None when no more will come.

        Waits while others hold groups that might come back.
        """
        with self._change:
            while not self._over and not self._waiting and self._taken:
                self._change.wait()
            if self._over or not self._waiting:
                return None
            place = next((i for i, one in enumerate(self._waiting) if model_of(one) == warm), 0)
            self._taken += 1
            return self._waiting.pop(place)

    def done(self) -> None:
        """Says that a group which was taken has all its rows."""
        with self._change:
            self._taken -= 1
            self._change.notify_all()

    def give_back(self, cells: Sequence[Cell]) -> bool:
        """A group that was taken has lost its device; false when that happened too often and it is given up."""
        with self._change:
            self._taken -= 1
            losses = self._losses[cells[0].id] = self._losses.get(cells[0].id, 0) + 1
            if losses < LOSSES:
                self._waiting.insert(0, list(cells))
            self._change.notify_all()
            return losses < LOSSES

    def stop(self) -> None:
        """Lets :meth:`next` return None to everybody from now on."""
        with self._change:
            self._over = True
            self._change.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether everything is done; looks again after ``seconds`` at most."""
        with self._change:
            return self._change.wait_for(lambda: self.finished, seconds)

    @property
    def finished(self) -> bool:
        """Whether every group has its rows."""
        return not self._waiting and not self._taken
