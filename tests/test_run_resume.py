"""Runs that are killed, stopped or starved, and go on: no cell lost, none doubled, the same figures."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import CELLS, FAKE, cell, checked, run
from waiting import children, wait_for

from d2obench import record
from d2obench.errors import RecordError
from d2obench.record import Run
from d2obench.run.run_folder import locked
from d2obench.suite.definition import Timing

fork = multiprocessing.get_context("fork")


def figures(found: Run) -> dict[str, Any]:
    """What a table shows, less the times of day."""
    return {
        one.id: (
            one.status,
            one.reason,
            one.values,
            one.flags,
            one.details.get("stopped", ""),
        )
        for one in found.cells
    }


def lines(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "cells.jsonl").read_text().splitlines()]


def quiet_run(folder: Path, log: Path) -> None:
    """A run in a forked process that a test kills; every request of its worker is a line of ``log``."""
    os.setsid()
    run(folder, delay=0.02, log=str(log))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return figures(run(tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.mark.parametrize("least", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_sweep_killed_again_and_again_loses_nothing_and_doubles_nothing(
    tmp_path: Path, undisturbed: dict[str, Any], least: int
) -> None:
    """SIGKILL of worker and parent at random moments, until each sweep gets through.

    Each life gets a random number of requests done before it is killed, however long they take, and dies somewhere in
    the middle of the next one. A worker is killed once at most in each life of its parent: a request that dies twice
    is a failed cell.
    """
    chance, kills = random.Random(0), {"worker": 0, "parent": 0}
    for sweep in itertools.count():
        folder, log = tmp_path / str(sweep), tmp_path / f"{sweep}.log"
        while True:
            process = fork.Process(target=quiet_run, args=(folder, log))
            process.start()
            if chance.random() < 0.5:
                _after(chance, process, log)
                kills["worker"] += _kill(children(process.pid or 0))
            _after(chance, process, log)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills["parent"] += 1
        assert process.exitcode == 0
        found = record.read_run(folder)
        assert not found.missing
        assert figures(found) == undisturbed
        assert sorted(lines(folder)) == sorted(one.id for one in CELLS)
        if sum(kills.values()) >= least and min(kills.values()) >= least // 5:
            break


def _after(chance: random.Random, process: Any, log: Path) -> None:
    """Waits until the worker was asked for some more requests and is in the middle of one, or the run has ended."""
    asked = _requests(log) + chance.randint(1, 8)
    while process.is_alive() and _requests(log) < asked:
        process.join(0.005)
    process.join(chance.uniform(0, 0.03))


def _requests(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def test_a_finished_run_measures_nothing_again(tmp_path: Path) -> None:
    first = run(tmp_path / "run")
    again = run(tmp_path / "run", log=str(tmp_path / "log"))
    assert figures(first) == figures(again)
    assert not (tmp_path / "log").exists()


def test_rounds_on_the_disk_are_not_measured_again(tmp_path: Path) -> None:
    work = checked([cell("full"), cell("d2o")], Timing(rounds=4, max_rounds=4))
    process = fork.Process(target=_held_up, args=(tmp_path / "run", work, tmp_path / "before"))
    process.start()
    samples = tmp_path / "run" / "samples"
    wait_for(lambda: len(list(samples.glob("*.json"))) == 2, alive=process.is_alive)
    process.kill()
    process.join()
    kept = {path.name: json.loads(path.read_text())["rounds"] for path in samples.glob("*.json")}
    run(tmp_path / "run", work, log=str(tmp_path / "log"))
    timed = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("measure")]
    assert len(timed) == 8 - sum(map(len, kept.values()))
    for name, rounds in kept.items():
        assert json.loads((samples / name).read_text())["rounds"][: len(rounds)] == rounds


def test_a_failed_cell_is_tried_again_apart_from_the_others(tmp_path: Path) -> None:
    """Its new rounds were not measured beside the full cache's, so no speed-up is made of them."""
    work = checked([cell("full"), cell("d2o")])
    assert [one.status for one in run(tmp_path, work, crash=["d2o"]).cells] == ["ok", "failed"]
    found = run(tmp_path, work)
    assert [one.status for one in found.cells] == ["ok", "ok"]
    assert "tpot_s" in found.cells[1].values
    assert "speedup" not in found.cells[1].values
    assert found.cells[1].flags == ("not measured beside full",)
    assert [one["round"] for one in record.read_samples(tmp_path, found.cells[1])["rounds"]] == [3, 4, 5]


