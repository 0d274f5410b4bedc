"""Small Ray clusters on this machine, and runs on them with the scripted worker."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from runs import FAKE, Silent, checked
from waiting import LIMIT_S

from d2obench.record import Run, read_run
from d2obench.run.plan import Plan
from d2obench.run.ray_engine import RayEngine
from d2obench.run.runner import run_suite

CORES = 1.0
os.environ.setdefault("RAY_raylet_start_wait_time_s", "900")  # a busy machine starts a node slowly


class Nodes:
    """A head that offers nothing, and nodes of one core each."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 6}
        small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick, **small})
        self._small = small
        self.nodes = [self.add() for _ in range(count)]
        self.address = self._cluster.address

    def add(self, **offers: Any) -> Any:
        """One more node."""
        return self._cluster.add_node(**{"num_cpus": CORES, **self._small, **offers})

    def kill(self, node: Any) -> None:
        """Ends a node at once, with everything on it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def replace(self, node: Any) -> None:
        """A new node in place of one that was killed."""
        self.nodes[self.nodes.index(node)] = self.add()

    def close(self) -> None:
        self._cluster.shutdown()


def engine(work: Plan, address: str, **more: Any) -> RayEngine:
    """A RayEngine of the scripted worker; ``fake`` are its settings."""
    env = {"FAKE": json.dumps(more.pop("fake", {})), "PYTHONPATH": os.pathsep.join([str(Path(FAKE).parent)])}
    return RayEngine(work.suite, address, command=("-P", FAKE), env=env, patience=more.pop("patience", LIMIT_S), **more)


def run_on(address: str, folder: Path, work: Plan | None = None, *, watcher: Silent | None = None, **fake: Any) -> Run:
    """Runs into ``folder`` on the cluster, or goes on with what is there."""
    folder.mkdir(exist_ok=True)
    work = work or checked()
    with engine(work, address, fake=fake) as place:
        run_suite(work, folder, place, watcher or Silent(), resume=(folder / "run.json").exists())
    return read_run(folder)


class Background(threading.Thread):
    """``work`` in a thread; ``result`` waits for what it returned."""

    def __init__(self, work: Any) -> None:
        super().__init__(daemon=True)
        self._work, self._found, self._problem = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._work()
        except BaseException as problem:
            self._problem = problem

    def result(self) -> Any:
        self.join(LIMIT_S)
        assert not self.is_alive()
        if self._problem is not None:
            raise self._problem
        return self._found
