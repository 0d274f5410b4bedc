"""Triton kernels, and the one place that says whether a decode step uses them.

The fused path serves CUDA devices. What it doesn't serve goes the PyTorch path of ``d2obench.decode.state``, which
gives the same results and is its reference; the reason is said once (:func:`fused`). With ``TRITON_INTERPRET=1`` in
the environment Triton's interpreter runs the kernels on a CPU: for tests, it is slow. Importing this package imports
neither Triton nor a kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from d2obench.compiler import interpreted, missing
from d2obench.slots.dense import DenseStore

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState
    from d2obench.decode.triton.backend import FusedDecode

WIDEST = 256
"""Most channels of a head: a block of them must fit shared memory."""
_probed: dict[tuple[Any, ...], str] = {}


def unserved(state: DecodeState) -> str:
    """Why the fused path doesn't serve a state that stands on a device with kernels; empty where it does."""
    store = state.store
    if type(store) is not DenseStore:
        return "the cache is quantised"
    if store.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"there are no kernels for {str(store.dtype).removeprefix('torch.')}"
    if max(store.widths) > WIDEST:
        return f"heads have {max(store.widths)} channels, more than {WIDEST}"
    if state.pending_merge is not None and state.pending_merge.spec.per_layer:
        return "a threshold per layer needs all its KV heads at once"
    return ""


def fused(state: DecodeState) -> FusedDecode | str:
    """The fused path of a state, or why it goes the PyTorch path: empty where nothing else was to be expected (a CPU),
    words for the record otherwise. Kernels are compiled here, before the first step: where that fails, that is said.
    """
    device = state.store.device
    if device.type != "cuda" and not interpreted():
        return ""
    reason = missing(device) or unserved(state)
    if reason:
        return reason
    try:
        from d2obench.decode.triton.backend import FusedDecode

        onto = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if onto else 4
        path = FusedDecode(state, processors, interpreted=not onto)
        if not onto:
            return path
        key = (
            device, state.store.dtype, *path.common.values(), *path.shape.values(), path.rule, path.biased,
            state.grows, tuple(sorted({splits.bit_length() for splits in path.splits})), state.policy,
        )  # fmt: skip
        if key not in _probed:
            _probed[key] = _probe(path)
        return _probed[key] or path
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as problem:  # an installation of Triton that can't be imported, say
        return _said(problem)


def _probe(path: FusedDecode) -> str:
    try:
        path.probe()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as problem:  # whatever a compiler may throw: the PyTorch path is there
        return _said(problem)
    return ""


def _said(problem: Exception) -> str:
    first = str(problem).strip().partition("\n")[0][:120]
    return f"the kernels did not compile ({type(problem).__name__}: {first})"