def test_a_changed_cell_is_measured_anew(tmp_path: Path) -> None:
    import dataclasses

    run(tmp_path / "run", checked([cell("full")]))
    changed = dataclasses.replace(cell("full"), hash="another")
    run(tmp_path / "run", dataclasses.replace(checked(), cells=(changed,)), log=str(tmp_path / "log"))
    assert (tmp_path / "log").exists()


@pytest.mark.parametrize(
    "data",
    [
        b'{"rounds": [{"round": 0',
        b"[]",
        b'{"cell": "x", "rounds": 7}',
        b'{"cell": "x", "rounds": [{"round": 0}]}',
        b'{"cell": "x", "stopped": "interval", "rounds": [null]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_samples_file_counts_as_empty(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / f"{cell('full').hash}.json").write_bytes(data)
    found = run(tmp_path, checked([cell("full")]))
    assert found.cells[0].details["rounds"] == 3


def test_samples_that_were_taken_away_are_missed_but_not_needed(tmp_path: Path) -> None:
    work = checked([cell("full"), cell("d2o")])
    run(tmp_path, work, crash=["d2o"])
    for path in tmp_path.glob("samples/*"):
        path.unlink()
    found = run(tmp_path, work)
    assert [one.status for one in found.cells] == ["ok", "ok"]
    assert "speedup" not in found.cells[1].values


def test_another_machine_can_not_go_on(tmp_path: Path) -> None:
    run(tmp_path, checked([cell("full")]))
    with pytest.raises(RecordError, match="another environment: it differs in torch"):
        run(tmp_path, checked([cell("full")]), facts={"torch": "99"})


def test_ctrl_c_leaves_a_run_that_can_be_read_and_no_worker(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from runs import run\n"
        "run(Path(sys.argv[2]), log=sys.argv[3], until=[8, 'never'])"
    )
    words = [sys.executable, "-c", code, str(Path(FAKE).parent), str(tmp_path / "run"), str(tmp_path / "log")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    wait_for(lambda: list(tmp_path.glob("run/samples/*.json")), alive=lambda: process.poll() is None)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate()
    found = record.read_run(tmp_path / "run")
    assert found.missing
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not run(tmp_path / "run").missing


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(RecordError, match=rf"in use by another run \(pid {os.getpid()}\)"),
        locked(tmp_path),
    ):
        pytest.fail("the lock was given twice")
    with locked(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    ready = fork.SimpleQueue()
    process = fork.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    child = ready.get()
    with pytest.raises(RecordError, match=f"pid {process.pid}"), locked(tmp_path):
        pytest.fail("the lock was given twice")
    process.kill()
    process.join()
    try:
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_full_disk_ends_the_run_with_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up after two rounds; with space again the run goes on from there."""
    replace, left = os.replace, [4]

    def full(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RecordError, match=r"can't write .*: No space left on device; free some space"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert not run(tmp_path / "run").missing


def _held_up(folder: Path, work: Any, log: Path) -> None:
    """A run that never gets beyond its 10th request."""
    run(folder, work, log=str(log), until=[10, "never"])


def _hold(folder: Path, ready: Any) -> None:
    """Holds the lock of a folder beside a child that lives on, as a worker does that is just being started."""
    with locked(folder):
        child = os.fork()
        if child:
            ready.put(child)
        signal.pause()


def _kill(pids: list[int]) -> int:
    """How many of them were still there."""
    found = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            found += 1
    return found
