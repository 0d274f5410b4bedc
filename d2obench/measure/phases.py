"""Times one request: prefill → compress → first token on the host → gen − 1 decode steps; and warms up for it.

* TTFT ends when the first token is on the host, so it includes compression; compression is also reported separately,
  even if a policy compresses layer by layer during prefill.
* ``gen`` tokens give exactly ``gen - 1`` decode steps, since the first token comes from the prefill's logits.
* On a GPU the host does not wait for the device between start and end: time stamps are events (``clock``), which are
  read once after the last step.
* ``sampled`` measures some steps at several depths of a long generation and integrates between them.

In a new process the first decode steps of a shape compile kernels, choose them, touch memory pages and raise clocks.
:func:`warm_up` therefore decodes one request a few steps at a time, until the medians of two successive groups of steps
agree. Both lie at nearly the same depth, so the growth of a cache does not make them differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch

from d2obench.cpu import memory as host_memory
from d2obench.errors import OutOfMemory, is_out_of_memory
from d2obench.measure.clock import Clock
from d2obench.measure.finite import require_finite
from d2obench.measure.memory import PHASES, GarbageCollection, MemoryProbe, Sampler, unique_bytes
from d2obench.measure.samples import RequestTrace, integrate

Mark = Callable[[str], None]
"""A session calls it with the name of the phase that begins."""


class Request(Protocol):
    """The methods of :class:`d2obench.cache.Session` that a measurement uses."""

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor: ...
    def compress(self) -> None: ...
    def step(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def skip_to(self, tokens: int) -> None: ...
    def footprint(self) -> Any: ...
    def close(self) -> None: ...


class Sampled(NamedTuple):
    """Which part of a long generation is measured.

    Args:
        depths: number of depths, spread evenly over the generation from its first step to its last.
        steps: decode steps measured at each depth.
    """

    depths: int
    steps: int


class PhaseTimeline:
    """Time stamps of one request, the phases that begin at some of them, and memory samples on the same time axis.

    Times are in seconds from the first stamp.
    """

    def __init__(self, clock: Clock, memory: MemoryProbe) -> None:
        self._clock, self.memory = clock, memory
        self.stamps: list[Any] = []
        self.marks: list[tuple[int, str]] = []
        self.phase: str | None = None
        self.origin = 0.0

    def stamp(self) -> int:
        """Takes a stamp and returns its index."""
        self.stamps.append(self._clock.stamp())
        return len(self.stamps) - 1

    def mark(self, phase: str) -> None:
        """Begins ``phase``, unless it is the one that runs already."""
        if phase != self.phase:
            self.memory.enter(phase if phase in PHASES else None)
            self.phase = phase
            self.marks.append((self.stamp(), phase))

    def read(self) -> list[float]:
        """Seconds of all stamps since the first one."""
        times = self._clock.read(self.stamps)
        self.origin = times[0]
        return [t - self.origin for t in times]

    def samples(self, sampler: Sampler | None) -> list[list[float | None]]:
        """A sampler's rows, with times from the first stamp; :meth:`read` must have been called before."""
        return [[(row[0] or 0.0) - self.origin, *row[1:]] for row in sampler.rows] if sampler else []


def measure_request(
    session_factory: Callable[[Mark], Request],
    prompts: list[list[int]],
    gen: int,
    *,
    clock: Clock,
    memory: MemoryProbe,
    force: torch.Tensor | None = None,
    sampled: Sampled | None = None,
    instructions: Callable[[], int] | None = None,
) -> RequestTrace:
    """Runs and times one batch of prompts.

    Args:
        session_factory: makes the session, which must call the :data:`Mark` given to it.
        prompts: token ids of each sequence; lengths may differ.
        gen: tokens each sequence generates, at least 1; greedy.
        clock: stamps of the session's device, see :func:`d2obench.measure.clock.clock_for`.
        memory: see :func:`d2obench.measure.memory.probe_for`.
        force: ``[B, gen]`` token ids fed in place of the greedy ones, so that all policies read the same text.
        sampled: the part of a long generation that is measured; a short generation is measured whole.
        instructions: counts them, see :func:`d2obench.measure.instructions.counting`.

    Raises:
        OutOfMemory: names the phase; all memory of the session has been freed.
        ModelError: the logits are not finite; names the first layer where this happened.
    """
    timeline = PhaseTimeline(clock, memory)
    session: Request | None = None
    why = ""
    try:
        with torch.inference_mode():
            session = session_factory(timeline.mark)
            GarbageCollection.begin_timing()
            memory.start()
            clock.start()
            return _run(session, timeline, prompts, gen, force, sampled, instructions)
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        why = str(problem).partition("\n")[0][:300]
    finally:
        GarbageCollection.end_timing()
        memory.stop()
        if session is not None:
            session.close()
    session = None  # raised here and not above, so that no traceback holds the request's tensors
    raise OutOfMemory(f"out of memory in {timeline.phase or 'setup'}", why=why or "no memory left")


