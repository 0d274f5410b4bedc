"""Which process of the driver's list is this one, where a container counts processes otherwise than its host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_nvml import FakeNvml

from d2obench.errors import MeasureError
from d2obench.measure import checkup, nvml
from d2obench.measure.nvml import BLOCK, COLUMNS, Nvml, find_own_process, other_processes, own_pids, refuse_busy
from d2obench.run.worker import Worker

OURS, THEIRS, LATE = 2**22 + 11, 2**22 + 12, 2**22 + 13
GIB = 2**30


class Driver:
    """A list of processes that changes while ``occupied``: pid → bytes, and what each takes then."""

    def __init__(self, held: dict[int, int | None], takes: dict[int, int | None]) -> None:
        self.held, self.takes = held, takes
        self.gpu = Nvml("gpu0", FakeNvml({"ComputeRunningProcesses": lambda n: self.listed()}))

    def listed(self) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.held.items()]

    @contextmanager
    def occupied(self) -> Iterator[None]:
        before = dict(self.held)
        for pid, taken in self.takes.items():
            known = self.held.get(pid)
            self.held[pid] = None if taken is None else taken + (known or 0)
        yield
        self.held = before | {pid: self.held[pid] for pid in self.takes if pid not in before}  # a context stays


@pytest.mark.parametrize(
    ("held", "takes"),
    [
        ({}, {OURS: GIB}),  # its context comes with the block
        ({THEIRS: 3 * GIB}, {OURS: GIB}),
        ({THEIRS: None}, {OURS: None}),  # a driver that tells no bytes
        ({OURS: GIB, THEIRS: GIB}, {OURS: BLOCK}),  # the context was there before
        ({OURS: GIB, THEIRS: GIB}, {OURS: BLOCK, THEIRS: 2 * 2**20}),
    ],
)
def test_the_entry_that_takes_the_block_is_this_process(held: Any, takes: Any) -> None:
    driver = Driver(held, takes)
    assert find_own_process(driver.gpu, driver.occupied)
    assert driver.gpu.pids == {OURS}
    assert [one.pid for one in other_processes(driver.gpu)] == ([THEIRS] if THEIRS in held else [])


def test_its_memory_is_then_known_by_the_host_s_number() -> None:
    driver = Driver({OURS: 3 * GIB, THEIRS: GIB}, {OURS: BLOCK})
    index = COLUMNS.index("process_bytes")
    assert driver.gpu.read()[index] is None
    find_own_process(driver.gpu, driver.occupied)
    assert driver.gpu.read()[index] == 3 * GIB


@pytest.mark.parametrize(
    ("held", "takes"),
    [
        ({THEIRS: GIB}, {}),  # the driver hides this process
        ({THEIRS: GIB}, {OURS: GIB, LATE: GIB}),  # another one came at the same moment
        ({OURS: GIB, THEIRS: GIB}, {OURS: BLOCK, THEIRS: BLOCK}),
        ({OURS: None, THEIRS: None}, {OURS: None}),  # there already, and no bytes to tell it by
    ],
)
def test_in_doubt_nobody_is_taken_for_this_process(held: Any, takes: Any) -> None:
    driver = Driver(held, takes)
    assert not find_own_process(driver.gpu, driver.occupied)
    assert driver.gpu.pids == own_pids()
    with pytest.raises(MeasureError, match="the GPU is busy"):
        refuse_busy(driver.gpu)


def test_a_block_that_can_not_be_had_is_no_crash() -> None:
    @contextmanager
    def full() -> Iterator[None]:
        raise RuntimeError("CUDA out of memory")
        yield

    assert not find_own_process(Driver({THEIRS: GIB}, {}).gpu, full)


def test_pids_of_every_namespace_in_sight(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nPid:\t7\nNSpid:\t4194315\t7\nVmHWM:\t1 kB\n")
    assert own_pids(status) == {os.getpid(), OURS, 7}
    assert own_pids(tmp_path / "none") == {os.getpid()}
    assert os.getpid() in own_pids()


def test_a_worker_is_not_its_own_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that holds the GPU already is asked whether others do, in a container."""
    driver, worker = Driver({OURS: GIB}, {OURS: BLOCK}), Worker()
    worker._gpu["cuda:0"] = driver.gpu
    monkeypatch.setattr(nvml, "block_on", lambda device: driver.occupied())
    asked = {"device": "cuda:0", "own": []}
    assert worker.refuse_busy(asked, lambda *_: None) == {}
    driver.held[THEIRS] = 5 * GIB
    with pytest.raises(MeasureError, match=rf"process {THEIRS} \(\?\) holds 5.0 GiB"):
        worker.refuse_busy(asked, lambda *_: None)


def test_doctor_does_not_report_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver({OURS: GIB, THEIRS: GIB}, {OURS: BLOCK})
    monkeypatch.setattr(checkup, "block_on", lambda device: driver.occupied())
    monkeypatch.setattr(checkup.time, "sleep", lambda seconds: None)
    found = [one.text for one in checkup._other_load(torch.device("cuda:0"), driver.gpu) if one.topic == "GPU in use"]
    assert found == [f"process {THEIRS} (?) computes on the GPU"]
