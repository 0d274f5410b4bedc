"""One request, timed: prefill → compress → first token on the host → gen − 1 decode steps.

* TTFT ends when the first token is on the host, so it includes compression; compression is also reported separately,
  even if a policy compresses layer by layer during prefill.
* ``gen`` tokens give exactly ``gen - 1`` gaps. The first token comes from the prefill's logits and is never a gap.
* On a GPU nothing waits for the device between start and end: stamps are events (``clock``), read once after the last
  step.
* ``sampled`` measures some steps at several depths of a long generation and integrates between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from d2obench.cpu import memory as host_memory
from d2obench.errors import OutOfMemory
from d2obench.measure.clock import Clock, PhaseTimeline
from d2obench.measure.finite import require_finite
from d2obench.measure.memory import GarbageCollection, MemoryProbe, is_out_of_memory, unique_bytes
from d2obench.measure.trace import RequestTrace
from d2obench.measure.windows import integrate

Mark = Callable[[str], None]


class Request(Protocol):
    """What a measurement needs of :class:`d2obench.cache.Session`."""

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor: ...
    def compress(self) -> None: ...
    def step(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def skip_to(self, tokens: int) -> None: ...
    def footprint(self) -> Any: ...
    def close(self) -> None: ...


class Sampled(NamedTuple):
    """Which part of a long generation is measured.

    Args:
        depths: at how many depths of the generation, evenly spread, the first and the last step among them.
        steps: decode steps measured at each depth.
    """

    depths: int
    steps: int


def measure_request(
    session_factory: Callable[[Mark], Request],
    prompts: list[list[int]],
    gen: int,
    *,
    clock: Clock,
    memory: MemoryProbe,
    force: torch.Tensor | None = None,
    sampled: Sampled | None = None,
) -> RequestTrace:
    """Runs and times one batch of prompts.

    Args:
        session_factory: makes the session; it is given the ``mark`` callback to pass on.
        prompts: token ids of each sequence; lengths may differ.
        gen: tokens each sequence generates, at least 1; greedy.
        clock: stamps of the session's device, see :func:`d2obench.measure.clock.clock_for`.
        memory: see :func:`d2obench.measure.memory.probe_for`.
        force: ``[B, gen]`` token ids fed in place of the greedy ones, so that all policies read the same text.
        sampled: measure only this part of a long generation; where it would be all of it, every step is measured.

    Raises:
        OutOfMemory: names the phase. The session is closed and nothing of it is kept alive.
        ModelError: the logits are not finite; names the first layer where this happened.
    """
    line = PhaseTimeline(clock, memory)
    session: Request | None = None
    shortage = ""
    try:
        with torch.inference_mode():
            session = session_factory(line.mark)
            GarbageCollection.begin_timing()
            memory.start()
            clock.start()
            return _run(session, line, prompts, gen, force, sampled)
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        shortage = str(problem).partition("\n")[0][:300]
    finally:
        GarbageCollection.end_timing()
        memory.stop()
        if session is not None:
            session.close()
    session = None  # the error is raised below, so that no traceback keeps the request's tensors alive
    raise OutOfMemory(f"out of memory in {line.phase or 'setup'}", why=shortage or "no memory left")


@contextmanager
def shortage_named() -> Iterator[Mark]:
    """Gives a ``mark`` for a session that is not timed; running out of memory inside raises OutOfMemory with the
    phase."""
    last = ["setup"]
    try:
        yield lambda phase: last.__setitem__(0, phase)
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemory(f"out of memory in {last[0]}", why=str(problem).partition("\n")[0][:300]) from None


class _Step(NamedTuple):
    """A decode step: its index in the generation, and stamps before it, after the session's work, and at the next
    token."""

    at: int
    before: int
    worked: int
    done: int


def _run(
    session: Request,
    line: PhaseTimeline,
    prompts: list[list[int]],
    gen: int,
    force: torch.Tensor | None,
    sampled: Sampled | None,
) -> RequestTrace:
    line.mark("prefill")
    logits = session.prefill(prompts)
    line.mark("compress")
    session.compress()
    ids = torch.zeros(gen, len(prompts), dtype=torch.long, device=logits.device)
    torch.argmax(logits, -1, out=ids[0])
    _to_host(ids[0])
    line.mark("token")
    if logits.device.type == "cuda" and hasattr(session, "prepare"):
        line.mark("capture")  # counted in no figure, because a server captures once when it starts
        session.prepare()
    elif logits.device.type == "cpu":
        host_memory.release()  # counted in no figure, because decoding has not begun yet
    starts = sampled_starts(gen - 1, sampled) if sampled else []
    width = sampled.steps if sampled and starts else gen - 1
    steps, last = _decode(session, line, ids, force, starts or [0], width, logits)
    line.mark("end")

    times = line.read()
    end = session.footprint()
    line.memory.stop()
    produced = ids[[0, *(step.at + 1 for step in steps)]].cpu()
    require_finite(logits, "after the prompt", session, prompts)
    require_finite(last, "of the last decode step", session, prompts)
    step_s = [times[step.done] - times[step.before] for step in steps]
    decode_s = sum(step_s)
    if starts:
        decode_s = integrate(gen - 1, starts, [step_s[i : i + width] for i in range(0, len(step_s), width)])
    marks = [(times[i], phase) for i, phase in line.marks]
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
        peaks=line.memory.peaks,
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
        tokens_digest=hashlib.sha256(produced.numpy().astype("<i8").tobytes()).hexdigest(),
        flags=[],
        remarks=getattr(session, "remarks", []),
        decode_path=getattr(session, "decode_path", ""),
        timeline=line.samples(line.memory.host),
        timeline_columns=line.memory.host.columns,
        device_timeline=line.samples(line.memory.device),
        device_columns=line.memory.device.columns if line.memory.device else (),
        sampler_overhead=line.memory.overhead,
    )


def _decode(
    session: Request,
    line: PhaseTimeline,
    ids: torch.Tensor,
    force: torch.Tensor | None,
    starts: list[int],
    width: int,
    logits: torch.Tensor,
) -> tuple[list[_Step], torch.Tensor]:
    """Measures ``width`` steps from each of ``starts`` into ``ids`` ``[gen, B]``; returns them and the last logits."""
    fed = force.T.contiguous().to(ids) if force is not None else ids
    steps: list[_Step] = []
    position = 0
    for start in starts:
        if start > position:  # the first step after a jump reads memory no step has touched: it is not measured
            line.mark("skip")
            session.skip_to(start - 1 - position)
            torch.argmax(session.step(fed[position]), -1, out=ids[start])
            position = start
        line.mark("decode")
        before = line.stamp()
        for position in range(start, start + width):
            logits = session.step(fed[position])
            worked = line.stamp()
            torch.argmax(logits, -1, out=ids[position + 1])
            done = line.stamp()
            steps.append(_Step(position, before, worked, done))
            before = done
        position = start + width
    return steps, logits


def sampled_starts(total: int, sampled: Sampled) -> list[int]:
    """The first step measured at each depth of ``total`` decode steps; empty where every step would be measured."""
    depths, steps = sampled
    if depths * (steps + 1) >= total:
        return []
    last = total - steps
    return [round(i * last / (depths - 1)) for i in range(depths)] if depths > 1 else [last // 2]


def _to_host(tokens: torch.Tensor) -> None:
    """Copies the first token to the host; on a GPU this is a copy in the stream, after which the next stamp is
    taken."""
    if tokens.device.type == "cuda":
        torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    else:
        tokens.cpu()


def _spent(phase: str, marks: Sequence[tuple[float, str]]) -> float:
    """Seconds spent in ``phase`` over all its stretches."""
    return sum(after[0] - mark[0] for mark, after in pairwise(marks) if mark[1] == phase)
