"""Ray itself: starting or joining a cluster, the devices of its nodes, and what a suite needs of them.

This is the only module that imports ray.

A cluster of our own is this machine alone, with every port on the loopback address, no dashboard and no usage report.
A cluster that is named is joined as it is.
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
"""Bytes of shared memory of a cluster of our own: answers are small."""
REACH_S = 5.0


class ClusterDevice(NamedTuple):
    """A device that one cell at a time may use, and what is reserved with it.

    A CPU is a whole node with all its cores; a GPU comes with its share of them.
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
    """The module ``ray``, connected; and whether this call did it.

    Args:
        address: of a running cluster, as ``ray.init`` takes it; empty starts one on this machine.

    Raises:
        UsageError: ray is not installed.
        WorkerError: there is no cluster at the address, or it can't be joined or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not address:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read at import: makes 127.0.0.1 the node's address
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
        said = str(problem).strip().splitlines()
        why = said[0][:300] if said and not isinstance(problem, SystemExit) else "it does not answer"
        verb = "join" if address else "start"
        raise WorkerError(f"can't {verb} {where}", why=why, remedy="see ray status, or leave out --address") from None
    return ray, True


def cluster_devices(
    ray: Any, kind: str, *, gpus: int = 1, cpus: float = 0.0, memory: int = 0, resource: str = ""
) -> list[ClusterDevice]:
    """Devices of all nodes that are alive.

    Args:
        ray: connected.
        kind: ``cpu`` or ``cuda``.
        gpus: of each place; 0 takes all that a node has.
        cpus: cores of each GPU place; 0 shares a node's cores out evenly.
        memory: bytes to reserve, as far as a node has them.
        resource: only nodes with this Ray resource, for example ``accelerator_type:H100``.
    """
    found = []
    for node in sorted(ray.nodes(), key=lambda one: str(one["NodeID"])):
        has = node["Resources"]
        if not node["Alive"] or (resource and resource not in has):
            continue
        name, address, cores = node["NodeID"], node["NodeManagerAddress"], float(has.get("CPU", 0))
        whole = int(has.get("memory", 0))
        if kind == "cpu":
            if cores > 0:
                found.append(ClusterDevice(name, 0, address, cores, 0, min(memory, whole)))
            continue
        each = gpus or int(has.get("GPU", 0))
        places = int(has.get("GPU", 0)) // each if each else 0
        for number in range(places):
            own = min(cpus or max(1.0, cores // places), cores)
            found.append(ClusterDevice(name, number, address, own, each, min(memory, whole // places)))
    return found


def alive(ray: Any, node: str) -> bool:
    """Whether the cluster still counts a node among its own."""
    try:
        return any(one["NodeID"] == node and one["Alive"] for one in ray.nodes())
    except Exception:  # the cluster itself is gone
        return False


def _reach(address: str) -> None:
    """Ray waits minutes for a port where nobody listens and then ends the process, so this is asked first."""
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
    """A UsageError where devices are not of one kind or are named by number, or a policy needs a worker of its own."""
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
    """GPUs that one model lies on; 0 is all that a node has, for a model that is spread by ``device_map``."""
    placed = suite.models
    return 0 if not placed.single and placed.tensor_parallel == 1 else placed.tensor_parallel
