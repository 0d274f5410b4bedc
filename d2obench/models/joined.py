"""On a GPU: products with the same input as one product, and gated feed-forward layers in three launches.

A decode step multiplies a few vectors with every weight matrix. The queries', keys' and values' products have the same
input, and so have the two products of a gated feed-forward layer. :func:`join` lays their weights side by side in
memory, so that one product makes all of them. The layers' own weights become views of that memory: they keep names,
shapes and contents, and nothing is held twice. :class:`JoinedLinear` computes the outputs of its neighbours with its
own, and hands each neighbour its part when it is called with the same input; so the attention modules of transformers
run unchanged. For a prompt every product is made alone, since parts of one large output would keep all of it in memory.

:func:`feed_forward` computes ``down(activation(gate)·up)`` with the kernel of ``gated_triton`` between the products.
Where it can't run, PyTorch operators do the same, and the row says so (:func:`remarks`). Phi-3, GPT-NeoX and Falcon
have joined products in their own weights. A layer whose parts can't be joined (:func:`separate`) stays as it came.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2obench.compiler import ALIGNMENT, end_process, missing, off
from d2obench.errors import in_a_line, is_device_fault, is_out_of_memory

ATTENTION, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
"""Model packages of transformers whose modules have these layers, and give those of a module the same input."""
FEED_FORWARD = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Gemma3MLP", "Phi3MLP")
"""Classes of transformers that compute ``down(activation(gate)·up)``; Phi-3's gate and up are one product."""
SILU, GELU = ("SiLU", "SiLUActivation"), ("GELUTanh",)
"""Classes of the activations that the kernel has."""
Forward = Callable[[Any, Tensor], Tensor]
_refused: dict[tuple[torch.device, torch.dtype], str] = {}
"""Why the kernel can't be used."""


