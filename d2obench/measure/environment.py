"""Facts about the machine and the software of a run, and a hash of those that must be equal to compare two runs.

No fact contains the name of a host, a user or a folder. Facts about torch are given only if torch is imported already.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from d2obench.measure.nvml import Nvml, open_gpu
from d2obench.record import dump

COMPARED = (
    "cpu",
    "cores",
    "threads",
    "governor",
    "machine",
    "device",
    "gpu",
    "gpu_memory_bytes",
    "driver",
    "power_limit_w",
    "ecc",
    "mig",
    "torch",
    "transformers",
    "triton",
    "numba",
    "attention",
)
"""Facts that must be equal so that times and memory peaks of two runs can be compared. The commit of this project is
not among them, because commits are what is compared."""
_PACKAGES = ("torch", "transformers", "triton", "numba", "accelerate", "numpy", "d2obench")


def fingerprint(device: str = "cpu", *, attention: str = "", gpu: Nvml | None = None) -> dict[str, Any]:
    """Facts by name; an unknown one is None.

    Args:
        device: where the model runs, ``cpu`` or ``cuda:0``.
        attention: a description of the attention in use; by default that of this process.
        gpu: the GPU to describe; by default that of ``device``.
    """
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": _threads(),
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "machine": platform.machine(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "device": device.partition(":")[0],
        "attention": attention or _attention(device),
        **{name: _version(name) for name in _PACKAGES},
        **_code(),
    }
    gpu = gpu or (_gpu(device) if device.startswith("cuda") else None)
    if gpu is not None:
        facts |= gpu.facts()
    return facts


def environment_hash(facts: Mapping[str, Any]) -> str:
    """Sixteen hex digits that are equal where all facts in COMPARED are."""
    return hashlib.sha256(dump([facts.get(key) for key in COMPARED])).hexdigest()[:16]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Facts in COMPARED that differ, with both values."""
    return {key: (a.get(key), b.get(key)) for key in COMPARED if a.get(key) != b.get(key)}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else None


_PYTORCH_PATH = "; column sums: blocks of queries; decode: products over slots"
_CPU_PATH = "; column sums: blocks of queries; decode: compiled loops for float32, products over slots for others"
_TRITON_PATH = "; column sums and decode: Triton kernels"
"""What computes column sums and decode steps where everything is supported; the row of a cell that runs in another way
says so."""


def _attention(device: str) -> str | None:
    """The attention in use: kernels of torch for plain attention, and of this project where scores are needed."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if not device.startswith("cuda"):
        from d2obench import cpu

        return f"sdpa: flash (CPU){_CPU_PATH if cpu.available() else _PYTORCH_PATH}"
    on = torch.backends.cuda
    kinds = {
        "flash": on.flash_sdp_enabled(),
        "efficient": on.mem_efficient_sdp_enabled(),
        "cudnn": on.cudnn_sdp_enabled(),
        "math": on.math_sdp_enabled(),
    }
    from d2obench.compiler import missing

    path = _PYTORCH_PATH if missing(torch.device(device)) else _TRITON_PATH
    return f"sdpa: {', '.join(kind for kind, enabled in kinds.items() if enabled)}{path}"


def _gpu(device: str) -> Nvml | None:
    torch = sys.modules.get("torch")
    if torch is None:
        index = device.partition(":")[2]
        return open_gpu(int(index) if index.isdecimal() else 0)
    return open_gpu(torch.device(device)) if torch.cuda.is_available() else None


def _code() -> dict[str, Any]:
    """The commit of this package's git checkout, and whether files differ from it; None where there is no checkout."""
    package = Path(__file__).resolve().parents[1]
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    changed = _git(package, "status", "--porcelain")
    return {"commit": _git(package, "rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip() or None
    except OSError:
        return None
