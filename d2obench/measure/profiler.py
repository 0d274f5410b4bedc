"""Where the time and memory of a request go: torch.profiler over prefill, compression and a few decode steps.

The model's parts are named by hooks while profiling and only then; the engine names its own (``d2obench.ranges``).
Profiling slows everything down: shares are what to read, not times.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from d2obench.measure.booking import Booked, book
from d2obench.measure.counters import StepCounts, count_step
from d2obench.measure.parts import parts_named
from d2obench.measure.phases import Mark, Request
from d2obench.measure.stacks import fold
from d2obench.ranges import naming

_WARM_UP = "warm-up"


class Profile(NamedTuple):
    """One request: phase → range → cost, phase → operator → cost, and what a decode step does, counted."""

    ranges: Booked
    operators: Booked
    steps: int
    counts: StepCounts


class Files(NamedTuple):
    """Where to write what other tools read; None leaves it out."""

    trace: Path | None = None
    stacks: Path | None = None
    snapshot: Path | None = None


def profile_request(
    session_factory: Callable[[Mark], Request],
    model: torch.nn.Module,
    prompts: list[list[int]],
    *,
    steps: int = 4,
    files: Files | None = None,
) -> Profile:
    """Profiles one request.

    Args:
        session_factory: makes the session, as in :func:`d2obench.measure.phases.measure_request`.
        model: its model, whose parts get names while it runs.
        prompts: token ids of each sequence.
        steps: decode steps, after two that warm up; a whole request warms up before.
        files: a Chrome trace (Perfetto reads it), folded stacks for a flame graph, and on CUDA a memory snapshot.
    """
    files = files or Files()
    cuda = next(model.parameters()).device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    wait = torch.cuda.synchronize if cuda else _nothing

    def run(**settings: Any) -> Any:
        with ExitStack() as stack:
            for each in (_quiet(), torch.inference_mode(), naming(), parts_named(model)):
                stack.enter_context(each)
            session = session_factory(lambda phase: None)
            stack.callback(session.close)
            _request(session, prompts, 0, wait)
            found = stack.enter_context(profile(activities=activities, acc_events=True, **settings))
            _request(session, prompts, steps, wait)
        return found

    with _memory_history(files.snapshot if cuda else None):
        found = run(profile_memory=True)
    if files.trace:
        found.export_chrome_trace(str(files.trace))
    if files.stacks:  # a run of its own: following Python's stack distorts the figures
        verbose = torch._C._profiler._ExperimentalConfig(verbose=True)
        stacked = run(with_stack=True, experimental_config=verbose)
        stacked.export_stacks(str(files.stacks), "self_cuda_time_total" if cuda else "self_cpu_time_total")
        fold(files.stacks, f":_{_request.__name__}")
    session = session_factory(lambda phase: None)
    try:
        counts = count_step(session, prompts)
    finally:
        session.close()
    return Profile(*book(found.events() or [], steps), steps, counts)


def nvtx_request(
    session_factory: Callable[[Mark], Request], model: torch.nn.Module, prompts: list[list[int]], *, steps: int = 4
) -> None:
    """Runs the same request with its ranges and operators sent to Nsight Systems; for use under ``nsys profile``."""
    sent = torch.autograd.profiler.emit_nvtx()  # type: ignore[no-untyped-call]
    with torch.inference_mode(), naming(), parts_named(model), sent:
        session = session_factory(lambda phase: None)
        try:
            _request(session, prompts, steps, torch.cuda.synchronize)
        finally:
            session.close()


def _request(session: Request, prompts: list[list[int]], steps: int, wait: Callable[[], None]) -> None:
    with record_function("prefill"):
        logits = session.prefill(prompts)
        wait()
    with record_function("compress"):
        session.compress()
        wait()
    tokens = logits.argmax(-1)
    for i in range(2 + steps):
        with record_function("decode" if i >= 2 else _WARM_UP):
            tokens = session.step(tokens).argmax(-1)
            wait()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the profiler library's own lines, written past Python, off the terminal."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@contextmanager
def _memory_history(path: Path | None) -> Iterator[None]:
    """The CUDA allocator's history, for the viewer that PyTorch's documentation names; nothing here reads it."""
    if path is None:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)  # type: ignore[call-overload,unused-ignore]


def _nothing() -> None:
    """A CPU is never behind."""
