"""What the package asks of a CPU: tensors with pages of their own, and threads that wait without spinning for long."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref

import psutil
import pytest
import torch

from d2obench.cache import Session
from d2obench.cpu import memory as host_memory
from d2obench.run import openmp_wait
from d2obench.run.openmp_wait import VARIABLE, bounded_spin
from d2obench.run.worker_client import WorkerClient

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (300, 7, 500)])
def test_they_are_zeros_that_can_be_written(dtype, shape):
    tensor = host_memory.lasting(shape, dtype, CPU, huge=True)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert not tensor.any()
    tensor[1] = 1
    assert tensor.float().sum() == tensor[1].numel()


def test_their_pages_go_with_them():
    process, size = psutil.Process(), 2**28
    before = process.memory_info().rss
    tensor = host_memory.lasting((size // 4,), torch.float32, CPU)
    assert process.memory_info().rss < before + size // 8
    tensor.fill_(1)
    assert process.memory_info().rss > before + size * 7 // 8
    seen = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert seen() is None
    assert process.memory_info().rss < before + size // 8


def test_buffers_are_made_for_all_layers_by_the_first(monkeypatch):
    made = []
    monkeypatch.setattr(host_memory, "lasting", lambda *what: made.append(what) or torch.zeros(*what[0]))
    buffers, given = host_memory.LayerBuffers(3), []
    for layer in range(3):
        given += [buffers.zeros(layer, shape, torch.float32, CPU) for shape in ((2, 3), (2, 3), (5,))]
        assert len(made) == 9
    assert len({buffer.data_ptr() for buffer in given}) == 9
    assert buffers.zeros(2, (7,), torch.float32, CPU).shape == (7,)


def test_what_waits_for_all_layers_is_gone_once_they_are_compressed(tiny):
    session = Session(tiny, "d2o", "0.25", max_new=2)
    session.prefill([[1 + i % 200 for i in range(300)]])
    buffers = [weakref.ref(layer.keys) for layer in session.cache.own]
    assert all(buffer() is not None for buffer in buffers)
    session.compress()
    gc.collect()
    assert not any(buffer() is not None for buffer in buffers)


on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="measured on x86 only")


@on_x86
@pytest.mark.parametrize(("pause", "count"), [(100e-9, "500"), (10e-9, "5000"), (1.0, "1")])
def test_the_count_stands_for_fifty_microseconds(monkeypatch: pytest.MonkeyPatch, pause: float, count: str) -> None:
    """By pauses of old and of recent processors, and never 0, which would be no spinning at all."""
    assert openmp_wait.pause_s() > 0
    monkeypatch.setattr(openmp_wait, "pause_s", lambda: pause)
    assert bounded_spin({}) == {VARIABLE: count}


@on_x86
@pytest.mark.parametrize("chosen", [{VARIABLE: "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_the_user_chose_stands(chosen: dict[str, str]) -> None:
    assert bounded_spin(chosen) == {}


@on_x86
def test_the_runtime_of_a_worker_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    env = WorkerClient().env
    told = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, VARIABLE: env[VARIABLE], "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{VARIABLE} = '{env[VARIABLE]}'" in told.stderr
