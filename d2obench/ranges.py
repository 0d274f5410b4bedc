"""Named ranges around the engine's parts, for the profiler; free when nobody profiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_OFF: AbstractContextManager[None] = nullcontext()
_on = False


def span(name: str) -> AbstractContextManager[object]:
    """A profiler range of that name while :func:`naming` is active, otherwise nothing."""
    return torch.profiler.record_function(name) if _on else _OFF


@contextmanager
def naming() -> Iterator[None]:
    """Turns the ranges on inside the block."""
    global _on
    _on = True
    try:
        yield
    finally:
        _on = False
