"""Does the measurement find what it should? A request whose phases take known times goes through it like any other."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from d2obench.measure.clock import clock_for
from d2obench.measure.memory import probe_for
from d2obench.measure.phases import Mark, measure_request

_UNIT = 0.005
_BATCH, _GEN = 2, 16


class Found(NamedTuple):
    """What a phase took and what was measured, in seconds."""

    true: float
    found: float

    @property
    def right(self) -> bool:
        """Within 5 % and half a millisecond."""
        return abs(self.found - self.true) <= 0.05 * self.true + 0.0005


def known_delays(device: torch.device) -> dict[str, Found]:
    """Times a request of four units of prefill, two of compression and one of each step.

    On a CPU a unit is a wait of 5 ms or, where others take the CPU, what it came to by a clock of its own. On a GPU it
    is a kernel that spins and that the host does not wait for; how long that takes is measured apart, by the wall
    clock around one that is waited for.
    """
    spend = _kernel(device) if device.type == "cuda" else _wait
    sessions: list[_Delays] = []

    def factory(mark: Mark) -> _Delays:
        sessions.append(_Delays(mark, spend, device))
        return sessions[0]

    trace = measure_request(factory, [[1]] * _BATCH, _GEN, clock=clock_for(device), memory=probe_for(device))
    spent = sessions[0].spent
    return {
        "TTFT": Found(sum(spent["prefill"]) + sum(spent["compress"]), trace.ttft_s),
        "prefill": Found(sum(spent["prefill"]), trace.prefill_s),
        "compress": Found(sum(spent["compress"]), trace.compress_s),
        "TPOT": Found(median(spent["decode"]), median(trace.step_s)),
    }


class _Delays:
    """A session that does nothing but take time; prefill and compression alternate as in a layer-wise policy."""

    def __init__(self, mark: Mark, spend: Callable[[], float], device: torch.device) -> None:
        self._mark, self._spend = mark, spend
        self._logits = torch.zeros(_BATCH, 8, device=device)
        self.spent: dict[str, list[float]] = {"prefill": [], "compress": [], "decode": []}

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        for phase in ("prefill", "prefill", "compress", "prefill", "prefill"):
            self._mark(phase)
            self.spent[phase].append(self._spend())
        return self._logits

    def compress(self) -> None:
        self._mark("compress")
        self.spent["compress"].append(self._spend())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.spent["decode"].append(self._spend())
        return self._logits

    def skip_to(self, tokens: int) -> None:
        """Every step takes the same."""

    def footprint(self) -> Any:
        return SimpleNamespace(
            kv_bytes=0, prompt_kv_bytes=0, state_bytes=0, requested=None, effective=1.0, kept=[], held=[], over=False,
            merged=0, evicted=0, merged_layers=[], evicted_layers=[],
        )  # fmt: skip

    def close(self) -> None:
        """Nothing is held."""


def _wait() -> float:
    start = time.monotonic_ns()
    while (taken := time.monotonic_ns() - start) < _UNIT * 1e9:
        pass
    return taken * 1e-9


def _kernel(device: torch.device) -> Callable[[], float]:
    """Launches a kernel of about a unit; returns how long it takes: the best of ten by the wall clock."""

    def launch(cycles: int) -> None:
        with torch.cuda.device(device):
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

    def wall(cycles: int) -> float:
        torch.cuda.synchronize(device)
        before = time.perf_counter()
        launch(cycles)
        torch.cuda.synchronize(device)
        return time.perf_counter() - before

    wall(1000)
    cycles = int(1_000_000 * _UNIT / min(wall(1_000_000) for _ in range(5)))
    unit = min(wall(cycles) for _ in range(10))

    def spend() -> float:
        launch(cycles)
        return unit

    return spend
