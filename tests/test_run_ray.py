"""A sweep on a Ray cluster of two nodes: what is killed, what is shared, and what a local run would have left."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import Background, Nodes, engine, run_on
from runs import CELLS, FAKE, Silent, cell, checked, run
from waiting import LIMIT_S, wait_for

from d2obench import record
from d2obench.errors import UsageError, WorkerError
from d2obench.record import Run
from d2obench.run.ray_cluster import cluster_devices, connect
from d2obench.run.ray_device import ReservedDevice
from d2obench.run.run_folder import Samples, forget_cut_round
from d2obench.run.runner import run_suite
from d2obench.suite.definition import Timing

pytestmark = pytest.mark.needs("ray")
SWEEP = (*CELLS, *(cell(policy, "0.2", shape="16+8") for policy in ("h2o", "d2o")))


def figures(found: Run) -> dict[str, Any]:
    """Everything of every row but the times of day."""
    return {
        one.id: (one.status, one.reason, one.values, one.details, one.flags, one.environment, one.samples)
        for one in found.cells
    }


def lines(folder: Path) -> list[str]:
    return sorted(json.loads(line)["id"] for line in (folder / "cells.jsonl").read_text().splitlines())


def processes(words: str) -> list[int]:
    """Processes that this one has started, and those that they have, with ``words`` in their command line."""
    import psutil

    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(one.cmdline()):
                found.append(one.pid)
    return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return figures(run(tmp_path_factory.mktemp("local") / "run", checked(SWEEP)))


def test_a_run_on_a_cluster_leaves_what_a_local_run_leaves(
    tmp_path: Path, nodes: Nodes, undisturbed: dict[str, Any]
) -> None:
    watcher = Silent()
    found = run_on(nodes.address, tmp_path / "run", checked(SWEEP), watcher=watcher)
    assert figures(found) == undisturbed
    assert lines(tmp_path / "run") == sorted(one.id for one in SWEEP)
    assert {(one, "ok") for one in lines(tmp_path / "run")} <= set(watcher.states)
    here, there = run(tmp_path / "here", checked(SWEEP)), found
    for mine, theirs in zip(here.cells, there.cells, strict=True):
        rounds = [record.read_samples(folder, one).get("rounds", []) for folder, one in
                  ((tmp_path / "here", mine), (tmp_path / "run", theirs))]  # fmt: skip
        assert [one | {"seconds": 0} for one in rounds[0]] == [one | {"seconds": 0} for one in rounds[1]]
    assert run_on(nodes.address, tmp_path / "run", checked(SWEEP), log=str(tmp_path / "log")).cells == found.cells
    assert not (tmp_path / "log").exists()  # a finished run measures nothing again


def test_errors_of_a_node_are_the_rows_that_they_are_locally(tmp_path: Path, nodes: Nodes) -> None:
    work = checked([cell("full"), cell("h2o"), cell("d2o"), cell("full", task="recall")])
    fake = {"oom": ["h2o"], "crash": ["d2o"]}
    assert figures(run_on(nodes.address, tmp_path / "there", work, **fake)) == figures(
        run(tmp_path / "here", work, **fake)
    )


def test_worker_host_and_node_killed_in_the_middle(tmp_path: Path, nodes: Nodes, undisturbed: dict[str, Any]) -> None:
    """A worker process, then an actor, then a whole node: no cell is lost or doubled, and figures are the same."""
    watcher, folder, lost, log = Silent(), tmp_path / "run", nodes.nodes[0], tmp_path / "log"
    settings = {"delay": 0.25, "log": str(log)}
    sweep = Background(lambda: run_on(nodes.address, folder, checked(SWEEP), watcher=watcher, **settings))

    def requests() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    try:
        wait_for(lambda: list(folder.glob("samples/*.json")), alive=sweep.is_alive)
        os.kill(wait_for(lambda: processes(FAKE), alive=sweep.is_alive)[0], signal.SIGKILL)
        before = requests()
        wait_for(lambda: requests() > before + 2, alive=sweep.is_alive)
        os.kill(wait_for(lambda: processes("ray::Host"), alive=sweep.is_alive)[0], signal.SIGKILL)
        wait_for(lambda: requests() > before + 4, alive=sweep.is_alive)
        nodes.kill(lost)
        found = sweep.result()
    finally:
        nodes.replace(lost)
    assert figures(found) == undisturbed
    assert lines(folder) == sorted(one.id for one in SWEEP)
    assert any("the worker's host ended" in note for note in watcher.notes)


def test_two_cells_never_share_a_device(tmp_path: Path, nodes: Nodes) -> None:
    """Two sweeps at once want both nodes; whoever else asks for a held device does not get it."""
    work = checked([cell("full", shape=f"{n}+8") for n in (8, 9, 10)], Timing(rounds=2, max_rounds=2))
    with engine(work, nodes.address, fake={}) as one:
        connected, _ = connect(nodes.address)
        (first, *_) = cluster_devices(connected, "cpu")
        holder = ReservedDevice(connected, first, one._settings, threading.Event())
        other = ReservedDevice(connected, first, one._settings, threading.Event())
        assert holder.hold(LIMIT_S)
        assert not other.hold(2.0)
        holder.leave()
        assert other.hold(LIMIT_S)
        other.leave()
    spans = tmp_path / "spans"
    words = [sys.executable, "-c", TWO, str(Path(FAKE).parent), nodes.address, str(spans)]
    both = [subprocess.Popen([*words, str(tmp_path / name)]) for name in ("a", "b")]
    assert [process.wait(LIMIT_S) for process in both] == [0, 0]
    busy: dict[str, list[tuple[float, float]]] = {}
    for line in spans.read_text().splitlines():
        node, began, ended = line.split()
        busy.setdefault(node, []).append((float(began), float(ended)))
    # two runs of three groups: count, warm-up and two rounds; a disturbed round is measured again
    assert sum(map(len, busy.values())) >= 2 * 3 * 4
    for times in busy.values():
        ordered = sorted(times)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))


TWO = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ray_cluster import run_on
from runs import cell, checked
from d2obench.suite.definition import Timing
work = checked([cell("full", shape=f"{n}+8") for n in (8, 9, 10)], Timing(rounds=2, max_rounds=2))
run_on(sys.argv[2], Path(sys.argv[4]), work, spans=sys.argv[3], delay=0.1)
"""


