"""What the display is told of a running cell: from its rounds alone, on a CPU and on a GPU."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fake_worker import trace

from d2obench.record import Axes, CellRecord, Value
from d2obench.run.progress import MIB, Vitals, headline, so_far
from d2obench.suite.definition import Timing

TIMING = Timing(rounds=3, max_rounds=9, warmup=1, interval=0.5)


def rounds(count: int, **more: Any) -> list[dict[str, Any]]:
    """Raw rounds as the samples keep them."""
    axes = {"policy": "d2o", "budget": "0.2", "shape": "32+8"}
    return [{**trace({"axes": axes, "batch": 2, "round": number}), "seconds": 1.0, **more} for number in range(count)]


def test_a_first_round_has_nothing_to_tell_but_its_number() -> None:
    assert so_far([], TIMING, 0) == ("round 1/9", pytest.approx(2 / 11))


def test_memory_of_a_cpu() -> None:
    line = {"timeline": [[0.0, 400 * MIB], [1.0, 421 * MIB]], "timeline_columns": ["rss_bytes"]}
    peaks = {"peaks": {"prefill": {"rss_bytes": 455 * MIB}, "decode": {"rss_bytes": 430 * MIB}}}
    text, share = so_far(rounds(2, **line, **peaks), TIMING, 2)
    assert text.startswith("round 3/9  TPOT ")
    assert text.endswith("  421 MiB now, 455 peak")
    assert share == pytest.approx(4 / 11)  # two rounds carry no interval, so all rounds are still to come


def test_memory_clock_and_throttle_of_a_gpu() -> None:
    columns = ["used_bytes", "sm_mhz", "slowdown"]
    line = {"device_timeline": [[0.0, 9 * MIB, 1980, 0], [1.0, 8 * MIB, 1755, 4], [2.0, None, None, 0]]}
    peaks = {"peaks": {"prefill": {"rss_bytes": 5 * MIB, "nvml_used_bytes": 9 * MIB}}}
    text, _ = so_far(rounds(1, **line, device_columns=columns, **peaks), TIMING, 1)
    assert text.endswith("  8 MiB now, 9 peak  1,755 MHz, power cap")


def test_a_wide_interval_needs_all_rounds() -> None:
    _, share = so_far(rounds(2), Timing(rounds=3, max_rounds=9, warmup=1, interval=1e-9), 2)
    assert share == pytest.approx(4 / 11)


def test_vitals_of_a_process() -> None:
    client: Any = SimpleNamespace(started=os.getpid())
    vitals = Vitals(client)
    assert vitals().startswith("worker ")
    assert vitals().endswith(" peak")
    client.started = 0
    assert vitals() == ""
    client.started = 2**22 + 1  # no such process
    assert vitals() == ""


def ended(**values: Value) -> CellRecord:
    """The row of a cell with these figures."""
    axes = Axes("speed", "fake", "float32", "cpu", "d2o", "0.2", "32+8", 2, 0)
    return CellRecord("c", "hash", axes, "ok", values=values)


def test_a_ratio_of_an_ended_cell_stands_with_its_interval_or_not_at_all() -> None:
    tpot = Value(0.01182, 0.0117, 0.0119, 4, kind="range")
    sure = Value(1.166, 1.12, 1.2104, 8, kind="interval")
    assert headline(ended(tpot_s=tpot, speedup=sure)) == (
        "TPOT 11.82 ms  decode, equal batch 1.166 × full (95 % interval 1.120 … 1.210)"
    )
    for unsure in (Value(1.166), Value(1.166, 1.1, 1.2, 2, kind="range"), Value(None, note="no pairs")):
        assert headline(ended(tpot_s=tpot, speedup=unsure)) == "TPOT 11.82 ms"
    busy = msgspec.structs.replace(ended(tpot_s=tpot, speedup=sure), details={"busy": True})
    assert headline(busy) == "TPOT 11.82 ms"
