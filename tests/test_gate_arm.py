"""The two sides of a gate: how each is warmed up, and work of both at once, which Ctrl-C ends without a trace."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT_S, wait_for

from d2obench.errors import OutOfMemory, WorkerError
from d2obench.gate.arm import Arm, both
from d2obench.run.plan import cells
from d2obench.run.worker_client import UNKNOWN
from d2obench.suite.definition import Suite, load_suite
from d2obench.tasks.base import Cell


class Scripted:
    """A client that settles at warm-up number ``settles``; None: it is of a version without stable warm-ups."""

    generation = 1

    def __init__(self, settles: int | None) -> None:
        self.settles, self.asked = settles, []

    def call(self, op: str, args: Any = None) -> Any:
        self.asked.append("short measure" if op == "measure" and args.get("warm_up") else op)
        if op == "warm_up":
            if self.settles is None:
                raise WorkerError(f"{UNKNOWN} 'warm_up'")
            if self.settles < 0:
                raise OutOfMemory("out of memory in prefill")
            assert args["within"] == 0.05
            return {"decode_s": [0.1, 0.1], "stable": self.asked.count("warm_up") >= self.settles}
        return {"trace": {"step_s": [0.1]}, "model": {}} if op == "measure" else {"ops_step": 1}


def arm_of(settles: int | None, warmup: int = 3) -> tuple[Arm, Cell, Scripted]:
    given = {"axes.task": "speed", "axes.model": "shape:tiny", "timing.warmup": str(warmup)}
    suite: Suite = load_suite("ci", given | {"timing.warm_within": "0.05"})
    arm, client = Arm("base", Path(), suite), Scripted(settles)
    arm.client = client  # type: ignore[assignment]
    return arm, cells(suite)[0], client


@pytest.mark.parametrize(
    ("settles", "warmup", "before"),
    [
        (1, 3, ["warm_up"]),
        (2, 3, ["warm_up"] * 2),
        (99, 3, ["warm_up"] * 3),  # never settles: bounded
        (1, 0, ["warm_up"]),  # a gate never times a cold process
        (None, 2, ["warm_up", "short measure", "short measure"]),
    ],
)
def test_an_arm_is_warmed_up_until_its_steps_settle(settles: int | None, warmup: int, before: list[str]) -> None:
    arm, cell, client = arm_of(settles, warmup)
    arm.measure(cell)
    assert client.asked == ["count", *before, "measure"]
    arm.measure(cell)
    assert client.asked[-1:] == ["measure"]
    assert client.asked.count("measure") == 2  # the same process is warm


def test_a_new_process_is_warmed_up_again_and_counted_once() -> None:
    arm, cell, client = arm_of(1)
    arm.measure(cell)
    client.generation = 2
    arm.measure(cell)
    assert client.asked == ["count", "warm_up", "measure", "warm_up", "measure"]


def test_what_goes_wrong_in_a_warm_up_is_the_cells_end() -> None:
    arm, cell, client = arm_of(-1)
    with pytest.raises(OutOfMemory, match="in prefill"):
        arm.measure(cell)
    assert "measure" not in client.asked


SLEEPER = """
import os, sys, time
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(120)
open(sys.argv[1] + ".woke", "w").close()
"""


def both_arms(folder: Path) -> dict[str, Arm]:
    suite = load_suite("ci")
    return {name: Arm(name, folder, suite, command=("-c", SLEEPER, str(folder / name))) for name in ("base", "head")}


def test_both_work_at_the_same_time_or_one_after_the_other(tmp_path):
    arms, met = both_arms(tmp_path), threading.Barrier(2, timeout=LIMIT_S)
    assert both(arms, lambda arm: (met.wait(), arm.name)[1]) == {"base": "base", "head": "head"}
    threads = both(arms, lambda arm: threading.current_thread().name, at_once=False)
    assert set(threads.values()) == {"MainThread"}


def test_a_failure_of_one_is_the_callers(tmp_path):
    def fail(arm: Arm) -> str:
        if arm.name == "head":
            raise WorkerError("it fell")
        return arm.name

    with pytest.raises(WorkerError, match="it fell"):
        both(both_arms(tmp_path), fail)


def test_ctrl_c_ends_both_processes(tmp_path):
    arms = both_arms(tmp_path)

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
    arm = both_arms(tmp_path)["base"]
    arm.end()
    with pytest.raises(WorkerError, match="was stopped"):
        arm.check()