def test_a_gpu_is_reserved_whole_and_each_place_sees_its_own(tmp_path: Path, nodes: Nodes) -> None:
    """Ray takes our word for two GPUs; no two places see the same one."""
    cells = [cell("full", shape=f"{n}+8") for n in range(8, 14)]
    work = checked(cells, Timing(rounds=1, max_rounds=1), device="cuda")
    lent = nodes.add(num_cpus=2, num_gpus=2, resources={"accelerator_type:X": 1})
    try:
        with engine(work, nodes.address, fake={"visible": str(tmp_path / "gpus"), "meet": 2}) as place:
            connected, _ = connect(nodes.address)
            assert len(cluster_devices(connected, "cuda", resource="accelerator_type:X")) == 2
            assert len(cluster_devices(connected, "cuda", gpus=2)) == 1
            assert not cluster_devices(connected, "cuda", resource="accelerator_type:Y")
            (tmp_path / "run").mkdir()
            run_suite(work, tmp_path / "run", place, Silent())
    finally:
        nodes.kill(lent)
    seen = {tuple(line.split()) for line in (tmp_path / "gpus").read_text().splitlines()}
    assert sorted(gpu for _, gpu in seen) == ["0", "1"]  # two workers, and one GPU each


def test_a_killed_driver_goes_on_where_it_stopped(tmp_path: Path, nodes: Nodes, undisturbed: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    words = [sys.executable, "-c", ALONE, str(Path(FAKE).parent), nodes.address, str(folder), str(tmp_path / "before")]
    driver = subprocess.Popen(words)
    wait_for((folder / "cells.jsonl").exists, alive=lambda: driver.poll() is None)
    driver.kill()
    driver.wait()
    kept = {path.name: len(json.loads(path.read_text()).get("rounds", [])) for path in folder.glob("samples/*.json")}
    assert record.read_run(folder).missing
    found = run_on(nodes.address, folder, checked(SWEEP), log=str(tmp_path / "log"))
    assert figures(found) == undisturbed
    assert lines(folder) == sorted(one.id for one in SWEEP)
    timed = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("measure")]
    assert len(timed) <= 3 * 5 - sum(kept.values()) + 4  # a round that was cut is measured anew, nothing else is


