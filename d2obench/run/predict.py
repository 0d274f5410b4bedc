"""What a cell will roughly take: memory and time from a model's dimensions and two rates of the device.

Predictions are made to be read before a long run (``--dry-run``) and to decide what can run side by side. They are
never reported as figures.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from typing import NamedTuple

from d2obench.measure.nvml import open_gpu
from d2obench.models import Dimensions
from d2obench.suite.definition import Suite
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, shape_of

ACTIVATIONS = 12
"""Hidden vectors of one token that are alive at once in prefill; a rough figure."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Prediction(NamedTuple):
    """Peak ``memory`` in bytes (weights, KV, activations) and ``seconds`` of a cell; None where it can't be told."""

    memory: float | None
    seconds: float | None


class Device(NamedTuple):
    """Two rough rates of a device: its copy bandwidth in bytes/s and its dense matrix products in FLOP/s."""

    bandwidth: float
    flops: float


def rates_here(device: str, dtype: str) -> Device:
    """Rough rates of a device of this machine without torch: a CPU is timed with numpy, a GPU's come from its driver.

    A CPU is taken to multiply every type as fast as float32.
    """
    if device.startswith("cuda"):
        return _rated(int(device.partition(":")[2] or 0), dtype)
    import numpy as np

    one = np.ones((512, 512), np.float32)
    block = np.ones(2**23, np.float32)
    copy = np.empty_like(block)
    flops = max(2 * 512**3 / _seconds(lambda: one @ one) for _ in range(5))
    return Device(max(2 * block.nbytes / _seconds(lambda: np.copyto(copy, block)) for _ in range(5)), flops)


def count_gpus() -> int:
    """GPUs that the driver offers this process; 0 without a driver, or where torch was built for CPUs alone."""
    try:
        built_for_cpu = version("torch").endswith("+cpu")
    except PackageNotFoundError:
        built_for_cpu = True
    if built_for_cpu or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return 0
    return next(number for number in count() if open_gpu(number) is None)


def _rated(number: int, dtype: str) -> Device:
    """A GPU's rates from what its driver says: memory clock × bus width, cores × clock × 2, and on tensor cores a
    multiple of that for half precision. What the driver does not say is taken from a GPU of 1 TB/s and 20 TFLOP/s."""
    gpu = open_gpu(number)
    if gpu is None:
        return Device(1e12, 2e13)
    facts = gpu.facts()
    bits, cores = gpu.ask("nvmlDeviceGetMemoryBusWidth"), gpu.ask("nvmlDeviceGetNumGpuCores")
    major = (gpu.ask("nvmlDeviceGetCudaComputeCapability") or (0, 0))[0]
    bandwidth = 2e6 * facts["memory_mhz_max"] * bits / 8 if facts["memory_mhz_max"] and bits else 1e12
    flops = 2e6 * facts["sm_mhz_max"] * cores if facts["sm_mhz_max"] and cores else 2e13
    return Device(bandwidth, flops if dtype == "float32" else flops * (8 if major >= 8 else 4))


def _seconds(work: Callable[[], object]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def memory_of(cell: Cell, model: Dimensions, batch: int, shape: Shape | None = None) -> float:
    """Predicted peak bytes of a request of ``batch`` sequences.

    Weights, and the larger of two moments: the end of prefill, when every policy still holds the whole KV of the prompt
    and the widest activations are alive, and the end of decoding, with what the budget leaves.

    Args:
        cell: policy, budget and dtype.
        model: its dimensions.
        batch: sequences decoded together.
        shape: in place of the cell's own.
    """
    shape, item = shape or shape_of(cell), ITEM_BYTES[cell.axes.dtype]
    held = cell.budget.of(shape.prompt) if cell.budget else shape.prompt + shape.gen
    token = 2 * model.layers * model.kv_heads * model.head_dim * item
    prefill = shape.prompt * (token + ACTIVATIONS * model.hidden * item)
    return float(model.parameters * item + batch * max(prefill, token * held))


def predict(cell: Cell, suite: Suite, model: Dimensions, device: Device) -> Prediction:
    """Memory and time of one cell.

    Each pass takes what its FLOPs or its bytes take at the device's rates, whichever is longer. Of a speed cell the
    rounds are counted and the prompts beside them (for windows, or to warm up and to count operators, in every
    process), and not the windows themselves; of a quality cell the items, as far as they are known before its data is
    read. Nothing is told of batch ``max``.
    """
    if cell.task is not None:
        return _quality(cell, suite, model, device)
    timing, shape = suite.timing, shape_of(cell)
    if not isinstance(cell.batch, int):
        return Prediction(None, None)
    prefill, step = _pass(cell, model, device, cell.batch, shape)
    part = min(shape.gen, timing.depths * timing.steps)
    requests = {"full": [shape.gen], "sampled": [part], "both": [shape.gen, part]}[timing.decode]
    prompts = timing.processes * (1 if timing.windows else timing.warmup) + (0 if timing.windows else 1)
    seconds = timing.rounds * sum(prefill + steps * step for steps in requests) + prompts * prefill
    return Prediction(memory_of(cell, model, cell.batch), seconds)


def _quality(cell: Cell, suite: Suite, model: Dimensions, device: Device) -> Prediction:
    assert cell.task is not None
    work = cell.task.work(suite.quality, cell.shape, model.context)
    if work is None:
        return Prediction(float(model.parameters * ITEM_BYTES[cell.axes.dtype]), None)
    batch = min(suite.quality.batch, work.items)
    shape = Shape(work.prompt, work.new)
    prefill, step = _pass(cell, model, device, batch, shape)
    seconds = work.items / batch * (prefill + work.new * step)
    return Prediction(memory_of(cell, model, batch, shape), seconds)


def _pass(cell: Cell, model: Dimensions, device: Device, batch: int, shape: Shape) -> tuple[float, float]:
    """Seconds of the prefill and of one decode step of a batch."""
    item = ITEM_BYTES[cell.axes.dtype]
    weights, linear = model.parameters * item, 2 * model.parameters * batch
    attention = 2 * model.layers * model.heads * model.head_dim * batch * shape.prompt**2
    prefill = max((linear * shape.prompt + attention) / device.flops, weights / device.bandwidth)
    held = cell.budget.of(shape.prompt) if cell.budget else shape.prompt + shape.gen / 2
    token = 2 * model.layers * model.kv_heads * model.head_dim * item
    return prefill, max((weights + token * batch * held) / device.bandwidth, linear / device.flops)
