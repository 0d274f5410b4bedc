"""Predicts the memory and time of a cell from a model's dimensions and two rates of the device; searches batch ``max``.

Predictions are shown before a run (``--dry-run``), decide what can run side by side, and say where to begin the search
for the largest batch (:func:`find_batch`). They are never reported as figures.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from typing import Any, NamedTuple

import msgspec

from d2obench.errors import OutOfMemory
from d2obench.measure.nvml import open_gpu
from d2obench.models import Dimensions
from d2obench.record import Axes
from d2obench.run.worker_client import Client
from d2obench.suite.definition import Suite
from d2obench.suite.grammar import Shape, parse_memory
from d2obench.tasks.base import Cell, shape_of

ACTIVATIONS = 12
"""Hidden vectors of one token that are in memory at once in prefill; a rough figure."""
WAYS = 2
"""How often cells that share prefills read a prompt: with column sums and without them."""
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
    """Rough rates of a device of this machine, without torch: a CPU is timed with numpy, a GPU's driver is asked.

    A CPU is assumed to multiply every type as fast as float32.
    """
    if device.startswith("cuda"):
        return _rated(int(device.partition(":")[2] or 0), dtype)
    import numpy as np

    square = np.ones((512, 512), np.float32)
    block = np.ones(2**23, np.float32)
    copy = np.empty_like(block)
    flops = max(2 * 512**3 / _seconds(lambda: square @ square) for _ in range(5))
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
    """A GPU's rates from its driver: memory clock × bus width, and cores × clock × 2, which tensor cores multiply for
    half precision. Where the driver does not tell, 1 TB/s and 20 TFLOP/s are assumed."""
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
    token = 2 * model.layers * model.kv_heads * model.head_dim * item
    prefill = shape.prompt * (token + ACTIVATIONS * model.hidden * item)
    return float(model.parameters * item + batch * max(prefill, token * cell.entries(shape)))


def predict(cell: Cell, suite: Suite, model: Dimensions, device: Device, sharing: int = 1) -> Prediction:
    """Memory and time of one cell.

    A prefill or a decode step takes the time of its FLOPs or of its bytes at the device's rates, whichever is longer. A
    speed cell takes its rounds, and in every process the prompts that are read for windows or to warm up; the windows
    themselves last equally long everywhere and are not counted here. A quality cell takes its items, as far as their
    number is known before the data is read. Batch ``max`` is not predicted.

    Args:
        cell: what to predict.
        suite: rounds, items and batches.
        model: its dimensions.
        device: its rates.
        sharing: number of quality cells that read the same prompts together; they read them about WAYS times in all.
    """
    if cell.task is not None:
        return _quality(cell, suite, model, device, sharing)
    timing, shape = suite.timing, shape_of(cell)
    if not isinstance(cell.batch, int):
        return Prediction(None, None)
    prefill, step = _pass(cell, model, device, cell.batch, shape)
    part = min(shape.gen, timing.depths * timing.steps)
    requests = {"full": [shape.gen], "sampled": [part], "both": [shape.gen, part]}[timing.decode]
    prompts = timing.processes * (1 if timing.windows else timing.warmup) + (0 if timing.windows else 1)
    seconds = timing.rounds * sum(prefill + steps * step for steps in requests) + prompts * prefill
    return Prediction(memory_of(cell, model, cell.batch), seconds)


def _quality(cell: Cell, suite: Suite, model: Dimensions, device: Device, sharing: int) -> Prediction:
    assert cell.task is not None
    work = cell.task.work(suite.quality, cell.shape, model.context)
    if work is None:
        return Prediction(float(model.parameters * ITEM_BYTES[cell.axes.dtype]), None)
    batch = min(suite.quality.batch, work.items)
    shape = Shape(work.prompt, work.new)
    prefill, step = _pass(cell, model, device, batch, shape)
    seconds = work.items / batch * (prefill * min(1.0, WAYS / sharing) + work.new * step)
    return Prediction(memory_of(cell, model, batch, shape), seconds)


def _pass(cell: Cell, model: Dimensions, device: Device, batch: int, shape: Shape) -> tuple[float, float]:
    """Seconds of the prefill and of one decode step of a batch."""
    item = ITEM_BYTES[cell.axes.dtype]
    weights, linear = model.parameters * item, 2 * model.parameters * batch
    attention = 2 * model.layers * model.heads * model.head_dim * batch * shape.prompt**2
    prefill = max((linear * shape.prompt + attention) / device.flops, weights / device.bandwidth)
    held = cell.entries(shape) if cell.budget else shape.prompt + shape.gen / 2
    token = 2 * model.layers * model.kv_heads * model.head_dim * item
    return prefill, max((weights + token * batch * held) / device.bandwidth, linear / device.flops)


MOST = 4096
"""The largest batch that is tried."""
RESOLUTION = 32
"""The search ends when it is within 1/32 of the largest batch."""


def find_batch(cell: Cell, limit: str, client: Client) -> dict[str, Any]:
    """Searches the largest batch of a cell that fits a memory limit: predicted, then tried and bisected.

    A trial reads the whole prompt and decodes the first and the last step of the generation, so that the cache reaches
    its full size. On a GPU the limit is set in the allocator, so that a larger batch really runs out of memory; on a
    CPU the resident set is compared with it.

    Args:
        cell: its batch is ``max``.
        limit: ``24GiB``, ``0.5`` of the device, or empty for all memory of a GPU and the free memory on a CPU.
        client: the worker that tries.

    Returns:
        ``batch``, ``limit`` in words, ``predicted``, and the ``trials`` as ``[batch, peak bytes or None]``.

    Raises:
        OutOfMemory: not even one sequence fits.
    """
    axes = cell.axes
    memory = client.call("memory", {"device": axes.device})
    bound = (
        parse_memory(limit, memory["total"]) if limit else memory["total" if axes.device.startswith("cuda") else "free"]
    )
    words = f"under {bound / 2**30:.2f} GiB"
    facts = client.call("describe", {"models": [axes.model], "devices": []})
    model = Dimensions(**facts["models"][axes.model])
    weights, one_sequence = (memory_of(cell, model, batch) for batch in (0, 1))
    predicted = int((bound - weights) / (one_sequence - weights)) if bound > weights else 1
    trials: list[list[int | None]] = []

    def fits(batch: int) -> bool:
        request = {"axes": msgspec.to_builtins(axes), "batch": batch, "sampled": [2, 1], "limit": bound}
        try:
            peak = peak_bytes(client.call("measure", request)["trace"], axes)
        except OutOfMemory:
            peak = None
        trials.append([batch, peak])
        return peak is not None and peak <= bound

    batch = largest_batch(fits, predicted)
    if batch == 0:
        raise OutOfMemory(f"not even one sequence fits {words}")
    return {"batch": batch, "limit": words, "predicted": predicted, "trials": trials}


def peak_bytes(trace: dict[str, Any], axes: Axes) -> int:
    """The highest memory of a request: allocated on a GPU, the resident set elsewhere."""
    key = "allocated_bytes" if axes.device.startswith("cuda") else "rss_bytes"
    return max(int(peaks[key]) for peaks in trace["peaks"].values() if key in peaks)


def largest_batch(fits: Callable[[int], bool], predicted: int, most: int = MOST) -> int:
    """The largest batch for which ``fits`` is true, to within 1/32 of itself; 0 where not even one sequence fits.

    Args:
        fits: tries a batch; false where it exceeds the limit. If a batch does not fit, no larger one may fit.
        predicted: the first batch that is tried.
        most: the largest batch that is tried.
    """
    # low is the largest batch known to fit, high the smallest known not to fit; before one is known, batches grow by
    # half from trial to trial.
    guess, low, high = max(1, min(predicted, most)), 0, most + 1
    while high - low > max(1, low // RESOLUTION):
        if fits(guess):
            low = guess
            guess = min(most, low + max(1, low // 2)) if high > most else (low + high) // 2
        else:
            high = guess
            guess = (low + high) // 2
        if guess == low:
            break
    return low
