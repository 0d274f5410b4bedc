"""The small work between decode steps on a CPU, compiled (numba): no temporaries, one call for a dozen operators.

Design. What policies do at the end of a step touches a few rows per KV head: there an operator's dispatch costs more
than its arithmetic. Where ``d2obench.decode.cpu.backend`` serves a state and a policy goes by the lowest score, all
of it is
one loop on PyTorch's threads; what is here serves every other policy: the choice of a victim, the booking of its slot.
Each loop is the plain one over rows, works in place on the very storage of the tensors, and has a PyTorch twin beside
its caller in ``d2obench.decode.state`` that does the same and serves every other case (other dtypes and devices,
quantised stores, no threads to lend). Results agree to rounding; ties go to the lowest slot in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2obench import cpu
from d2obench.slots.dense import DenseStore

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def serves(store: DenseStore) -> bool:
    """Whether the kernels can work on this storage."""
    return type(store) is DenseStore and cpu.suits(store.dtype, store.device)


def arrays(*tensors: Tensor) -> tuple[np.ndarray[Any, Any], ...]:
    """The tensors' storage as arrays; writing to one writes to the other."""
    return tuple(tensor.numpy() for tensor in tensors)


def loops() -> Any:
    """The compiled loops, those of ``d2obench.decode.cpu.backend`` with them; the first call in an environment
    compiles, later
    ones read numba's own cache.

    A session calls this when it is made, before anything of it is timed.
    """
    from d2obench.cpu import nearest
    from d2obench.decode.cpu import attend as host_loops
    from d2obench.decode.cpu import loops
    from d2obench.decode.cpu import update as host_turn

    assert host_loops.attend and host_turn.turn and nearest.nearest
    return loops
