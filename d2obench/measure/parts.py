"""Measures the time of each part of a request, without the parts that are nested in it.

The parts are the ranges that our code opens (``d2obench.ranges``) and the model's modules, around which hooks open
ranges. A time stamp is taken at both ends of every range: a clock reading on a CPU, an event in the stream on a GPU, so
that nothing waits for the device. A stamp costs microseconds. That cost is measured as well: blocks of steps with
ranges alternate with blocks without. If one kernel does the work of several parts, its time is counted for the range
around it. A CUDA graph has no ranges inside, so steps with ranges run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch

from d2obench.measure.clock import Clock
from d2obench.measure.finite import require_finite
from d2obench.measure.phases import Mark, Request
from d2obench.ranges import MODEL_PARTS, ranges_as, span

MODEL, LOOP = "rest of the model", "loop"
PART_OF_RANGE = {
    "prefill attention": "attention",
    "decode attention": "attention",
    "allocate": "allocation",
    "evict": "eviction",
    "bookkeeping": "rest of the policy",
    "compression": "rest of the policy",
}
"""Range → part. Ranges that are not listed are parts of the same name."""
WARM_STEPS = 2
Seconds = dict[str, float]


class Block(NamedTuple):
    """Some decode steps (or a prefill): their time in seconds, and the time of each part, empty without ranges."""

    whole: float
    parts: Seconds


class RequestCost(NamedTuple):
    """One request: prefill with compression, and blocks of ``steps`` decode steps, with and without ranges in turn."""

    prompt: Block
    decode: list[Block]
    steps: int


class PartTimer:
    """Takes time stamps at both ends of every range, and adds up the time of each part afterwards."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ends: list[tuple[Any, str | None]] = []
        self._ranges: dict[str, _Range] = {}

    def range(self, name: str) -> AbstractContextManager[object]:
        """A context that takes a stamp when it begins and when it ends."""
        if name not in self._ranges:
            self._ranges[name] = _Range(self, PART_OF_RANGE.get(name, name))
        return self._ranges[name]

    def stamp(self, part: str | None) -> None:
        """Takes a stamp: a range of ``part`` begins, or with None the innermost range ends."""
        self._ends.append((self._clock.stamp(), part))

    def own_times(self) -> Seconds:
        """Seconds of each part since the last call, without nested parts and without the time outside of all ranges."""
        times = self._clock.read([stamp for stamp, _ in self._ends])
        seconds: Seconds = {}
        open_parts: list[str] = []
        before = 0.0
        for now, (_, part) in zip(times, self._ends, strict=True):
            # 1. The time since the last stamp belongs to the innermost part that is open.
            if open_parts:
                seconds[open_parts[-1]] = seconds.get(open_parts[-1], 0.0) + now - before
            # 2. At this stamp a part begins or the innermost one ends.
            if part is None:
                open_parts.pop()
            else:
                open_parts.append(part)
            before = now
        self._ends.clear()
        return seconds


class _Range:
    """The context of one part. It has no state, so it can be entered again, even inside itself."""

    __slots__ = ("_part", "_timer")

    def __init__(self, timer: PartTimer, part: str) -> None:
        self._timer, self._part = timer, part

    def __enter__(self) -> None:
        self._timer.stamp(self._part)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.stamp(None)


def cost_of_parts(
    session_factory: Callable[[Mark], Request],
    model: torch.nn.Module,
    prompts: list[list[int]],
    *,
    steps: int,
    blocks: int,
    clock: Clock,
) -> RequestCost:
    """Runs one request and measures what its parts cost.

    Args:
        session_factory: as in :func:`d2obench.measure.phases.measure_request`; for ``2 + steps × blocks`` new tokens.
        model: its model.
        prompts: token ids of each sequence.
        steps: decode steps of a block.
        blocks: number of blocks; every other one has its ranges on.
        clock: of the model's device.

    Raises:
        ModelError: the logits are not finite; names the first layer where this happened.
    """
    timer = PartTimer(clock)
    session = session_factory(lambda phase: None)
    try:
        with torch.inference_mode():
            # 1. Prefill and compression, with ranges.
            clock.start()
            with ranges_as(timer.range), parts_named(model, MODEL), span(LOOP):
                logits, tokens = _prefill(session, prompts)
            own = timer.own_times()
            prompt = Block(sum(own.values()), own)
            require_finite(logits, "after the prompt", session, prompts)
            # 2. A few decode steps warm up.
            for _ in range(WARM_STEPS):
                tokens = session.step(tokens).argmax(-1)
            # 3. Blocks of steps, with and without ranges in turn.
            decode = []
            for number in range(blocks):
                tokens, block = _block(session, model, tokens, steps, timer if number % 2 == 0 else None, clock)
                decode.append(block)
    finally:
        session.close()
    return RequestCost(prompt, decode, steps)


def _prefill(session: Request, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = session.prefill(prompts)
    with span("compression"):
        session.compress()
    return logits, logits.argmax(-1)


def _block(
    session: Request, model: torch.nn.Module, tokens: torch.Tensor, steps: int, timer: PartTimer | None, clock: Clock
) -> tuple[torch.Tensor, Block]:
    clock.start()
    if timer is None:
        before = clock.stamp()
        for _ in range(steps):
            tokens = session.step(tokens).argmax(-1)
        start, end = clock.read([before, clock.stamp()])
        return tokens, Block(end - start, {})
    with ranges_as(timer.range), parts_named(model, MODEL), span(LOOP):
        for _ in range(steps):
            tokens = session.step(tokens).argmax(-1)
    own = timer.own_times()
    return tokens, Block(sum(own.values()), own)


@contextmanager
def parts_named(model: torch.nn.Module, whole: str = "") -> Iterator[None]:
    """Opens ranges around the model's modules while they run, by hooks that exist in this context only.

    Args:
        model: whose modules in ``d2obench.ranges.MODEL_PARTS`` get ranges.
        whole: the name of a range around the model itself; none by default.
    """
    opened: list[AbstractContextManager[object]] = []
    hooks = []

    def close(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    for path, module in model.named_modules():
        name = MODEL_PARTS.get(path.rpartition(".")[2]) if path else whole
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
