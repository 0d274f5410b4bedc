"""The small work of a decode step on a CPU, compiled (numba): no temporaries, one call instead of a dozen operators.

Design. Attention itself is four large operators a layer and stays PyTorch's. What surrounds it is small: D2O's nearest
host, threshold and merge touch a few rows per KV head, and so do the scores and the choice of a victim at the end of a
step. There an operator's dispatch costs more than its arithmetic. Each kernel here is the plain loop over rows, works
in place on the very storage of the tensors, and has a PyTorch twin beside its caller that does the same and serves
every other case (other dtypes and devices, quantised stores, numba missing): ``d2obench.engine.carry`` and
``d2obench.engine.state``. Results agree to rounding; ties of a cosine or a score go to the lowest slot in both.

The kernels run on one thread: their work is a few hundred kilobytes, and a second pool of threads would fight with
PyTorch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2obench import team
from d2obench.engine.slots import DenseStore

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def serves(store: DenseStore) -> bool:
    """Whether the kernels can work on this storage."""
    return type(store) is DenseStore and team.suits(store.dtype, store.device)


def arrays(*tensors: Tensor) -> tuple[np.ndarray[Any, Any], ...]:
    """The tensors' storage as arrays; writing to one writes to the other."""
    return tuple(tensor.numpy() for tensor in tensors)


def loops() -> Any:
    """The compiled loops; the first call in an environment compiles them, later ones read numba's own cache.

    A session calls this when it is made, before anything of it is timed.
    """
    from d2obench.engine import host_loops, host_turn, loops

    assert host_loops.attend and host_turn.turn
    return loops
