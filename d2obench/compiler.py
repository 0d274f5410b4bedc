"""Whether Triton, the compiler of our kernels for GPUs, serves a device. Asking imports nothing of it."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

import torch

OLDEST = (3, 2)
"""The first Triton whose language has what the kernels use."""
CAPABILITY = (8, 0)
"""The first NVIDIA generation that Triton compiles bfloat16 products for."""


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def missing(device: torch.device) -> str:
    """Why kernels can't run on a device, in words; empty where they can."""
    if device.type != "cuda":
        return "" if interpreted() else f"there are no kernels for {device.type}"
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
