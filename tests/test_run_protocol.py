"""The worker process: answers, errors by class, crashes, hangs, and never outliving its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import FAKE, cell, client
from waiting import is_dead, wait_for

from d2obench.errors import OutOfMemory, PolicyError, WorkerError
from d2obench.run.worker_client import (
    WITHOUT,
    DeadWorkerError,
    DeviceFaultError,
    WorkerClient,
    again,
    cell_of,
    describe,
    revive,
    without,
)

REQUEST = {"axes": {"policy": "full", "budget": None, "shape": "32+8"}, "batch": 2, "round": 0}


def test_hello() -> None:
    with client() as worker:
        hello = worker.call("hello")
        assert hello["pid"] == worker.pid
        assert worker.call("hello")["pid"] == worker.pid  # the same process, kept warm


@pytest.mark.parametrize("noise", ["warning: something\n", '{"id": 1, "ok": {}}\n', "\x00\xff{{{"])
def test_what_a_library_prints_is_no_answer(noise: str) -> None:
    with client(noise=noise) as worker:
        assert worker.call("measure", REQUEST)["trace"]["batch"] == 2


def test_an_unknown_operation_is_an_error_and_the_worker_lives_on() -> None:
    with client() as worker:
        with pytest.raises(WorkerError, match="knows no operation"):
            worker.call("system")
        assert worker.call("hello")
        assert worker.generation == 1


def test_an_error_keeps_its_class_and_words() -> None:
    problem = PolicyError("unknown policy 'x'", why="because", remedy="type y")
    again_ = revive(describe(problem))
    assert (type(again_), str(again_)) == (PolicyError, str(problem))
    assert isinstance(revive(describe(MemoryError())), OutOfMemory)
    assert isinstance(revive(describe(ValueError("a\nb"))), WorkerError)
    assert isinstance(revive({"kind": "os", "what": "x"}), WorkerError)  # a name that is no error class


def test_progress_is_told() -> None:
    seen = []
    with client() as worker:
        worker.call("load", {}, progress=lambda *step: seen.append(step))
    assert seen == [(1, 1, "loading fake")]


def test_a_crash_tells_how_and_the_last_words_and_a_new_worker_follows() -> None:
    with client(crash=["full"]) as worker:
        with pytest.raises(DeadWorkerError, match="SIGSEGV during 'measure': the last words"):
            worker.call("measure", REQUEST)
        assert worker.call("hello")["pid"]
        assert worker.generation == 2


def test_a_kill_between_two_calls_goes_unnoticed() -> None:
    with client() as worker:
        worker.call("hello")
        pid = worker.pid or 0
        os.kill(pid, signal.SIGKILL)
        # Not until /proc says zombie: it says so of the first thread while others of the process still end.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert worker.call("hello")
        assert worker.generation == 2


def test_again_forgives_one_death() -> None:
    deaths = iter([True, False])

    def work() -> str:
        if next(deaths):
            raise DeadWorkerError("killed")
        return "done"

    assert again(work) == "done"


def test_a_hang_is_ended(tmp_path: Path) -> None:
    with client(hang=["full"]) as worker:
        worker.call("hello")
        pid = worker.pid or 0
        with pytest.raises(WorkerError, match=r"gave no sign for 0.3 s during 'measure'"):
            worker.call("measure", REQUEST, timeout_s=0.3)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_no_interpreter() -> None:
    with pytest.raises(WorkerError, match="can't start a worker"):
        WorkerClient("/nowhere/python").call("hello")


def test_a_worker_that_can_not_start_says_why() -> None:
    with (
        WorkerClient(command=("-c", "raise ImportError('no torch')")) as worker,
        pytest.raises(WorkerError, match="no torch"),
    ):
        worker.call("hello")


def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed in the middle of a request that would take an hour."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from runs import client\n"
        "worker = client(hang=['full'], log=sys.argv[2]); worker.call('hello'); print(worker.pid, flush=True)\n"
        "worker.call('measure', {'axes': {'policy': 'full', 'budget': None, 'shape': '32+8'}, 'batch': 1})"
    )
    words = [sys.executable, "-c", code, str(Path(FAKE).parent), str(tmp_path / "log")]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_for((tmp_path / "log").exists, alive=lambda: parent.poll() is None)
    parent.kill()
    parent.wait()
    wait_for(lambda: is_dead(pid))


# --- faults of a GPU --------------------------------------------------------------------------------------------------


def test_after_a_failed_capture_a_new_process_repeats_the_cell_without_graphs() -> None:
    with client(uncaptured=["full"]) as worker:
        with pytest.raises(DeviceFaultError, match=r"could not be captured: capturing failed \(simulated\)"):
            worker.call("measure", REQUEST)
        assert worker.pid is None, "PyTorch's allocator may be left as if it were capturing"
        assert again(lambda: worker.call("measure", REQUEST))["trace"]["batch"] == 2
        assert worker.generation == 2
        assert set(parts(worker)) == {cell_of(REQUEST)}
        assert "capturing failed (simulated)" in parts(worker)[cell_of(REQUEST)]["graph"]


def parts(worker: WorkerClient) -> dict[str, dict[str, str]]:
    return dict(json.loads(worker.env[WITHOUT]))


def test_other_cells_keep_their_graphs_until_a_second_one_fails() -> None:
    second, third = ({**REQUEST, "axes": {**REQUEST["axes"], "policy": name}} for name in ("h2o", "d2o"))
    with client(uncaptured=["full", "h2o", "d2o"]) as worker:
        for request in (REQUEST, second):
            assert again(lambda request=request: worker.call("measure", request))
        assert "graph" in without(third, worker.env[WITHOUT])
        assert worker.call("measure", third)  # at once
        assert worker.generation == 3


def test_a_gpu_that_breaks_ends_the_process_and_the_cell_is_tried_without_kernels() -> None:
    with client(broken=["full"]) as worker:
        assert again(lambda: worker.call("measure", REQUEST))["trace"]["batch"] == 2
        assert worker.generation == 2
        assert list(parts(worker)[cell_of(REQUEST)]) == ["kernels"]
        assert "illegal memory access" in without(REQUEST, worker.env[WITHOUT])["kernels"]
        assert without({"device": "cuda:0"}, worker.env[WITHOUT]) == {}
    with client(broken_always=["full"]) as worker, pytest.raises(DeviceFaultError, match="illegal memory access"):
        again(lambda: worker.call("measure", REQUEST))


def test_memory_that_ends_in_a_capture_is_out_of_memory_and_the_process_ends() -> None:
    with client(exhausted=["full"]) as worker:
        with pytest.raises(OutOfMemory):
            worker.call("measure", REQUEST)
        assert worker.pid is None
        assert WITHOUT not in worker.env


def test_a_huge_answer_arrives_whole() -> None:
    with client() as worker:
        axes = cell("full", shape="8+200000").axes
        found = worker.call("measure", {"axes": {"policy": "full", "budget": None, "shape": axes.shape}, "batch": 1})
        assert len(found["trace"]["step_s"]) == 199_999
