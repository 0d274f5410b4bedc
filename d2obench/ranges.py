"""Named ranges around parts of a model and of a decode step, for a profiler or a timer. Without one they cost
nothing."""

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
"""Last part of a module's name → name of its range. A range that our own code opens inside of it is counted
separately."""
RANGES = (*ENGINE_RANGES, *dict.fromkeys(MODEL_PARTS.values()))

_OFF: AbstractContextManager[None] = nullcontext()
_made: Callable[[str], AbstractContextManager[object]] | None = None


def span(name: str) -> AbstractContextManager[object]:
    """A context manager: opens a range of that name inside :func:`profiler_ranges` or :func:`ranges_as`; otherwise does
    nothing."""
    return _OFF if _made is None else _made(name)


def active() -> bool:
    """Whether ranges are being recorded."""
    return _made is not None


@contextmanager
def ranges_as(make: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside this context, :func:`span` returns the context manager ``make(name)``."""
    global _made
    before, _made = _made, make
    try:
        yield
    finally:
        _made = before


def profiler_ranges() -> AbstractContextManager[None]:
    """Inside this context, ranges are recorded by torch.profiler."""
    return ranges_as(torch.profiler.record_function)