@contextmanager
def out_of_memory_named() -> Iterator[Mark]:
    """For a session that is not timed: where memory runs out inside this context, OutOfMemory names the phase.

    Yields:
        The :data:`Mark` for the session.
    """
    last = ["setup"]
    try:
        yield lambda phase: last.__setitem__(0, phase)
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemory(f"out of memory in {last[0]}", why=str(problem).partition("\n")[0][:300]) from None


class _Step(NamedTuple):
    """A decode step: its index in the generation, and the indices of the time stamps before it, after the session's
    work and when the next token is known."""

    at: int
    before: int
    worked: int
    done: int


def _run(
    session: Request,
    timeline: PhaseTimeline,
    prompts: list[list[int]],
    gen: int,
    force: torch.Tensor | None,
    sampled: Sampled | None,
    instructions: Callable[[], int] | None,
) -> RequestTrace:
    # 1. Prefill, compression, and the first token on the host.
    timeline.mark("prefill")
    logits = session.prefill(prompts)
    timeline.mark("compress")
    session.compress()
    ids = torch.zeros(gen, len(prompts), dtype=torch.long, device=logits.device)
    torch.argmax(logits, -1, out=ids[0])
    _to_host(ids[0])
    timeline.mark("token")
    # 2. Between the phases, in no figure: capture a CUDA graph, which a server does once when it starts; on a CPU,
    #    return freed memory to the system.
    if logits.device.type == "cuda" and hasattr(session, "prepare"):
        timeline.mark("capture")
        session.prepare()
    elif logits.device.type == "cpu":
        host_memory.release()
    # 3. Decode steps: all of them, or some at each depth.
    starts = sampled_starts(gen - 1, sampled) if sampled else []
    width = sampled.steps if sampled and starts else gen - 1
    before = instructions() if instructions else 0
    steps, last = _decode(session, timeline, ids, force, starts or [0], width, logits)
    timeline.mark("end")
    counted = instructions() - before if instructions and not starts else 0

    # 4. Read the clock, then everything that would have disturbed the timing.
    times = timeline.read()
    end = session.footprint()
    timeline.memory.stop()
    produced = ids[[0, *(step.at + 1 for step in steps)]].cpu()
    require_finite(logits, "after the prompt", session, prompts)
    require_finite(last, "of the last decode step", session, prompts)
    # 5. From stamps to times; a sampled generation is integrated.
    step_s = [times[step.done] - times[step.before] for step in steps]
    decode_s = sum(step_s)
    if starts:
        decode_s = integrate(gen - 1, starts, [step_s[i : i + width] for i in range(0, len(step_s), width)])
    marks = [(times[i], phase) for i, phase in timeline.marks]
    ttft_s = next(t for t, phase in marks if phase == "token")
    return RequestTrace(
        batch=len(prompts),
        gen=gen,
        prompt_tokens=sum(map(len, prompts)),
        ttft_s=ttft_s,
        prefill_s=_spent("prefill", marks),
        compress_s=_spent("compress", marks),
        decode_s=decode_s,
        e2e_s=ttft_s + decode_s,
        loop_s=sum(times[step.done] - times[step.worked] for step in steps),
        step_s=step_s,
        step_at=[step.at for step in steps] if starts else [],
        marks=marks,
        peaks=timeline.memory.peaks,
        uss_bytes=unique_bytes(),
        kv_bytes=end.kv_bytes,
        kv_prompt_bytes=end.prompt_kv_bytes,
        state_bytes=end.state_bytes,
        requested=end.requested,
        effective=end.effective,
        kept=end.kept,
        held=end.held,
        over=end.over,
        merged=end.merged,
        evicted=end.evicted,
        merged_layers=end.merged_layers,
        evicted_layers=end.evicted_layers,
        kv_read_bytes=end.read_bytes,
        tokens_digest=hashlib.sha256(produced.numpy().astype("<i8").tobytes()).hexdigest(),
        flags=[],
        remarks=getattr(session, "remarks", []),
        decode_path=getattr(session, "decode_path", ""),
        instructions=counted / len(steps) if counted > 0 and steps else None,
        timeline=timeline.samples(timeline.memory.host),
        timeline_columns=timeline.memory.host.columns,
        device_timeline=timeline.samples(timeline.memory.device),
        device_columns=timeline.memory.device.columns if timeline.memory.device else (),
        sampler_overhead=timeline.memory.overhead,
    )


