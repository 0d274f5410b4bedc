"""Named ranges around parts of the engine, for a profiler or a timer. They cost nothing while neither is active."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

ENGINE_RANGES = (
    "prefill attention",
    "scores",
    "allocate",
    "similarity",
    "evict",
    "merge",
    "decode attention",
    "bookkeeping",
)
MODEL_PARTS = {
    "mlp": "MLP",
    "self_attn": "projections",
    "attention": "projections",
    "lm_head": "lm head",
    "embed_out": "lm head",
}
"""Last part of a module's name → its range. What the engine names inside of it counts for the engine's range."""
RANGES = (*ENGINE_RANGES, *dict.fromkeys(MODEL_PARTS.values()))

_OFF: AbstractContextManager[None] = nullcontext()
_made: Callable[[str], AbstractContextManager[object]] | None = None


def span(name: str) -> AbstractContextManager[object]:
    """A context: a range of that name inside :func:`profiler_ranges` or :func:`ranges_as`, otherwise nothing."""
    return _OFF if _made is None else _made(name)


def active() -> bool:
    """Whether ranges are recorded now."""
    return _made is not None


@contextmanager
def ranges_as(make: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside this context a range is the context that ``make(name)`` returns."""
    global _made
    before, _made = _made, make
    try:
        yield
    finally:
        _made = before


def profiler_ranges() -> AbstractContextManager[None]:
    """Inside this context ranges are those of torch.profiler."""
    return ranges_as(torch.profiler.record_function)
