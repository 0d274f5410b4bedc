"""Counts what one decode step does: operators, FLOPs, allocations, and what a decode loop should not do.

These are concatenations of tensors, points at which the host waits for the device, and the allocation of a new cache.
Unlike times, counts are the same on every machine and in every repetition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from d2obench import cpu
from d2obench.measure.phases import Request

_CONCATENATE = ("aten.cat", "aten.stack", "aten.concat", "aten.repeat_interleave")
_WAIT = (
    "aten._local_scalar_dense",
    "aten.is_nonzero",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique_consecutive",
    "aten._unique2",
    "aten.repeat_interleave",
)
"""Operators whose result the host needs before it can continue, so that it waits for a GPU."""


class StepCounts(NamedTuple):
    """The counts of one decode step.

    Args:
        ops: aten operators dispatched, and compiled CPU loops of this project launched (``loop.NAME``).
        flops: floating-point operations of matrix products and attention.
        by_op: operator → how often.
        concatenations: operator → how often, for those that build a new tensor from others.
        waits: operator → how often, for those that make the host wait for a GPU.
        allocated_bytes: newly allocated storage of all results.
        largest_bytes: newly allocated storage of the largest result.
        largest_op: the operator that returned it.
        launches: kernels launched; None on a CPU.
    """

    ops: int
    flops: int
    by_op: Mapping[str, int]
    concatenations: Mapping[str, int]
    waits: Mapping[str, int]
    allocated_bytes: int
    largest_bytes: int
    largest_op: str
    launches: int | None = None


def count_step(session: Request, prompts: list[list[int]]) -> StepCounts:
    """Prefills and compresses ``prompts`` and counts the second decode step, since the first may allocate buffers.

    On a GPU kernel launches are counted in the third step.
    """
    with torch.inference_mode():
        logits = session.prefill(prompts)
        session.compress()
        return count_decode(session, logits.argmax(-1))


def count_decode(session: Request, tokens: torch.Tensor) -> StepCounts:
    """Counts as :func:`count_step` does, from the first generated ``tokens`` ``[B]`` on."""
    tokens = session.step(tokens).argmax(-1)
    counts = count(lambda: session.step(tokens))
    if tokens.device.type == "cuda":
        counts = counts._replace(launches=launches(lambda: session.step(tokens)))
    return counts


def count(work: Callable[[], object]) -> StepCounts:
    """Runs ``work`` once and counts its operators."""
    counts = _Counting()
    with cpu.watched(counts.launched), counts:
        work()
    return StepCounts(
        ops=sum(counts.ops.values()),
        flops=counts.flops,
        by_op=dict(counts.ops.most_common()),
        concatenations={name: n for name, n in counts.ops.items() if name in _CONCATENATE},
        waits=dict(counts.waits),
        allocated_bytes=counts.allocated,
        largest_bytes=counts.largest[0],
        largest_op=counts.largest[1],
    )


def launches(work: Callable[[], object]) -> int:
    """Kernels that ``work`` launches on a CUDA device, including copies, fills and those of a replayed CUDA graph."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    on_device = torch._C._autograd.DeviceType.CUDA
    return sum(event.device_type == on_device and not event.is_user_annotation for event in profiled.events())


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that PyTorch dispatches inside ``with``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.flops = self.allocated = 0
        self.largest = (0, "")

    def launched(self, loop: cpu.Loop, arguments: cpu.Arguments) -> None:
        """Counts a compiled loop, which PyTorch does not dispatch. The tensors of its results are allocated before."""
        self.ops[f"loop.{loop.name}"] += 1
        self.flops += loop.flops(arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # 1. In inference mode composite operators are dispatched as one. Split them, so that their parts are counted.
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        # 2. Run a basic operator; count it, its FLOPs, and whether the host must wait for it.
        held = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        name = str(packet)
        self.ops[name] += 1
        if name in _WAIT or _indexes_by_mask(name, args) or _leaves_device(name, args, out):
            self.waits[name] += 1
        self.flops += _flops(packet, name, args, kwargs, out)
        # 3. A result whose storage belongs to no argument was newly allocated.
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in held:
                size = leaf.untyped_storage().nbytes()
                self.allocated += size
                self.largest = max(self.largest, (size, name))
        return out


def _flops(packet: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    if name == "aten._scaled_dot_product_flash_attention_for_cpu":  # torch's own table knows only the GPU's kernels
        (b, h, q, d), k = args[0].shape, args[1].shape[-2]
        return int(2 * b * h * q * k * (d + args[2].shape[-1]))
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _indexes_by_mask(name: str, args: Any) -> bool:
    """Whether an operator indexes by a boolean tensor: the size of the result is then known only to the device."""
    if name not in ("aten.index", "aten.index_put", "aten.index_put_") or len(args) < 2:
        return False
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _leaves_device(name: str, args: Any, out: Any) -> bool:
    """Whether an operator copies between host and device, for which the host waits."""
    if name not in ("aten._to_copy", "aten.copy_") or not isinstance(out, torch.Tensor):
        return False
    source = args[1] if name == "aten.copy_" else args[0]
    return isinstance(source, torch.Tensor) and (source.device.type == "cpu") != (out.device.type == "cpu")


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
