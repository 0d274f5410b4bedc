"""What a suite needs of a cluster: a kind of device, GPUs for one model, memory."""

from __future__ import annotations

from d2obench.errors import UsageError
from d2obench.policies import other
from d2obench.run.check import Checked
from d2obench.run.plan import ITEM_BYTES, Device, predict
from d2obench.suite.definition import Suite


def check_devices(suite: Suite) -> None:
    """A UsageError where devices are not of one kind or are named by number, or a policy needs a worker of its own."""
    alone = [policy for policy in suite.axes.policy if (found := other(policy)) is not None and found.apart]
    if alone:
        raise UsageError(
            f"--engine ray can't run {alone[0]}",
            why="it needs a worker apart, and a node hosts one kind",
            remedy="run it with --engine local or slurm, or leave it out",
        )
    kinds = {device.partition(":")[0] for device in suite.axes.device}
    if len(kinds) > 1 or any(device not in ("auto", "cpu", "cuda", "cuda:0") for device in suite.axes.device):
        raise UsageError(
            f"--engine ray can't place cells on {', '.join(suite.axes.device)}",
            why="the cluster gives each cell a device of one kind",
            remedy="use --device cpu or --device cuda",
        )


def memory(checked: Checked) -> int:
    """Bytes of host memory to reserve: what the largest cell is predicted to take; with a GPU, the weights."""
    most = 0.0
    for cell in checked.cells:
        model = checked.models.get(cell.axes.model)
        if model is None:
            continue
        if cell.axes.device.startswith("cuda"):
            most = max(most, model["parameters"] * ITEM_BYTES[cell.axes.dtype])
        else:
            most = max(most, predict(cell, checked.suite, model, Device(1.0, 1.0)).memory or 0.0)
    return int(most)


def gpus(suite: Suite) -> int:
    """GPUs that one model lies on; 0 is all that a node has, for a model that is spread by ``device_map``."""
    placed = suite.models
    return 0 if not placed.single and placed.tensor_parallel == 1 else placed.tensor_parallel
