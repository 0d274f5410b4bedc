"""Runs torch.profiler over prefill, compression and a few decode steps, and adds up the costs by range and operator.

Our code opens named ranges (``d2obench.ranges``); hooks open ranges around the model's modules while profiling. The
cost of each event, without the events it calls, is counted for the innermost range around it, so that the ranges of a
phase and its rest add up to the phase. Profiling slows everything down, so read the shares and not the times.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from d2obench.measure.counters import StepCounts, count_step
from d2obench.measure.memory import PHASES
from d2obench.measure.parts import parts_named
from d2obench.measure.phases import Mark, Request
from d2obench.ranges import RANGES, profiler_ranges

_WARM_UP = "warm-up"
REST = "(rest)"
BETWEEN = "(between operators)"
_INSTANCE = re.compile(r"_at_0x[0-9a-f]+|(?<=nn\.Module:_)(\w+?)_\d+(?=;|$)")
"""An object's address, and the number that torch gives each module of a class."""


class Cost(NamedTuple):
    """Cost of a range or an operator in one phase (of one step in decode), without what it calls; seconds and bytes."""

    calls: float
    cpu_s: float
    device_s: float
    allocated_bytes: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def per(self, steps: int) -> Cost:
        return Cost(*(value / steps for value in self))


CostTable = dict[str, dict[str, Cost]]
"""Phase → name of a range or an operator → its cost."""


class Profile(NamedTuple):
    """One request: costs by phase and range, costs by phase and operator, and the counts of one decode step."""

    ranges: CostTable
    operators: CostTable
    steps: int
    counts: StepCounts


class Files(NamedTuple):
    """Files to write for other tools; None leaves one out.

    Args:
        trace: a Chrome trace, which Perfetto reads.
        stacks: folded stacks, for a flame graph.
        snapshot: a memory snapshot, on CUDA only.
    """

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
        model: its model, whose parts are named while it runs.
        prompts: token ids of each sequence.
        steps: decode steps to profile. A whole request and two decode steps run before them to warm up.
        files: what to write beside the profile.
    """
    files = files or Files()
    cuda = next(model.parameters()).device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    wait = torch.cuda.synchronize if cuda else lambda: None

    def run(**settings: Any) -> Any:
        with ExitStack() as stack:
            for each in (_quiet(), torch.inference_mode(), profiler_ranges(), parts_named(model)):
                stack.enter_context(each)
            session = session_factory(lambda phase: None)
            stack.callback(session.close)
            _request(session, prompts, 0, wait)
            profiled = stack.enter_context(profile(activities=activities, acc_events=True, **settings))
            _request(session, prompts, steps, wait)
        return profiled

    with _memory_history(files.snapshot if cuda else None):
        profiled = run(profile_memory=True)
    if files.trace:
        profiled.export_chrome_trace(str(files.trace))
    if files.stacks:  # in a second run, because following Python's stack distorts the figures
        verbose = torch._C._profiler._ExperimentalConfig(verbose=True)
        stacked = run(with_stack=True, experimental_config=verbose)
        stacked.export_stacks(str(files.stacks), "self_cuda_time_total" if cuda else "self_cpu_time_total")
        fold_stacks(files.stacks, f":_{_request.__name__}")
    session = session_factory(lambda phase: None)
    try:
        counts = count_step(session, prompts)
    finally:
        session.close()
    return Profile(*costs_of(profiled.events() or [], steps), steps, counts)


def nvtx_request(
    session_factory: Callable[[Mark], Request], model: torch.nn.Module, prompts: list[list[int]], *, steps: int = 4
) -> None:
    """Runs the same request and sends its ranges and operators to Nsight Systems; for use under ``nsys profile``."""
    sent = torch.autograd.profiler.emit_nvtx()  # type: ignore[no-untyped-call]
    with torch.inference_mode(), profiler_ranges(), parts_named(model), sent:
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
    """Silences the profiler's C++ library, which writes to the file descriptor of stderr and not to Python's."""
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
    """Writes the CUDA allocator's history to ``path``, for the viewer at pytorch.org/memory_viz."""
    if path is None:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)  # type: ignore[call-overload,unused-ignore]


def fold_stacks(path: Path, root: str) -> None:
    """Rewrites ``path`` as the input of a flame graph: every stack once, and only what lies below ``root``.

    Stacks that differ only in which layer or object they belong to are added up, so thirty layers make one tower.

    Args:
        path: lines of ``frame;frame;frame microseconds``, as torch.profiler writes them.
        root: the end of a frame's name; stacks without such a frame are left out.
    """
    spent: Counter[str] = Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            stack, _, cost = line.rstrip("\n").rpartition(" ")
            frames = stack.split(";")
            at = next((i for i, frame in enumerate(frames) if frame.endswith(root)), len(frames))
            if cost.isdigit() and frames[at + 1 :]:
                spent[_INSTANCE.sub(r"\1", ";".join(frames[at + 1 :]))] += int(cost)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{stack} {cost}\n" for stack, cost in sorted(spent.items()))


def costs_of(events: Any, steps: int) -> tuple[CostTable, CostTable]:
    """Adds up the events of a profile.

    Args:
        events: of torch.profiler.
        steps: decode steps among them; costs of the phase ``decode`` are those of one step.

    Returns:
        The costs by range, and the costs by operator.
    """
    ranges: CostTable = {phase: {} for phase in PHASES}
    operators: CostTable = {phase: {} for phase in PHASES}
    nothing = Cost(0, 0, 0, 0)
    for event in events:
        # 1. The phase that the event lies in, and the innermost range; events outside of all phases don't count.
        phase, name = _phase_and_range(event)
        if phase is None:
            continue
        # 2. The cost of the event itself. A kernel with the name of the event is the range as seen by the device, and
        #    no work.
        cost = Cost(
            0,
            event.self_cpu_time_total * 1e-6,
            sum(kernel.duration for kernel in event.kernels if kernel.name != event.name) * 1e-6,
            max(0, event.self_cpu_memory_usage) + max(0, event.self_device_memory_usage),
        )
        # 3. Add it to its range and to its operator. What a range costs outside of operators is Python and dispatch.
        each = steps if phase == "decode" else 1
        named, operator = event.name in RANGES, event.name
        if named or event.name in PHASES:
            operator = BETWEEN
        own = cost._replace(calls=1 if named else 0).per(each)
        ranges[phase][name] = ranges[phase].get(name, nothing) + own
        own = cost._replace(calls=0 if operator == BETWEEN else 1).per(each)
        operators[phase][operator] = operators[phase].get(operator, nothing) + own
    return ranges, operators


def _phase_and_range(event: Any) -> tuple[str | None, str]:
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
