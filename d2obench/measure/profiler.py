"""Where the time and memory of a request go: torch.profiler over prefill, compression and a few decode steps.

Each event's own cost (without what it calls) is booked on the nearest named range around it, so the ranges of a phase
and its rest add up to the phase. Ranges are the engine's (``d2obench.ranges``) and the model's parts, named by
hooks while profiling and only then. Profiling slows everything down: shares are what to read, not times.
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

from d2obench.measure.counters import StepCounts, count_step
from d2obench.measure.phases import Mark, Request
from d2obench.measure.stacks import fold
from d2obench.ranges import naming

PHASES = ("prefill", "compress", "decode")
ENGINE_RANGES = (
    "prefill attention",
    "scores",
    "allocate",
    "similarity",
    "evict",
    "merge",
    "decode attention",
)
_PARTS = {
    "mlp": "MLP",
    "self_attn": "projections",
    "attention": "projections",
    "lm_head": "lm head",
    "embed_out": "lm head",
}
"""Last word of a module's name → its range; what the engine names inside is booked there and not here."""
RANGES = (*ENGINE_RANGES, *dict.fromkeys(_PARTS.values()))
REST = "(rest)"
BETWEEN = "(between operators)"
_WARM_UP = "warm-up"


class Cost(NamedTuple):
    """Own cost of a range or operator in one phase; for decode, of one step. Seconds and bytes."""

    calls: float
    cpu_s: float
    device_s: float
    allocated_bytes: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def per(self, steps: int) -> Cost:
        return Cost(*(value / steps for value in self))


Booked = dict[str, dict[str, Cost]]


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
            for each in (_quiet(), torch.inference_mode(), naming(), _parts_named(model)):
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
    return Profile(*_booked(found.events() or [], steps), steps, counts)


def nvtx_request(
    session_factory: Callable[[Mark], Request], model: torch.nn.Module, prompts: list[list[int]], *, steps: int = 4
) -> None:
    """Runs the same request with its ranges and operators sent to Nsight Systems; for use under ``nsys profile``."""
    sent = torch.autograd.profiler.emit_nvtx()  # type: ignore[no-untyped-call]
    with torch.inference_mode(), naming(), _parts_named(model), sent:
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
def _parts_named(model: torch.nn.Module) -> Iterator[None]:
    opened: list[record_function] = []
    hooks = []

    def close(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    for path, module in model.named_modules():
        name = _PARTS.get(path.rpartition(".")[2])
        if name:

            def enter(*_: object, name: str = name) -> None:
                opened.append(record_function(name))
                opened[-1].__enter__()  # type: ignore[no-untyped-call]

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(close, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


def _booked(events: Any, steps: int) -> tuple[Booked, Booked]:
    """Costs by range and by operator."""
    ranges: Booked = {phase: {} for phase in PHASES}
    operators: Booked = {phase: {} for phase in PHASES}
    nothing = Cost(0, 0, 0, 0)
    for event in events:
        phase, name = _place(event)
        if phase is None:
            continue
        cost = Cost(
            0,
            event.self_cpu_time_total * 1e-6,
            sum(kernel.duration for kernel in event.kernels if kernel.name != event.name) * 1e-6,  # less its range
            max(0, event.self_cpu_memory_usage) + max(0, event.self_device_memory_usage),
        )
        each = steps if phase == "decode" else 1
        named, operator = event.name in RANGES, event.name
        if named or event.name in PHASES:  # own time of a range: Python and the dispatcher
            operator = BETWEEN
        booked = cost._replace(calls=1 if named else 0).per(each)
        ranges[phase][name] = ranges[phase].get(name, nothing) + booked
        booked = cost._replace(calls=0 if operator == BETWEEN else 1).per(each)
        operators[phase][operator] = operators[phase].get(operator, nothing) + booked
    return ranges, operators


def _place(event: Any) -> tuple[str | None, str]:
    """The phase an event lies in, None outside of all, and the innermost range around it."""
    name, at = REST, event
    if event.device_type != torch._C._autograd.DeviceType.CPU:
        return None, name
    while at is not None:
        if at.name in PHASES:
            return at.name, name
        if name == REST and at.name in RANGES:
            name = at.name
        at = at.cpu_parent
    return None, name