class JoinedLinear(nn.Linear):
    """``nn.Linear`` whose product can be made together with its neighbours'; see the module's docstring.

    Attributes:
        row: this layer and its neighbours, in the order of their weights in memory.
        handed: an input, and this layer's output for it, computed by the first of the row; None if there is none.
    """

    row: tuple[JoinedLinear, ...]
    handed: tuple[Tensor, Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[…, in]`` to ``[…, out]``."""
        handed, self.handed = self.handed, None
        if handed is not None and handed[0] is input:
            return handed[1]
        decodes = input.dim() == 3 and input.shape[1] == 1
        if decodes and self is self.row[0] and (joint := joint_of(self.row)) is not None:
            parts: tuple[Tensor, ...] = torch.split(
                F.linear(input, *joint), [part.out_features for part in self.row], -1
            )
            for part, output in zip(self.row[1:], parts[1:], strict=True):
                part.handed = input, output
            return parts[0]
        return F.linear(input, self.weight, self.bias)


def join(model: Any) -> None:
    """Lays the weights of a model's products with the same input side by side, where that is possible."""
    with torch.no_grad():
        for module in list(model.modules()):
            for parts in _rows(module):
                if separate(parts):
                    continue
                try:
                    _lay_side_by_side(parts)
                except torch.OutOfMemoryError:  # there is no room for a second copy of one layer: it stays as it is
                    continue
                if len(parts) == len(ATTENTION):
                    for part in parts:
                        part.__class__, part.row, part.handed = JoinedLinear, parts, None
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # the places of the separate weights


def _rows(module: nn.Module) -> list[tuple[Any, ...]]:
    """The linear layers of a module that get the same input, and are not joined yet."""
    family = type(module).__module__.split(".")[-2:-1]
    if not family or family[0] not in FAMILIES:
        return []
    found = [tuple(module._modules.get(name) for name in names) for names in (ATTENTION, GATED)]
    return [row for row in found if all(row) and (type(row[0]) is not JoinedLinear) and joint_of(row) is None]


def separate(parts: tuple[Any, ...]) -> str:
    """Why the products of linear layers can't be joined; empty if they can."""
    if any(type(part) is not nn.Linear for part in parts):
        return "they are no plain linear layers"
    if any("forward" in vars(part) for part in parts):
        return "the layers are wrapped, for several devices"
    if any(hasattr(part.weight, "to_local") for part in parts):
        return "their weights are divided among ranks"
    first = parts[0].weight
    if any((part.weight.dtype, part.weight.device) != (first.dtype, first.device) for part in parts):
        return "their weights differ in dtype or device"
    if len({part.bias is None for part in parts}) > 1:
        return "only some of them have a bias"
    # the kernels' variants depend on whether addresses and strides are multiples of this
    return "" if all(part.out_features % ALIGNMENT == 0 for part in parts) else "their sizes are no multiples of 16"


def _lay_side_by_side(parts: tuple[Any, ...]) -> None:
    for name in ("weight", "bias"):
        held = [getattr(part, name) for part in parts]
        if held[0] is None:
            continue
        whole, first = torch.cat([tensor.detach() for tensor in held]), 0
        for part, tensor in zip(parts, held, strict=True):
            view = whole[first : first + len(tensor)]
            setattr(part, name, nn.Parameter(view, requires_grad=tensor.requires_grad))
            first += len(tensor)


def joint_of(parts: tuple[Any, ...]) -> tuple[Tensor, Tensor | None] | None:
    """Weight ``[sum of out, in]`` and bias of several linear layers as one, if theirs are side by side in memory; None
    if not, for example since the model was moved or copied, or is trained."""
    found: list[Any] = []
    for name in ("weight", "bias"):
        held = [part._parameters.get(name) for part in parts]
        if held[0] is None:
            found.append(None)
            continue
        for one, other in pairwise(held):
            if other is None or one.dtype != other.dtype or one.requires_grad or other.requires_grad:
                return None
            after = one.data_ptr() + one.numel() * one.element_size()
            stores = {held.untyped_storage().data_ptr() for held in (one, other)}
            if after != other.data_ptr() or len(stores) > 1 or not one.is_contiguous():
                return None
        shape = (sum(len(one) for one in held), *held[0].shape[1:])
        found.append(held[0].as_strided(shape, held[0].stride()))
    return found[0], found[1]


def feed_forward(plain: Forward) -> Forward:
    """What replaces ``plain``, the forward of a class of :data:`FEED_FORWARD`."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hasattr(self, "gate_up_proj"):
            whole = self.gate_up_proj(hidden_states)
        elif (joint := joint_of((self.gate_proj, self.up_proj))) is not None:
            whole = F.linear(hidden_states, *joint)
        else:
            return plain(self, hidden_states)
        down: Tensor = self.down_proj(_gated(whole, _activation(self)))
        return down

    return forward


def serves(module: nn.Module) -> bool:
    """Whether :func:`feed_forward` computes what a module does."""
    return type(module).__name__ in FEED_FORWARD and type(_activation(module)).__name__ in SILU + GELU


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    found: Callable[[Tensor], Tensor] = module.activation_fn if hasattr(module, "activation_fn") else module.act_fn
    return found


def _gated(whole: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``activation(gate)·up`` of ``[…, gate and up]``."""
    if not kernel_fallback(whole.device, whole.dtype) and whole.is_contiguous():
        try:
            from d2obench.models.gated_triton import gated

            return gated(whole, type(activation).__name__ in GELU)
        except Exception as problem:  # a compiler may raise anything; PyTorch's operators are the fallback
            if is_out_of_memory(problem) or is_device_fault(problem):
                end_process(f"a feed-forward layer failed ({in_a_line(problem)})")
                raise
            _refused[whole.device, whole.dtype] = f"the kernel did not compile ({in_a_line(problem)})"
    gate, up = whole.chunk(2, -1)
    return activation(gate) * up


def kernel_fallback(device: torch.device, dtype: torch.dtype) -> str:
    """Why PyTorch's operators compute ``activation(gate)·up``; empty if the kernel does."""
    return _refused.get((device, dtype), "") or off("kernels") or _missing(device)


@functools.cache
def _missing(device: torch.device) -> str:
    """As ``missing``, which takes too long to be asked in every step."""
    return missing(device)


def verify(model: Any) -> None:
    """Compares the kernel with PyTorch's operators on a few random numbers; one that computes something else is not
    used."""
    kind = model.device, model.dtype
    layer = next((module for module in model.modules() if type(module).__name__ in FEED_FORWARD), None)
    if layer is None or not serves(layer) or kernel_fallback(*kind):
        return
    numbers = torch.randn(3, 160, generator=torch.Generator().manual_seed(0)).mul(4).to(kind[1]).to(kind[0])
    activation = _activation(layer)
    found, (gate, up) = _gated(numbers, activation), numbers.float().chunk(2, -1)
    if kind not in _refused and not torch.allclose(found.float(), activation(gate) * up, rtol=2e-2, atol=1e-3):
        _refused[kind] = "the kernel doesn't compute what PyTorch does"


def remarks(model: Any) -> list[str]:
    """Which of these a model on a GPU does not have, and why."""
    found: dict[str, None] = {}
    for module in model.modules():
        for parts in _rows(module):
            names = "queries, keys and values" if len(parts) == len(ATTENTION) else "gated layers"
            found[f"products of {names} one by one: {separate(parts) or 'their weights lie apart in memory'}"] = None
        if type(module).__name__ in FEED_FORWARD:
            name = type(_activation(module)).__name__
            reason = kernel_fallback(model.device, model.dtype) if serves(module) else f"there is no kernel for {name}"
            found |= {f"gated layers by PyTorch's operators: {reason}": None} if reason else {}
    return list(found)
