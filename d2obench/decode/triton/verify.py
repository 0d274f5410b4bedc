"""Compares steps by the Triton kernels with the same steps by PyTorch operators, on copies of a state.

A compiler or a driver can be wrong without an error. So the first state on a GPU that uses certain variants of the
kernels decodes a few random tokens of its first sequence in both ways (:func:`difference`), before its first step; the
outcome holds for all states with these variants.

At 16 bits both round differently, so that they may decide differently between entries that are nearly equal: which one
is evicted, or which one it is merged into. Rows in which this has happened are not compared any further, and only if
more than half of them differ is it counted as an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2obench.decode.reference import Backend

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

STEPS = 3
NEAR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of an output, relative to 1 + its size. Outputs are means of values, of about the size of 1."""


def difference(fast: DecodeState, plain: DecodeState) -> str:
    """What differs between the steps of two equal states with one sequence; empty if nothing does.

    Args:
        fast: its backend is the one to verify.
        plain: the same contents; decodes by PyTorch operators.
    """
    # 1. random tokens, the same for both
    plain.backend = Backend(plain)
    store, (key_width, value_width) = plain.store, plain.store.widths
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int, width: int) -> Tensor:
        numbers = torch.randn(1, heads, 1, width, generator=generator)
        return numbers.to(device=store.device, dtype=store.dtype)

    near = NEAR[store.dtype]
    alike = torch.ones_like(plain.slot, dtype=torch.bool)
    wrong = torch.zeros((), dtype=torch.bool, device=store.device)
    room = min(
        capacity - prompt - plain.added for capacity, prompt in zip(store.capacities, plain.prompts, strict=True)
    )
    for _ in range(min(STEPS, room) if plain.grows else STEPS):
        # 2. attention of all layers; an output counts where both have decided alike so far
        for layer in range(len(store.capacities)):
            query = drawn(plain.heads * plain.group, key_width)
            key, value = drawn(plain.heads, key_width), drawn(plain.heads, value_width)
            outs = []
            for state in (fast, plain):
                state.write(layer, key, value)
                outs.append(state.attend(layer, query, key_width**-0.5).float().view(store.rows, -1))
            if fast.merge is not None and plain.merge is not None:
                alike[layer] &= fast.merge.target[layer] == plain.merge.target[layer]
            apart = (outs[0] - outs[1]).abs() > near * (1 + outs[1].abs())
            wrong |= ((apart | outs[0].isnan()).any(1) & alike[layer]).any()
        # 3. what is evicted
        fast.advance()
        plain.advance()
        if not plain.grows:
            alike &= fast.slot == plain.slot
    if bool(wrong):
        return "attention differs"
    if 2 * int(alike.sum()) < alike.numel():
        return "what is evicted or merged differs"
    # 4. positions, and the scores by which the next ones are chosen, in the same rows
    for name in ("position", "score", "threshold"):
        ours, theirs = getattr(fast, name), getattr(plain, name)
        if not theirs.numel():
            continue
        ours, theirs = ours[alike].double(), theirs[alike].double()
        if not torch.allclose(ours, theirs, rtol=near, atol=near, equal_nan=True):
            return f"the state differs ({name})"
    return ""
