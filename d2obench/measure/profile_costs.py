"""Costs of a profiled request by named range and by operator.

Each event's own cost (without what it calls) counts for the nearest named range around it, so the ranges of a phase
and its rest add up to the phase. Ranges are the engine's (``d2obench.ranges``) and the model's parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

PHASES = ("prefill", "compress", "decode")
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
PARTS = {
    "mlp": "MLP",
    "self_attn": "projections",
    "attention": "projections",
    "lm_head": "lm head",
    "embed_out": "lm head",
}
"""Last word of a module's name → its range; what the engine names inside it counts there and not here."""
RANGES = (*ENGINE_RANGES, *dict.fromkeys(PARTS.values()))
REST = "(rest)"
BETWEEN = "(between operators)"


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


CostTable = dict[str, dict[str, Cost]]
"""Phase → name of a range or an operator → its cost."""


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
        phase, name = _phase_and_range(event)
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
