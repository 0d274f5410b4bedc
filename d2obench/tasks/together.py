"""Several cells of one task take a batch of texts in turn, so that its prompts are read once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from d2obench.cache.reading import Readings, way_of
from d2obench.errors import is_device_fault
from d2obench.suite.definition import Quality
from d2obench.tasks import ready
from d2obench.tasks.base import Cell, Item, TextBatch

if TYPE_CHECKING:
    from d2obench.models import LoadedModel


def run(
    loaded: LoadedModel, cells: Sequence[Cell], quality: Quality, batch: TextBatch
) -> Iterator[tuple[Cell, list[Item] | Exception]]:
    """Runs one batch under each of several cells that differ in nothing but policy and budget; their prompts are read
    once for as many of them as possible.

    Yields:
        The cells, in an order in which they share most, each with an item for each of the batch's places, or with the
        error that it met.
    """

    def way(cell: Cell) -> tuple[bool, ...]:
        return () if cell.policy.yardstick is not None else way_of(cell.policy.policy, cell.budget) or ()

    own = [(cell.policy.policy, cell.budget) for cell in cells if cell.policy.yardstick is None]
    readings = Readings(own)
    for cell in sorted(cells, key=way):
        try:
            yield cell, ready(loaded, cell, quality).run(loaded, cell, batch, readings.prefill)
        except Exception as problem:
            if len(cells) == 1 or is_device_fault(problem):  # after such a fault nothing in this process can be trusted
                raise
            yield cell, problem
