"""Named ranges around the engine's parts, for a profiler or a stopwatch; free when nobody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_OFF: AbstractContextManager[None] = nullcontext()
_made: Callable[[str], AbstractContextManager[object]] | None = None


def span(name: str) -> AbstractContextManager[object]:
    """A range of that name while :func:`naming` or :func:`into` is active, otherwise nothing."""
    return _OFF if _made is None else _made(name)


def wanted() -> bool:
    """Whether :func:`naming` or :func:`into` is active."""
    return _made is not None


@contextmanager
def into(make: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside the block a range is whatever ``make(name)`` gives."""
    global _made
    before, _made = _made, make
    try:
        yield
    finally:
        _made = before


def naming() -> AbstractContextManager[None]:
    """Inside the block ranges are the profiler's."""
    return into(torch.profiler.record_function)
