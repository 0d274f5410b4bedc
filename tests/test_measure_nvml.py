"""NVML in all its moods, and the energy that follows from its samples."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_nvml import FakeNvml
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_for

from d2obench.errors import MeasureError
from d2obench.measure import nvml
from d2obench.measure.memory import MemoryProbe, Sampler, probe_for
from d2obench.measure.nvml import (
    COLUMNS,
    Nvml,
    gpu_flags,
    idle_power,
    joules,
    joules_per_token,
    open_gpu,
    refuse_busy,
    slowdown_names,
)

GIB = 2**30


def named(row: Any) -> dict[str, float | None]:
    return dict(zip(COLUMNS, row, strict=True))


def rows(power: list[tuple[float, float | None]], energy: list[float] | None = None) -> Any:
    found = []
    for i, (t, watts) in enumerate(power):
        row = dict.fromkeys(COLUMNS) | {
            "power_w": watts,
            "energy_j": energy[i] if energy else None,
            "slowdown": 0,
        }
        found.append([t, *(row[column] for column in COLUMNS)])
    return found


def test_a_row_in_base_units() -> None:
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * GIB)
    other = SimpleNamespace(pid=1, usedGpuMemory=None)
    gpu = Nvml("gpu0", FakeNvml({"ComputeRunningProcesses": [other, mine]}))
    assert named(gpu.read()) == {
        "used_bytes": 10 * GIB, "process_bytes": 3 * GIB, "utilisation_percent": 97, "sm_mhz": 1980, "memory_mhz": 2619,
        "power_w": 500.0, "energy_j": 0.0, "temperature_c": 55, "slowdown": 0,
    }  # fmt: skip


def test_what_is_not_supported_is_missing_and_not_asked_again() -> None:
    library = FakeNvml(unsupported={"PowerUsage", "UtilizationRates", "ComputeRunningProcesses"})
    gpu = Nvml("gpu0", library)
    for _ in range(3):
        row = named(gpu.read())
        assert row["power_w"] is None
        assert row["utilisation_percent"] is None
        assert row["process_bytes"] is None
        assert row["used_bytes"] == 10 * GIB
    assert library.calls["PowerUsage"] == 1
    assert library.calls["Temperature"] == 3


def test_every_query_may_be_missing_from_an_old_library() -> None:
    class Old:
        NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_TEMPERATURE_GPU = 0

    gpu = Nvml("gpu0", Old())
    assert gpu.read() == (None,) * len(COLUMNS)
    assert set(gpu.facts().values()) == {None}
    assert gpu.processes() == []


def test_an_old_driver_tells_slowdowns_by_their_old_name() -> None:
    library = FakeNvml({"CurrentClocksThrottleReasons": 0x4 | 0x1}, unsupported={"CurrentClocksEventReasons"})
    gpu = Nvml("gpu0", library)
    assert slowdown_names(gpu.slowdown()) == ["power cap"]  # an idle GPU is not slowed down
    assert named(gpu.read())["slowdown"] == 4


def test_a_driver_that_dies_in_the_middle_leaves_missing_values_and_ends_nothing() -> None:
    gpu = Nvml("gpu0", FakeNvml(dies_after=40))
    probe = MemoryProbe([], Sampler(lambda: (1.0,), ("rss_bytes",)), Sampler(gpu.read, gpu.columns, 0.001))
    probe.start()
    probe.enter("decode")
    wait_for(lambda: probe.device.rows and probe.device.rows[-1][1] is None)  # type: ignore[union-attr]
    probe.stop()
    found = probe.device.rows  # type: ignore[union-attr]
    assert found[0][1] == 10 * GIB
    assert found[-1][1:] == (None,) * len(COLUMNS)
    assert probe.peaks["decode"]["nvml_used_bytes"] == 10 * GIB
    assert gpu.processes() == []
    assert gpu.facts()["gpu"] is None


def test_the_highest_device_memory_of_each_phase_is_the_scripted_one() -> None:
    now = [0.0]
    line = [(0.5, 4.0), (1.5, 9.0), (2.5, 6.0), (3.5, 8.0)]
    probe = MemoryProbe(
        [],
        Sampler(lambda: (1.0,), ("rss_bytes",), 60.0, lambda: now[0]),
        Sampler(lambda: (None,) * len(COLUMNS), COLUMNS, 60.0, lambda: now[0]),
    )
    probe.start()
    for at, phase in ((0.0, "prefill"), (1.0, "compress"), (2.0, "decode"), (4.0, None)):
        now[0] = at
        probe.enter(phase)
    probe.device.rows = [(t, value, *(None,) * (len(COLUMNS) - 1)) for t, value in line]  # type: ignore[union-attr]
    probe.stop()
    peaks = {phase: found.get("nvml_used_bytes") for phase, found in probe.peaks.items()}
    assert peaks == {"prefill": 4, "compress": 9, "decode": 8}
    assert "nvml_process_bytes" not in probe.peaks["decode"]


def test_no_driver_no_gpu_no_crash() -> None:
    assert open_gpu(0, FakeNvml(dies_after=0)) is None
    refuse_busy(None)
    assert idle_power(None) is None
    if not os.path.exists("/dev/nvidiactl"):
        assert open_gpu() is None


def test_facts_for_the_fingerprint() -> None:
    gpu = open_gpu(0, FakeNvml(unsupported={"MigMode"}))
    assert gpu is not None
    assert gpu.facts() == {
        "gpu": "NVIDIA Imagined", "gpu_memory_bytes": 80 * GIB, "driver": "580.1", "power_limit_w": 700.0,
        "sm_mhz_max": 1980, "memory_mhz_max": 2619, "ecc": True, "mig": None,
    }  # fmt: skip


def test_a_busy_gpu_is_refused_with_its_owners() -> None:
    processes = [
        SimpleNamespace(pid=os.getppid(), usedGpuMemory=3 * GIB),
        SimpleNamespace(pid=2**22 + 7, usedGpuMemory=None),
    ]
    gpu = Nvml("gpu0", FakeNvml({"ComputeRunningProcesses": processes}))
    with pytest.raises(MeasureError, match="the GPU is busy") as caught:
        refuse_busy(gpu)
    assert f"process {os.getppid()} (" in str(caught.value)
    assert "holds 3.0 GiB" in str(caught.value)
    assert f"process {2**22 + 7} (?)" in str(caught.value)
    assert "--allow-busy" in str(caught.value)
    refuse_busy(gpu, frozenset({os.getppid(), 2**22 + 7}))


@given(start=st.floats(0.2, 4), length=st.floats(2.1, 5), base=st.floats(0, 500), slope=st.floats(0, 50))
def test_energy_of_a_power_that_rises_evenly_is_exact(start: float, length: float, base: float, slope: float) -> None:
    line = rows([(0.1 * i, base + slope * 0.1 * i) for i in range(101)])
    end = start + length
    expected = base * length + slope * (end**2 - start**2) / 2
    assert joules(line, start, end) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_driver_s_own_counter_is_taken_first() -> None:
    line = rows([(float(i), 100.0) for i in range(6)], [1000.0 + 300 * i for i in range(6)])
    assert joules(line, 1.0, 4.0) == 900.0
    assert joules(line, 1.2, 1.7) == pytest.approx(150.0)


def test_a_stretch_too_short_for_the_driver_tells_nothing() -> None:
    both = rows([(0.1 * i, 100.0) for i in range(60)], [10.0 * i for i in range(60)])
    assert joules(both, 1.0, 1.4) is None
    assert joules(rows([(0.1 * i, 100.0) for i in range(60)]), 1.0, 2.9) is None  # power is a mean over a second


def test_energy_per_token_is_net_of_idle_and_missing_where_it_can_t_be_told() -> None:
    line = rows([(float(i), 300.0) for i in range(11)])
    assert joules_per_token(line, 2.0, 6.0, 40, 100.0) == pytest.approx(20.0)
    assert joules_per_token(line, 2.0, 6.0, 40, 400.0) == 0.0
    assert joules_per_token(line, 2.0, 6.0, 40, None) is None
    assert joules(rows([(0.0, None), (1.0, None)]), 0.0, 1.0) is None
    assert joules([], 0.0, 1.0) is None
    assert joules(rows([(0.0, 5.0), (0.1, 5.0)]), 0.0, 10.0) is None  # the driver died early


def test_idle_power_is_a_median_over_the_time_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only sleep moves on: ten samples."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(nvml, "time", clock)
    library = FakeNvml({"PowerUsage": lambda n: {0: 900_000, 1: 80_000, 2: 70_000}.get(n, 75_000)})
    assert idle_power(Nvml("gpu0", library), 5.0, 0.5) == pytest.approx(75.0)
    assert library.calls["PowerUsage"] == 10


def test_a_gpu_that_is_slowed_down_becomes_a_flag() -> None:
    line = rows([(0.0, None), (1.0, None), (2.0, None), (3.0, None)])
    line[1][-1] = 0x40 | 0x4
    line[2][-1] = 0x4
    assert gpu_flags(line, 0.0, 3.0) == [
        "GPU power cap 50 % of the time",
        "GPU hardware thermal slowdown 25 % of the time",
    ]
    assert gpu_flags(line, 3.0, 9.0) == []


def test_a_moment_at_the_power_limit_is_no_disturbance_of_a_request() -> None:
    line = rows([(float(t), None) for t in range(100)])
    for row in line[:9]:
        row[-1] = 0x4
    assert gpu_flags(line, 0.0, 99.0) == []
    line[9][-1] = 0x4
    assert gpu_flags(line, 0.0, 99.0) == ["GPU power cap 10 % of the time"]


def test_a_gpu_is_asked_ten_times_a_second_at_most() -> None:
    probe = probe_for(torch.device("cpu"), interval=0.02, nvml=Nvml("gpu0", FakeNvml()))
    assert probe.device is not None and probe.device._interval == 0.1
    assert probe.host._interval == 0.02
    assert gpu_flags([], 0.0, 1.0) == []
