"""A model's products on a CPU: of the few rows of a decode step, and of the many of a prompt.

A product of 8 rows with a weight matrix should cost one reading of the weights. MKL reads them at 14 GB/s where memory
gives 25, and those of an output layer, ``[49152, 576]``, at 8 GB/s. As a batch of products with some rows of the
weights each, ``[n, in] · [in, 96]``, the same library reads them at 18 to 20 GB/s (two cores of a Xeon, float32).

A prompt's feed-forward layers make four tensors of ``[tokens, 1536]``. Taken in pieces of tokens they are small, and
the peak of memory is lower for it; time is the same.

Weights stay as and where they are. All caches measured on a model share this, the library's own too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = range(4, 13)
"""Rows of an input for which this is the faster way; from 16 rows on a plain product is."""
SMALLEST, WIDEST, NARROWEST = 384, 96, 24
"""Output features below which a plain product is as fast, and features of one product of the batch."""


class ThinLinear(nn.Linear):
    """As ``nn.Linear``; see the module's head."""

    def forward(self, input: Tensor) -> Tensor:
        """``[…, in]`` to ``[…, out]``."""
        rows = input.numel() // self.in_features
        if rows not in ROWS:
            return F.linear(input, self.weight, self.bias)
        block = block_of(self.out_features)
        parts = self.weight.view(-1, block, self.in_features).transpose(1, 2)
        same = input.reshape(1, rows, -1).expand(len(parts), -1, -1)
        out = torch.bmm(same, parts).transpose(0, 1).reshape(*input.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


PIECE = 1024
"""Tokens of a prompt that a feed-forward layer takes at once."""


def piecewise(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A feed-forward layer's ``forward``, which looks at each token by itself, over pieces of ``[B, L, hidden]``."""

    @functools.wraps(forward)
    def taken(hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        if tokens <= PIECE:
            return forward(hidden_states)
        flat = hidden_states.reshape(1, tokens, -1)
        out = torch.empty_like(flat)
        for first in range(0, tokens, PIECE):
            out[:, first : first + PIECE] = forward(flat[:, first : first + PIECE])
        return out.view(hidden_states.shape)

    return taken


@functools.cache
def block_of(features: int) -> int:
    """Output features of one product: the largest divisor in range; 0 if there is none."""
    sizes = range(WIDEST, NARROWEST - 1, -1) if features >= SMALLEST else ()
    return next((size for size in sizes if features % size == 0), 0)


def adapt(model: Any) -> None:
    """Lets a model on a CPU compute this way: its linear layers if it is float32, and its feed-forward layers unless
    they look at more than one tensor or route tokens to experts."""
    if model.device.type != "cpu" or (getattr(model, "tp_size", 1) or 1) > 1:
        return
    for module in list(model.modules()):
        thin = type(module) is nn.Linear and model.dtype == torch.float32 and module.weight.is_contiguous()
        if thin and block_of(module.out_features):
            module.__class__ = ThinLinear
        mlp = getattr(module, "mlp", None)
        if isinstance(mlp, nn.Module) and not hasattr(mlp, "experts") and len(signature(mlp.forward).parameters) == 1:
            mlp.forward = piecewise(mlp.forward)
