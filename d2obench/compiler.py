"""Whether Triton, which compiles the GPU kernels, can be used on a device. These checks do not import Triton."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

import torch

OLDEST = (3, 2)
"""The first Triton version whose language has everything that the kernels use."""
CAPABILITY = (8, 0)
"""The first NVIDIA compute capability for which Triton compiles bfloat16 products."""


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` is set, so that Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def missing(device: torch.device) -> str:
    """Why kernels can't run on a device; empty if they can."""
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
