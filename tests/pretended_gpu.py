"""A GPU that is pretended: tensors that say they are on ``cuda:0`` and hold their numbers in the CPU's memory.

Our code takes its GPU path with them. Every operator is noted with what would go wrong on a real GPU: tensors of
different devices in one operator, and copies or reads for which the host waits. Triton's kernels run in its
interpreter, and each launch is noted with the variant into which Triton would compile it.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import plain_model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from d2obench import compiler
from d2obench.attention import prompt
from d2obench.decode.triton import backend
from d2obench.models import LoadedModel, joined
from d2obench.models import base as models
from d2obench.models.kernels import adapt
from d2obench.policies import merging

WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive",
}  # fmt: skip
WHOLE = {"scaled_dot_product_attention", "rms_norm", "linear", "dropout", "embedding", "_to_copy", "copy_"}
"""Operators that are noted as they are, and not as the operators that they consist of."""
READS = ("tolist", "item", "__bool__", "__int__", "__float__", "numpy")
KERNELS = (
    "d2obench.decode.triton.attend", "d2obench.decode.triton.merge", "d2obench.decode.triton.update",
    "d2obench.attention.triton_columns", "d2obench.models.gated_triton", "d2obench.models.rotary_triton",
    "d2obench.policies.merging_triton",
)  # fmt: skip


@dataclass
class Pretence:
    """What was noted.

    Attributes:
        phase: the name under which the next events are noted.
        events: ``(phase, kind, operator, place)``; kinds are ``mixed``, ``wait``, ``to host`` and ``to device``.
        variants: of the kernels that were launched, by phase; with an empty grid, in the phase ``loaded``.
        current: index of the current device.
        runs: whether kernels run; otherwise they are only noted.
        launches: of kernels of ours and of operators that are not views, by phase and name.
    """

    phase: str = "setup"
    events: list[tuple[str, str, str, str]] = field(default_factory=list)
    variants: dict[str, set[Any]] = field(default_factory=dict)
    current: int = 0
    runs: bool = True
    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    before_launch: Callable[[Any, bool], None] = lambda variant, empty: None

    def note(self, kind: str, what: Any) -> None:
        self.events.append((self.phase, kind, str(what), _place()))

    def of(self, phase: str, *kinds: str) -> list[tuple[str, str, str, str]]:
        """The events of a phase, of all kinds or of these."""
        return [event for event in self.events if event[0] == phase and (not kinds or event[1] in kinds)]


NOW = Pretence()


class Pretended(torch.Tensor):
    """A tensor of the pretended device; ``inner`` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: Any = "cuda:0") -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(device), requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.__getitem__:
                return _getitem(*args)
            if func is torch.Tensor.__setitem__:
                return _setitem(*args)
            if name == "__invert__":
                return torch.ops.aten.bitwise_not.default(args[0])
            if name == "contiguous":
                return (
                    args[0]
                    if args[0].inner.is_contiguous()
                    else torch.ops.aten.clone.default(args[0], memory_format=torch.contiguous_format)
                )
            if name == "copy_":
                return _dispatch(torch.ops.aten.copy_.default, args[:2], {})
            if name in READS:
                NOW.note("wait", name)
                with _disable_current_modes():
                    return func(args[0].inner, *args[1:], **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def inner(thing: Any) -> Any:
    """The CPU's tensor behind a pretended one; anything else as it is."""
    return thing.inner if isinstance(thing, Pretended) else thing


def _getitem(held: Any, places: Any) -> Any:
    """``held[places]`` in operators: PyTorch's own indexing asks the device's library."""
    places = places if isinstance(places, tuple) else (places,)
    named = sum(1 for place in places if place is not None and place is not Ellipsis)
    out, dim, tensors = held, 0, {}
    for place in places:
        if place is None:
            out, dim = torch.ops.aten.unsqueeze.default(out, dim), dim + 1
        elif place is Ellipsis:
            dim += held.dim() - named
        elif isinstance(place, slice):
            if (place.start, place.stop, place.step) != (None, None, None):
                out = torch.ops.aten.slice.Tensor(out, dim, place.start, place.stop, place.step or 1)
            dim += 1
        elif isinstance(place, int) and not isinstance(place, bool):
            out = torch.ops.aten.select.int(out, dim, place)
        else:
            tensors[dim] = place if isinstance(place, torch.Tensor) else torch.tensor(place)
            dim += 1
    if tensors:
        out = torch.ops.aten.index.Tensor(out, [tensors.get(at) for at in range(max(tensors) + 1)])
    return out


def _setitem(held: Any, places: Any, value: Any) -> None:
    by_tensor = any(isinstance(place, torch.Tensor) for place in (places if isinstance(places, tuple) else (places,)))
    if by_tensor:
        value = value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=held.dtype, device="cuda:0")
        torch.ops.aten.index_put_.default(held, list(places) if isinstance(places, tuple) else [places], value)
        return
    target = _getitem(held, places)
    if isinstance(value, torch.Tensor):
        _dispatch(torch.ops.aten.copy_.default, (target, value), {})
    else:
        target.fill_(value)


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._overloadpacket.__name__ if hasattr(func, "_overloadpacket") else str(func)
    # 1. an operator that consists of others
    if name not in WHOLE:
        with MODE:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    # 2. where it runs, and what is wrong with that
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
    device = pretended[0].device if pretended else None
    if len({tensor.device for tensor in pretended}) > 1 and name not in ("copy_",):
        NOW.note("mixed", func)
    if kwargs.get("device") is not None:
        target = torch.device(kwargs["device"])
        device = target if target.type == "cuda" else None
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    if name == "copy_":
        device = args[0].device if isinstance(args[0], Pretended) else None
        if isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
            NOW.note("to device" if device else "to host", func)
    elif name == "_to_copy":
        if pretended and device is None:
            NOW.note("to host", func)
        if others and device is not None:
            NOW.note("to device", func)
    elif pretended and any(tensor.dim() for tensor in others):
        NOW.note("mixed", func)
    if pretended and (name in WAITS or (name in ("index", "index_put", "index_put_") and _by_mask(args[1]))):
        NOW.note("wait", func)
    if pretended and not func.is_view:
        NOW.launches[NOW.phase, name] += 1
    # 3. compute
    known = {id(tensor.inner): tensor for tensor in pretended}
    given, named = tree_map(inner, args), tree_map(inner, kwargs)
    with _disable_current_modes():
        out = _flash(*given[:3], **named) if name == "_scaled_dot_product_flash_attention" else func(*given, **named)

    def wrapped(thing: Any) -> Any:
        if not isinstance(thing, torch.Tensor) or isinstance(thing, Pretended):
            return thing
        if id(thing) in known:
            return known[id(thing)]
        return thing if device is None else Pretended(thing, device)

    return tree_map(wrapped, out)


