"""Which backend executes the decode steps of a state: Triton kernels, compiled CPU loops, or PyTorch operators.

:func:`choose` asks each compiled backend in turn. The answer is a backend object, or a string with the reason why it
cannot execute this state. The reason becomes part of the ``decode path`` of every result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from d2obench.compiler import interpreted, missing
from d2obench.decode.pages import ReadsPages
from d2obench.decode.reference import Backend

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


def triton(state: DecodeState) -> Backend | str:
    """Triton kernels on a CUDA device, or Triton's interpreter on a CPU if ``TRITON_INTERPRET=1`` is set."""
    device = state.store.device
    if device.type != "cuda" and not interpreted():
        return ""
    if reason := missing(device):
        return reason
    from d2obench.decode.triton.backend import offer

    return offer(state)


def compiled_cpu(state: DecodeState) -> Backend | str:
    """Compiled loops (numba) on a CPU."""
    if state.store.device.type != "cpu" or interpreted():
        return ""
    from d2obench.decode.cpu.backend import offer

    return offer(state)


OFFERS: tuple[Callable[[DecodeState], Backend | str], ...] = (triton, compiled_cpu)


def choose(state: DecodeState) -> Backend:
    """The first backend that can execute ``state``; PyTorch operators if none of the compiled ones can."""
    if state.pages is not None:
        return ReadsPages(state)
    reasons = []
    for offer in OFFERS:
        made = offer(state)
        if isinstance(made, Backend):
            return made
        reasons.append(made)
    return Backend(state, next(filter(None, reasons), ""))
