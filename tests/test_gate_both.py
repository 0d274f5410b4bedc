"""Work of both sides at once: results by name, the first failure, and Ctrl-C that leaves no process."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from waiting import LIMIT_S, wait_for

from d2obench.errors import WorkerError
from d2obench.gate.arm import Arm, both
from d2obench.suite.definition import load_suite

SLEEPER = """
import os, sys, time
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(120)
open(sys.argv[1] + ".woke", "w").close()
"""


def arms_of(folder: Path) -> dict[str, Arm]:
    suite = load_suite("ci")
    return {name: Arm(name, folder, suite, command=("-c", SLEEPER, str(folder / name))) for name in ("base", "head")}


def test_both_work_at_the_same_time_or_one_after_the_other(tmp_path):
    arms, met = arms_of(tmp_path), threading.Barrier(2, timeout=LIMIT_S)
    assert both(arms, lambda arm: (met.wait(), arm.name)[1]) == {"base": "base", "head": "head"}
    threads = both(arms, lambda arm: threading.current_thread().name, at_once=False)
    assert set(threads.values()) == {"MainThread"}


def test_a_failure_of_one_is_the_callers(tmp_path):
    def fail(arm: Arm) -> str:
        if arm.name == "head":
            raise WorkerError("it fell")
        return arm.name

    with pytest.raises(WorkerError, match="it fell"):
        both(arms_of(tmp_path), fail)


def test_ctrl_c_ends_both_processes(tmp_path):
    arms = arms_of(tmp_path)

    def stop() -> None:
        wait_for(lambda: all((tmp_path / name).exists() for name in arms))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell without one ignores it
    try:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            both(arms, lambda arm: arm.client.call("hello"))
        assert not list(tmp_path.glob("*.woke"))  # they were ended, not waited for
    finally:
        signal.signal(signal.SIGINT, before)
    for name in arms:
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)


def test_an_arm_that_was_ended_does_not_say_that_it_does_not_build(tmp_path):
    arm = arms_of(tmp_path)["base"]
    arm.end()
    with pytest.raises(WorkerError, match="was stopped"):
        arm.check()