ALONE = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ray_cluster import run_on
from runs import checked
from test_run_ray import SWEEP
run_on(sys.argv[2], Path(sys.argv[3]), checked(SWEEP), log=sys.argv[4], until=[20, "never"])
"""


def test_nothing_of_a_sweep_stays_in_the_driver(tmp_path: Path, nodes: Nodes) -> None:
    """Sixty cells, each asked of the cluster once; the book keeps heads of rows only."""
    from d2obench.run.run_folder import RunLog

    cells = [cell("full", f"0.{n:02}", task="recall") for n in range(1, 61)]
    found = run_on(nodes.address, tmp_path / "run", checked(cells), log=str(tmp_path / "log"))
    assert [one.status for one in found.cells] == ["ok"] * 60
    assert len((tmp_path / "log").read_text().splitlines()) == 60
    ledger = RunLog(tmp_path / "run", Silent(), {one.id: one for one in found.cells})
    assert not any(one.values or one.details for one in ledger.records.values())


def test_unlike_hardware_is_left_out_and_named(tmp_path: Path, nodes: Nodes) -> None:
    watcher = Silent()
    work = checked([cell("full", shape=f"{n}+8") for n in (8, 9, 10, 11)])
    found = run_on(nodes.address, tmp_path / "run", work, watcher=watcher, unlike=str(tmp_path / "first"))
    assert [one.status for one in found.cells] == ["ok"] * 4
    assert len({one.environment for one in found.cells}) == 1
    assert any("only like hardware is compared, and it differs in gpu" in note for note in watcher.notes), watcher.notes


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"needs the package ray; install it: pip install 'd2obench\[ray\]'"):
        engine(checked(), "")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:99999"])
def test_a_bad_address_is_one_clear_line(address: str) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom ray_cluster import *\nengine(checked(), sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(FAKE).parent), address], capture_output=True, text=True, timeout=LIMIT_S
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("d2obench.errors.WorkerError: ")
    assert address in last
    assert "--address" in last


def test_a_suite_of_two_kinds_of_devices_is_refused() -> None:
    work = checked(device="cuda:1")
    with pytest.raises(UsageError, match="use --device cpu or --device cuda"):
        engine(work, "")


def test_a_cluster_of_our_own_listens_on_the_loopback_address_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOPBACK, str(Path(FAKE).parent)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    heard = json.loads(done.stdout.splitlines()[-1])
    assert heard["ports"] >= 3
    assert heard["open"] == []


LOOPBACK = """
import contextlib, json, sys; sys.path.insert(0, sys.argv[1])
import psutil
from ray_cluster import checked, engine
with engine(checked(), "") as place:
    place.client.call("hello")
    me = psutil.Process()
    heard = []
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray's short-lived ones
            heard += [one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    print(json.dumps({"ports": len(heard), "open": [ip for ip in heard if not ip.endswith("127.0.0.1")]}))
"""


def test_a_round_that_was_cut_is_forgotten(tmp_path: Path) -> None:
    cells = [cell("full"), cell("h2o"), cell("d2o")]
    run(tmp_path, checked(cells))
    for one in cells:
        path = tmp_path / Samples(tmp_path, one).name
        data = json.loads(path.read_text())
        del data["stopped"]
        data["rounds"] = data["rounds"][: 3 if one.axes.policy != "d2o" else 2]
        path.write_text(json.dumps(data))
    forget_cut_round(tmp_path, cells)
    assert [len(Samples(tmp_path, one).rounds) for one in cells] == [2, 2, 2]
    forget_cut_round(tmp_path, cells)
    assert [len(Samples(tmp_path, one).rounds) for one in cells] == [2, 2, 2]


def test_a_group_comes_back_a_few_times_only() -> None:
    from d2obench.run.ray_engine import LOSSES, GroupQueue, model_of

    cells = [[cell("full")], [cell("h2o")]]
    queue = GroupQueue(cells)
    assert [queue.next(), queue.next()] == cells
    waiting = Background(queue.next)  # nothing is left, but a group may come back
    assert queue.give_back(cells[1])
    assert waiting.result() == cells[1]
    assert [queue.give_back(cells[1])] == [LOSSES > 2]
    with contextlib.suppress(IndexError):
        assert model_of(queue.next() or cells[1]) == ("fake", "float32")
    assert not queue.give_back(cells[1])
    assert not queue.wait(0)
    queue.done()
    assert queue.wait(0)
    assert queue.next() is None


def test_no_node_for_a_resource_is_one_clear_line(nodes: Nodes) -> None:
    with (
        engine(checked(), nodes.address, resource="accelerator_type:X") as place,
        pytest.raises(WorkerError, match="no node with the resource accelerator_type:X"),
    ):
        place.client.call("hello")
