"""What each part of a request costs: stamps where its ranges begin and end, own time booked on the innermost one.

Ranges are the engine's (``d2obench.ranges``) and the model's own parts, named by hooks. A stamp is a reading of the
clock on a CPU and an event in the stream on a GPU: no wait, no profiler. That costs microseconds a range; how much, is
measured by taking turns with blocks of steps whose ranges are off. Where one kernel does several parts at once they are
booked on the range around it. A captured graph has no ranges, so steps whose ranges are on run without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch

from d2obench.measure.clock import Clock
from d2obench.measure.phases import Mark, Request
from d2obench.measure.profile_costs import PARTS
from d2obench.ranges import into, span

MODEL, LOOP = "rest of the model", "loop"
NAMES = {
    "prefill attention": "attention",
    "decode attention": "attention",
    "allocate": "allocation",
    "evict": "eviction",
    "bookkeeping": "rest of the policy",
    "compression": "rest of the policy",
}
"""Ranges whose part has another name; the others are called as they are."""
WARM = 2
Seconds = dict[str, float]


class Block(NamedTuple):
    """Seconds of some decode steps: all of them, and where ranges were on, own time by part (else empty)."""

    whole: float
    parts: Seconds


class Costs(NamedTuple):
    """One request: prefill with compression by part, and its blocks of decode steps, ranges on and off in turn."""

    prompt: Block
    decode: list[Block]
    steps: int


class Book:
    """Collects stamps at the ends of ranges and adds up own times afterwards."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ends: list[tuple[Any, str | None]] = []
        self._ranges: dict[str, _Range] = {}

    def range(self, name: str) -> AbstractContextManager[object]:
        """A range that stamps when it begins and when it ends."""
        if name not in self._ranges:
            self._ranges[name] = _Range(self, NAMES.get(name, name))
        return self._ranges[name]

    def stamp(self, name: str | None) -> None:
        """A range begins, or the innermost one ends."""
        self._ends.append((self._clock.stamp(), name))

    def own(self) -> Seconds:
        """Seconds by part since the last call; time outside of every range is not among them."""
        times = self._clock.read([stamp for stamp, _ in self._ends])
        found: Seconds = {}
        stack: list[str] = []
        before = 0.0
        for now, (_, name) in zip(times, self._ends, strict=True):
            if stack:
                found[stack[-1]] = found.get(stack[-1], 0.0) + now - before
            if name is None:
                stack.pop()
            else:
                stack.append(name)
            before = now
        self._ends.clear()
        return found


class _Range:
    """Reusable and reentrant: all it knows is its name."""

    __slots__ = ("_book", "_name")

    def __init__(self, book: Book, name: str) -> None:
        self._book, self._name = book, name

    def __enter__(self) -> None:
        self._book.stamp(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._book.stamp(None)


def cost_of_parts(
    session_factory: Callable[[Mark], Request],
    model: torch.nn.Module,
    prompts: list[list[int]],
    *,
    steps: int,
    blocks: int,
    clock: Clock,
) -> Costs:
    """Runs one request and books it.

    Args:
        session_factory: as of :func:`d2obench.measure.phases.measure_request`; for ``2 + steps × blocks`` new tokens.
        model: its model.
        prompts: token ids of each sequence.
        steps: decode steps of a block.
        blocks: how many; every other one has its ranges on.
        clock: of the model's device.
    """
    book = Book(clock)
    session = session_factory(lambda phase: None)
    try:
        with torch.inference_mode():
            clock.start()
            with into(book.range), parts_named(model, MODEL), span(LOOP):
                tokens = _read(session, prompts)
            own = book.own()
            prompt = Block(sum(own.values()), own)
            for _ in range(WARM):
                tokens = session.step(tokens).argmax(-1)
            decode = []
            for number in range(blocks):
                tokens, block = _block(session, model, tokens, steps, book if number % 2 == 0 else None, clock)
                decode.append(block)
    finally:
        session.close()
    return Costs(prompt, decode, steps)


def _read(session: Request, prompts: list[list[int]]) -> torch.Tensor:
    logits = session.prefill(prompts)
    with span("compression"):
        session.compress()
    return logits.argmax(-1)


def _block(
    session: Request, model: torch.nn.Module, tokens: torch.Tensor, steps: int, book: Book | None, clock: Clock
) -> tuple[torch.Tensor, Block]:
    clock.start()
    if book is None:
        before = clock.stamp()
        for _ in range(steps):
            tokens = session.step(tokens).argmax(-1)
        start, end = clock.read([before, clock.stamp()])
        return tokens, Block(end - start, {})
    with into(book.range), parts_named(model, MODEL), span(LOOP):
        for _ in range(steps):
            tokens = session.step(tokens).argmax(-1)
    own = book.own()
    return tokens, Block(sum(own.values()), own)


@contextmanager
def parts_named(model: torch.nn.Module, whole: str = "") -> Iterator[None]:
    """Ranges around the model's parts, and around ``whole`` of it, by hooks that are there inside the block only."""
    opened: list[AbstractContextManager[object]] = []
    hooks = []

    def close(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    for path, module in model.named_modules():
        name = PARTS.get(path.rpartition(".")[2]) if path else whole
        if name:

            def enter(*_: object, name: str = name) -> None:
                opened.append(span(name))
                opened[-1].__enter__()

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(close, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
