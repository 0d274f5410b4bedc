"""The Ray cluster: starts or joins it, lists the devices of its nodes, and says what a suite needs of them.

Without an address a cluster is started that is this machine alone, with every port on the loopback address, without a
dashboard and without Ray's usage report.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from typing import Any, NamedTuple

from d2obench.errors import UsageError, WorkerError
from d2obench.run.isolated_workers import isolated
from d2obench.run.plan import Plan
from d2obench.run.predict import ITEM_BYTES, Device, predict
from d2obench.suite.definition import Suite

OBJECT_STORE = 128 * 2**20
"""Bytes of shared memory of a cluster that is started here; little is enough, since answers are small."""
REACH_S = 5.0
"""Seconds to wait for a connection to the address of a cluster."""


class ClusterDevice(NamedTuple):
    """A device for one cell at a time, and what is reserved with it: a whole node with all its cores, or GPUs of a node
    with a part of its cores.

    ``number`` counts the devices of a node; ``memory`` is in bytes.
    """

    node: str
    number: int
    address: str
    cpus: float
    gpus: int
    memory: int

    def __str__(self) -> str:
        return f"node {self.node[:8]} ({self.address})" + (f", GPU place {self.number}" if self.gpus else "")


def connect(address: str = "") -> tuple[Any, bool]:
    """Connects to a cluster: the module ``ray``, and whether this call has connected it.

    Args:
        address: of a running cluster, as ``ray.init`` takes it; empty starts one on this machine.

    Raises:
        UsageError: ray is not installed.
        WorkerError: there is no cluster at the address, or it can't be joined or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not address:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = (
            "0"  # Ray reads it when it is imported: the node's address is 127.0.0.1
        )
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise UsageError(
            "--engine ray needs the package ray", remedy="install it: pip install 'd2obench[ray]'"
        ) from None
    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
    if address:
        _reach(address)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    object_store_memory=OBJECT_STORE,
                    **quiet,
                )
    except (Exception, SystemExit) as problem:  # Ray exits where it can't reach a cluster
        lines = str(problem).strip().splitlines()
        why = lines[0][:300] if lines and not isinstance(problem, SystemExit) else "it does not answer"
        verb = "join" if address else "start"
        raise WorkerError(f"can't {verb} {where}", why=why, remedy="see ray status, or leave out --address") from None
    return ray, True


def cluster_devices(
    ray: Any, kind: str, *, gpus: int = 1, cpus: float = 0.0, memory: int = 0, resource: str = ""
) -> list[ClusterDevice]:
    """Devices of all nodes that are alive.

    Args:
        ray: the module, connected.
        kind: ``cpu`` or ``cuda``.
        gpus: GPUs that one model lies on; 0 for all of a node.
        cpus: cores reserved with them; 0 divides a node's cores evenly.
        memory: bytes to reserve, but at most what a node has.
        resource: only nodes with this Ray resource, for example ``accelerator_type:H100``.
    """
    devices = []
    for node in sorted(ray.nodes(), key=lambda node: str(node["NodeID"])):
        has = node["Resources"]
        if not node["Alive"] or (resource and resource not in has):
            continue
        name, address, cores = node["NodeID"], node["NodeManagerAddress"], float(has.get("CPU", 0))
        whole = int(has.get("memory", 0))
        if kind == "cpu":
            if cores > 0:
                devices.append(ClusterDevice(name, 0, address, cores, 0, min(memory, whole)))
            continue
        each = gpus or int(has.get("GPU", 0))
        places = int(has.get("GPU", 0)) // each if each else 0
        for number in range(places):
            own = min(cpus or max(1.0, cores // places), cores)
            devices.append(ClusterDevice(name, number, address, own, each, min(memory, whole // places)))
    return devices


def alive(ray: Any, node: str) -> bool:
    """Whether the cluster still counts a node among its own."""
    try:
        return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())
    except Exception:  # the cluster itself is gone
        return False


def _reach(address: str) -> None:
    """Raises where nothing listens at the address; Ray itself would wait for minutes and then end this process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as problem:
        why = getattr(problem, "strerror", None) or str(problem) or "no answer"
        raise WorkerError(
            f"there is no Ray cluster at {address}",
            why=why,
            remedy="give the address that ray status shows, or leave out --address",
        ) from None


def check_devices(suite: Suite) -> None:
    """Raises a UsageError where a suite names devices by number or of several kinds, or a policy needs an isolated
    worker."""
    if alone := isolated(suite):
        raise UsageError(
            f"--engine ray can't run {next(iter(alone))}",
            why="it needs a worker process of its own kind, and a node of the cluster hosts one kind",
            remedy="run it with --engine local or slurm, or leave it out",
        )
    kinds = {device.partition(":")[0] for device in suite.axes.device}
    if len(kinds) > 1 or any(device not in ("auto", "cpu", "cuda", "cuda:0") for device in suite.axes.device):
        raise UsageError(
            f"--engine ray can't place cells on {', '.join(suite.axes.device)}",
            why="the cluster gives each cell a device of one kind",
            remedy="use --device cpu or --device cuda",
        )


def memory_to_reserve(plan: Plan) -> int:
    """Bytes of host memory to reserve: what the largest cell is predicted to take; with a GPU, the weights."""
    most = 0.0
    for cell in plan.cells:
        model = plan.models.get(cell.axes.model)
        if model is None:
            continue
        if cell.axes.device.startswith("cuda"):
            most = max(most, model.parameters * ITEM_BYTES[cell.axes.dtype])
        else:
            most = max(most, predict(cell, plan.suite, model, Device(1.0, 1.0)).memory or 0.0)
    return int(most)


def gpus_to_reserve(suite: Suite) -> int:
    """GPUs that one model lies on; 0 stands for all of a node, for a model that ``device_map`` distributes."""
    placed = suite.models
    return 0 if not placed.single and placed.tensor_parallel == 1 else placed.tensor_parallel
