"""Cells → groups that are measured together, and what each cell will roughly take.

Speed cells that differ only in policy and budget form one group: their rounds are interleaved and their ratios are
paired. Quality cells stand alone. Predictions come from a model's dimensions and two rough figures of the device; they
are there to be read before a long run, not to be reported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from d2obench.errors import UsageError
from d2obench.record import Axes
from d2obench.run.check import Checked
from d2obench.suite.definition import SPEED, Cell, Suite
from d2obench.suite.grammar import Shape, parse_budget, parse_shape
from d2obench.tasks import parse_task

ACTIVATIONS = 12
"""Hidden vectors of one token alive at once in prefill; rough."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Prediction(NamedTuple):
    """Peak ``memory`` in bytes (weights, KV, activations) and ``seconds`` of a cell; None where it can't be told."""

    memory: float | None
    seconds: float | None


class Device(NamedTuple):
    """Rough figures of a device: copy bandwidth in bytes/s and dense multiply rate in FLOP/s."""

    bandwidth: float
    flops: float


def group(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that are timed together stand in one list, in the order of the suite."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        a = cell.axes
        key = (a.model, a.dtype, a.device, a.shape, a.batch, a.seed) if a.task == SPEED else cell.id
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


def abba(cells: Sequence[Cell], round_: int) -> list[Cell]:
    """The order of one round: forwards and backwards in turn, so that a drift of the machine cancels."""
    return list(cells) if round_ % 2 == 0 else list(reversed(cells))


def larger(axes: Axes, than: Axes) -> bool:
    """Whether a cell is of the same kind as another and asks for no less memory in shape and batch."""
    same = ("task", "model", "dtype", "device", "policy", "budget")
    if any(getattr(axes, key) != getattr(than, key) for key in same) or axes.shape is None or than.shape is None:
        return False
    if not (isinstance(axes.batch, int) and isinstance(than.batch, int)):
        return False
    (big,), (small,) = parse_shape(axes.shape), parse_shape(than.shape)
    return big.prompt >= small.prompt and big.gen >= small.gen and axes.batch >= than.batch


def memory_of(axes: Axes, model: Mapping[str, Any], batch: int) -> float:
    """Predicted peak bytes of a request of ``batch`` sequences.

    Weights, and the larger of two moments: the end of prefill, when every policy still holds the prompt's whole KV
    and the widest activations are alive, and the end of decoding, with what the budget leaves.
    """
    assert axes.shape is not None
    (shape,) = parse_shape(axes.shape)
    held = parse_budget(axes.budget).of(shape.prompt) if axes.budget else shape.prompt + shape.gen
    item = ITEM_BYTES[axes.dtype]
    token = 2 * model["layers"] * model["kv_heads"] * model["head_dim"] * item
    prefill = shape.prompt * (token + ACTIVATIONS * model["hidden"] * item)
    return float(model["parameters"] * item + batch * max(prefill, token * held))


def predict(cell: Cell, suite: Suite, model: Mapping[str, Any], device: Device) -> Prediction:
    """Memory and time of one cell.

    Each pass takes what its FLOPs or its bytes take at the device's rates, whichever is longer. A speed cell's rounds
    and warm-up are counted; a quality cell's items are, as far as they are known before its data is read. Nothing is
    told of batch ``max``.
    """
    axes, timing = cell.axes, suite.timing
    shape = parse_shape(axes.shape)[0] if axes.shape else None
    if axes.task != SPEED:
        return _quality(cell, suite, model, device, shape)
    assert shape is not None
    if not isinstance(axes.batch, int):
        return Prediction(None, None)
    prefill, step = _pass(axes, model, device, axes.batch, shape)
    part = min(shape.gen, timing.depths * timing.steps)
    requests = {"full": [shape.gen], "sampled": [part], "both": [shape.gen, part]}[timing.decode]
    seconds = timing.rounds * sum(prefill + steps * step for steps in requests) + (1 + timing.warmup) * prefill
    return Prediction(memory_of(axes, model, axes.batch), seconds)


def _quality(cell: Cell, suite: Suite, model: Mapping[str, Any], device: Device, shape: Shape | None) -> Prediction:
    axes, batch = cell.axes, suite.quality.batch
    work = parse_task(axes.task).work(suite.quality, shape, model["context"])
    if work is None:
        return Prediction(float(model["parameters"] * ITEM_BYTES[axes.dtype]), None)
    batch = min(batch, work.items)
    size = Shape(work.prompt, work.new)
    prefill, step = _pass(axes, model, device, batch, size)
    seconds = work.items / batch * (prefill + work.new * step)
    return Prediction(memory_of(msgspec.structs.replace(axes, shape=str(size)), model, batch), seconds)


def _pass(axes: Axes, model: Mapping[str, Any], device: Device, batch: int, shape: Shape) -> tuple[float, float]:
    """Seconds of the prefill and of one decode step of a batch."""
    weights, linear = model["parameters"] * ITEM_BYTES[axes.dtype], 2 * model["parameters"] * batch
    attention = 2 * model["layers"] * model["heads"] * model["head_dim"] * batch * shape.prompt**2
    prefill = max((linear * shape.prompt + attention) / device.flops, weights / device.bandwidth)
    held = parse_budget(axes.budget).of(shape.prompt) if axes.budget else shape.prompt + shape.gen / 2
    token = 2 * model["layers"] * model["kv_heads"] * model["head_dim"] * ITEM_BYTES[axes.dtype]
    return prefill, max((weights + token * batch * held) / device.bandwidth, linear / device.flops)


def parse_shard(text: str) -> tuple[int, int]:
    """``2/8`` → (2, 8).

    Raises:
        UsageError: it is not of that form, or the first number is not between 1 and the second.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"can't read the shard '{text}'", remedy="write it as 2/8: the second of eight")
    return number, count


def shard(checked: Checked, number: int, count: int) -> Checked:
    """Part ``number`` of ``count``; groups stay whole.

    Raises:
        UsageError: there are fewer groups than that.
    """
    groups = group(checked.cells)[number - 1 :: count]
    if not groups:
        whole = len(group(checked.cells))
        raise UsageError(f"shard {number}/{count} is empty", why=f"the suite has {whole} groups of cells")
    return replace(checked, cells=tuple(cell for one in groups for cell in one))


def part(checked: Checked, planned: Collection[str]) -> Checked:
    """The cells that a run has planned, where it is a shard: the same suite names more."""
    cells = tuple(cell for cell in checked.cells if cell.id in planned)
    return replace(checked, cells=cells) if cells else checked
