"""Peaks of phases: exact where the kernel or the allocator counts, from samples elsewhere."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_for

from d2obench.errors import is_out_of_memory
from d2obench.measure.memory import (
    MemoryProbe,
    ResidentMeter,
    Sampler,
    peak_between,
    settle,
    unique_bytes,
)

MIB = 2**20
exact = pytest.mark.skipif(not ResidentMeter.usable(), reason="this kernel does not reset VmHWM")


HELD_FOR_A_MOMENT = f"""
import json, torch
from d2obench.measure.memory import probe_for, settle
settle()
probe = probe_for(torch.device("cpu"), interval=60.0)  # no sample falls into the moment
probe.start()
probe.enter("prefill")
torch.ones(96 * {MIB}, dtype=torch.uint8).sum()
probe.enter("compress")
probe.enter("decode")
held = torch.ones(48 * {MIB}, dtype=torch.uint8)  # too large for malloc to take it out of freed memory
probe.stop()
print(json.dumps({{phase: found["rss_bytes"] for phase, found in probe.peaks.items()}}))
"""


@exact
def test_memory_that_is_held_for_a_moment_is_seen_in_its_phase_only() -> None:
    """In a process of its own, where nothing else takes or frees memory."""
    done = subprocess.run([sys.executable, "-c", HELD_FOR_A_MOMENT], capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout)
    assert peaks["prefill"] - peaks["compress"] > 80 * MIB
    assert 40 * MIB < peaks["decode"] - peaks["compress"] < 64 * MIB


class Scripted:
    """A meter whose peak since the reset is scripted."""

    def __init__(self, peaks: list[int]) -> None:
        self._peaks, self.resets = iter(peaks), 0

    def reset(self) -> None:
        self.resets += 1

    def read(self) -> dict[str, int]:
        return {"allocated_bytes": next(self._peaks)}


def probe_of(meters: list[Any], levels: list[float], times: list[float], device: Sampler | None = None) -> MemoryProbe:
    at, level = iter(times), iter(levels)
    return MemoryProbe(meters, Sampler(lambda: (next(level),), ("rss_bytes",), 60.0, lambda: next(at)), device)


def test_a_phase_that_comes_back_keeps_its_higher_peak_and_a_pause_counts_nowhere() -> None:
    meter = Scripted([5, 50, 3, 7])
    probe = MemoryProbe([meter], Sampler(lambda: (1.0,), ("rss_bytes",), 60.0))
    probe.start()
    for phase in ("prefill", "compress", "prefill", None, "decode", None):
        probe.enter(phase)
    probe.stop()
    assert {phase: found["allocated_bytes"] for phase, found in probe.peaks.items()} == {
        "prefill": 5, "compress": 50, "decode": 7,
    }  # fmt: skip
    assert meter.resets == 4


def test_without_a_resettable_mark_the_sampled_peak_stands_in() -> None:
    probe = probe_of([], [0, 100, 300, 200, 150], [0.0, 1.0, 2.0, 3.0, 4.0])
    probe.host.start = lambda: None  # type: ignore[method-assign]
    probe.start()
    probe.host.sample()
    for phase in ("prefill", "compress", "decode"):
        probe.enter(phase)
    probe.stop()
    assert {phase: found["rss_bytes"] for phase, found in probe.peaks.items()} == {
        "prefill": 300, "compress": 300, "decode": 200,
    }  # fmt: skip


@given(
    line=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**12)), min_size=1, max_size=60),
    ends=st.tuples(st.floats(0, 100), st.floats(0, 100)),
)
def test_the_peak_between_two_marks_is_the_scripted_one(
    line: list[tuple[float, int]], ends: tuple[float, float]
) -> None:
    rows = [(t, None, float(value)) for t, value in sorted(line)]
    start, end = sorted(ends)
    inside = [value for t, value in line if start <= t <= end]
    assert peak_between(rows, 1, start, end) == (max(inside) if inside else None)
    assert peak_between(rows, 0, start, end) is None


def test_the_sampler_keeps_every_row_on_the_given_clock_and_counts_its_cost() -> None:
    ticks = itertools.count()
    sampler = Sampler(lambda: (7.0, None), ("a", "b"), 0.001, lambda: float(next(ticks)))
    sampler.start()
    wait_for(lambda: len(sampler.rows) >= 5)
    sampler.sample()
    sampler.stop()
    assert [row[0] for row in sampler.rows] == [float(i) for i in range(len(sampler.rows))]
    assert all(row[1:] == (7.0, None) for row in sampler.rows)
    assert 0 <= sampler.overhead <= 1
    kept = len(sampler.rows)
    sampler.stop()
    assert len(sampler.rows) == kept


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("out of resource: shared memory, Required: 213000, Hardware limit: 101376"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_memory_that_ended(problem: Exception, expected: bool) -> None:
    assert is_out_of_memory(problem) is expected


def test_a_real_allocation_that_cannot_be_made_counts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.skipif(not hasattr(psutil.Process().memory_full_info(), "uss"), reason="this system tells no USS")
def test_own_memory_grows_with_what_is_held_and_settling_gives_it_back() -> None:
    settle(torch.device("cpu"))
    before = unique_bytes()
    held = torch.ones(96 * MIB, dtype=torch.uint8)
    during = unique_bytes()
    del held
    settle(torch.device("cpu"))
    after = unique_bytes()
    assert before is not None and during is not None and after is not None
    assert during - before > 80 * MIB
    assert during - after > 80 * MIB