def _by_mask(places: Any) -> bool:
    return any(isinstance(place, torch.Tensor) and place.dtype in (torch.bool, torch.uint8) for place in places or ())


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, scale: float, **__: Any) -> Any:
    """What PyTorch's flash kernel for CUDA computes: keys of fewer heads, and the queries are the last positions."""
    group, new, length = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (held.float().repeat_interleave(group, 1) for held in (k, v))
    logits = (q.float() @ k.transpose(2, 3)) * scale
    logits.masked_fill_(~torch.ones(new, length, dtype=torch.bool).tril(length - new), -torch.inf)
    return (logits.softmax(-1) @ v).to(q.dtype), logits.logsumexp(-1), None


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


MODE = _Mode()


def _place() -> str:
    """The lines of our code and of the model's that an event comes from, innermost first."""
    found = []
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename
        if "/d2obench/" in name or ("/transformers/" in name and "model" in name):
            found.append(f"{'/'.join(name.split('/')[-2:])}:{frame.lineno}")
    return " < ".join(found[:3])


@contextmanager
def _current(device: Any) -> Iterator[None]:
    before, NOW.current = NOW.current, torch.device(device).index or 0
    try:
        yield
    finally:
        NOW.current = before


def _interpret(real: Any) -> Callable[..., None]:
    """The launch of a kernel: noted, refused for tensors of another device as Triton does, run on the CPU's tensors."""

    def run(self: Any, *given: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        made = compiler.variant(self, given, meta)
        for place, one in enumerate(given):
            if isinstance(one, torch.Tensor) and one.device != torch.device("cuda", NOW.current):
                raise ValueError(f"Pointer argument (at {place}) cannot be accessed from Triton (cpu tensor?)")
        empty = 0 in grid
        NOW.before_launch(made, empty)
        NOW.variants.setdefault("loaded" if empty else NOW.phase, set()).add(made)
        NOW.launches[NOW.phase, self.fn.__name__] += not empty
        if empty or not NOW.runs:
            return
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            with _disable_current_modes():
                real(self, *map(inner, given), grid=grid, warmup=warmup, **meta)
        finally:
            del os.environ["TRITON_INTERPRET"]

    return run


@contextmanager
def pretended(patch: pytest.MonkeyPatch, devices: int = 1) -> Iterator[Pretence]:
    """Pretends GPUs while this context is open."""
    from triton.runtime.interpreter import InterpretedFunction

    NOW.__init__()  # type: ignore[misc]
    torch._C._ensureCUDADeviceGuardSet()
    properties = SimpleNamespace(
        multi_processor_count=4, name="Pretended", major=9, minor=0, uuid=None, total_memory=80 * 2**30
    )
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    answers = {
        "is_available": lambda: True, "device_count": lambda: devices, "current_device": lambda: NOW.current,
        "get_device_capability": lambda device=None: (9, 0), "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "Pretended", "synchronize": lambda device=None: None,
        "empty_cache": lambda: None, "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0, "mem_get_info": lambda device=None: (64 * 2**30, 80 * 2**30),
        "device": _current, "set_device": lambda device: setattr(NOW, "current", torch.device(device).index or 0),
        "current_stream": lambda device=None: stream, "set_stream": lambda stream: None,
        "Stream": lambda device=None: stream, "stream": lambda stream: nullcontext(), "_lazy_init": lambda: None,
    }  # fmt: skip
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    patch.setattr(models, "_storage", lambda model: 1)
    patch.setattr(InterpretedFunction, "run", _interpret(InterpretedFunction.run))
    patch.setattr(torch, "tensor", _tensor_on(torch.tensor))
    patch.setattr(prompt, "causal_lower_right", _lower_right)
    patch.setattr(backend, "_loaded", set())
    patch.setattr(backend, "_refused", {})
    patch.setattr(backend, "_verified", {})
    for module in (joined, merging):
        patch.setattr(module, "_refused", {})
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with interpreted_kernels(), torch.inference_mode(), MODE:
            yield NOW
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def _lower_right(new: int, length: int) -> torch.Tensor:
    """The mask that PyTorch's tensor of this kind stands for; that one can't be made inside of :data:`MODE`."""
    with _disable_current_modes():
        return Pretended(torch.ones(new, length, dtype=torch.bool).tril(length - new))


def _tensor_on(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return real(data, *args, device=device, **kwargs)
        NOW.note("to device", "torch.tensor")
        with _disable_current_modes():
            return Pretended(real(data, *args, **kwargs), device)

    return tensor


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """The modules with our kernels, imported for Triton's interpreter."""
    before = {name: sys.modules.pop(name, None) for name in KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in KERNELS:
            importlib.import_module(name)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            package, _, last = name.rpartition(".")
            if module is not None:
                sys.modules[name] = module
                setattr(sys.modules[package], last, module)
            else:
                delattr(sys.modules[package], last)


def model_on_gpu(family: str, device: str = "cuda:0", dtype: str = "float32", **settings: Any) -> LoadedModel:
    """A tiny model of the family on a pretended GPU, as d2obench loads models."""
    with _disable_current_modes():
        model = plain_model(family, dtype, **settings)
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = Pretended(tensor.detach(), device)
    adapt(model)
    return models.loaded(family, model, None, digest=family, has_sense=False)
