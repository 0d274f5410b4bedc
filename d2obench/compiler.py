"""Triton, which compiles the GPU kernels: whether it can be used on a device, and how its kernels are launched.

Nothing here imports Triton, and PyTorch is imported only by functions that need it.

**Variants.** Triton compiles a kernel once for each combination of constants, argument types, and alignments of the
pointers it is given (:func:`variant`). Compiling and loading a variant is not possible while a CUDA graph is captured,
so what captures a step launches all of its variants before, with an empty grid.

**Switches.** ``D2OBENCH_KERNELS=0`` in the environment turns the GPU kernels off, ``D2OBENCH_GRAPH=0`` the CUDA graphs.
A worker that repeats a cell after a fault of the GPU does the same for that cell (:func:`switch_off`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Hashable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OLDEST = (3, 2)
"""The first Triton version whose language has everything that the kernels use."""
CAPABILITY = (8, 0)
"""The first NVIDIA compute capability for which Triton compiles bfloat16 products."""
ALIGNMENT = 16
"""Bytes. Triton compiles other code for a pointer, or a size, that is a multiple of it."""
SWITCHES = {"kernels": "D2OBENCH_KERNELS", "graph": "D2OBENCH_GRAPH"}
"""The parts of the GPU path that can be switched off, and the environment variables that do it."""
_off: dict[str, str] = {}


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` is set, so that Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def missing(device: torch.device) -> str:
    """Why kernels can't run on a device; empty if they can."""
    if reason := off("kernels"):
        return reason
    if device.type != "cuda":
        return "" if interpreted() else f"there are no kernels for {device.type}"
    import torch

    if torch.version.hip is not None:
        return "the kernels were not checked on ROCm"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in found.split(".")[:2] if part.isdecimal()) < OLDEST:
        return f"Triton {found} is too old"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= CAPABILITY else f"this GPU's generation, {capability[0]}.{capability[1]}, is too old"


def off(part: str) -> str:
    """Why a part of :data:`SWITCHES` must not be used; empty if it may."""
    name = SWITCHES[part]
    return _off.get(part) or (f"{name} is 0" if os.environ.get(name) == "0" else "")


def switch_off(reasons: Mapping[str, str]) -> None:
    """Switches parts of :data:`SWITCHES` off, each for a reason, and all others on again."""
    _off.clear()
    _off.update(reasons)


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **meta: Any) -> None:
    """Launches a Triton kernel on the GPU of its tensors. Triton itself launches on the current GPU, and refuses the
    tensors of another one."""
    import torch

    device = next(one.device for one in given if isinstance(one, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*given, **meta)
    else:
        kernel[grid](*given, **meta)


def variant(kernel: Any, given: tuple[Any, ...], meta: Mapping[str, Any]) -> Hashable:
    """What selects the compiled code of a launch; equal for launches that Triton executes by the same code.

    Args:
        kernel: made by ``triton.jit``.
        given, meta: the arguments of :func:`launch`.
    """
    import torch

    device = next(one.device for one in given if isinstance(one, torch.Tensor))
    fixed, unaligned = (_setting(kernel, name) for name in ("do_not_specialize", "do_not_specialize_on_alignment"))
    kinds = [
        _kind(one, fixed=name in fixed, aligned=name not in unaligned)
        for name, one in zip(kernel.arg_names, given, strict=False)
    ]
    return device, kernel.fn.__name__, tuple(kinds), tuple(sorted(meta.items()))


def _setting(kernel: Any, name: str) -> set[str]:
    """The arguments that a setting of ``triton.jit`` names; Triton's interpreter keeps settings in another place."""
    return set(getattr(kernel, name, None) or getattr(kernel, "kwargs", {}).get(name) or ())


def _kind(one: Any, *, fixed: bool, aligned: bool) -> Hashable:
    """What Triton's compiler knows of an argument."""
    if hasattr(one, "data_ptr"):
        return one.dtype, aligned and one.data_ptr() % ALIGNMENT == 0
    if isinstance(one, bool) or not isinstance(one, int):
        return type(one).__name__
    wide = not -(2**31) <= one < 2**31
    return ("int", wide) if fixed else ("int", wide, one == 1, aligned and one % ALIGNMENT == 0)


_ending: list[str] = []


def end_process(why: str) -> None:
    """Says that this process can't be relied on any more after what happened on its GPU. A worker ends after its
    present answer, and the next operation gets a new process; any other program goes on."""
    _ending.append(why)


def ending() -> str:
    """Why this process should end, see :func:`end_process`; empty if nothing happened."""
    return _ending[0] if _ending else ""