def _decode(
    session: Request,
    timeline: PhaseTimeline,
    ids: torch.Tensor,
    force: torch.Tensor | None,
    starts: list[int],
    width: int,
    logits: torch.Tensor,
) -> tuple[list[_Step], torch.Tensor]:
    """Measures ``width`` decode steps from each of ``starts`` on; writes the tokens into ``ids`` ``[gen, B]``.

    Returns:
        The steps, and the logits of the last one.
    """
    fed = force.T.contiguous().to(ids) if force is not None else ids
    steps: list[_Step] = []
    position = 0
    for start in starts:
        # 1. Jump to the next depth. The step after a jump is not measured, since it reads memory that no step has
        #    touched before.
        if start > position:
            timeline.mark("skip")
            session.skip_to(start - 1 - position)
            torch.argmax(session.step(fed[position]), -1, out=ids[start])
            position = start
        # 2. Measure; three stamps a step.
        timeline.mark("decode")
        before = timeline.stamp()
        for position in range(start, start + width):
            logits = session.step(fed[position])
            worked = timeline.stamp()
            torch.argmax(logits, -1, out=ids[position + 1])
            done = timeline.stamp()
            steps.append(_Step(position, before, worked, done))
            before = done
        position = start + width
    return steps, logits


def sampled_starts(total: int, sampled: Sampled) -> list[int]:
    """The first measured step at each depth of ``total`` decode steps; empty where that would be nearly all steps."""
    depths, steps = sampled
    if depths * (steps + 1) >= total:
        return []
    last = total - steps
    return [round(i * last / (depths - 1)) for i in range(depths)] if depths > 1 else [last // 2]


def _to_host(tokens: torch.Tensor) -> None:
    """Copies the first token to the host. On a GPU the copy is queued in the stream, so that the next time stamp comes
    after it."""
    if tokens.device.type == "cuda":
        torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    else:
        tokens.cpu()


def _spent(phase: str, marks: Sequence[tuple[float, str]]) -> float:
    """Seconds spent in ``phase``, which may have been entered several times."""
    return sum(after[0] - mark[0] for mark, after in pairwise(marks) if mark[1] == phase)


GROUP_STEPS, GROUPS = 4, 8
"""Decode steps of a group, and the largest number of groups."""
MOST_TOKENS = 1 + GROUP_STEPS * GROUPS


class WarmUp(NamedTuple):
    """Median decode step of each group in seconds, and whether the last two agree."""

    decode_s: list[float]
    stable: bool


def warm_up(
    session_factory: Callable[[], Request], prompts: list[list[int]], gen: int, *, clock: Clock, within: float
) -> WarmUp:
    """Runs one request until its decode steps no longer change.

    Args:
        session_factory: makes the session.
        prompts: token ids of each sequence.
        gen: largest number of tokens; where they are too few for two groups of steps, the request counts as not stable.
        clock: of the session's device.
        within: how far two successive medians may be apart, relative to the later one.
    """
    session = session_factory()
    try:
        with torch.inference_mode():
            logits = session.prefill(prompts)
            session.compress()
            return until_stable(_medians(session, logits.argmax(-1), min(gen, MOST_TOKENS) - 1, clock), within)
    finally:
        session.close()


def until_stable(medians: Iterator[float], within: float) -> WarmUp:
    """Takes medians until two successive ones agree, or none is left."""
    taken: list[float] = []
    for step_s in medians:
        taken.append(step_s)
        if len(taken) > 1 and abs(taken[-1] - taken[-2]) <= within * taken[-1]:
            return WarmUp(taken, True)
    return WarmUp(taken, False)


def _medians(session: Request, tokens: torch.Tensor, steps: int, clock: Clock) -> Iterator[float]:
    for _ in range(steps // GROUP_STEPS):
        clock.start()
        stamps = [clock.stamp()]
        for _ in range(GROUP_STEPS):
            tokens = session.step(tokens).argmax(-1)
            stamps.append(clock.stamp())
        times = clock.read(stamps)
        yield median(b - a for a, b in pairwise(times))
