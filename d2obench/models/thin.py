"""Linear layers whose input is thin: the few rows of a decode step, on a CPU.

A product of 8 rows with a weight matrix should cost one reading of the weights. MKL reads them at 14 GB/s where memory
gives 25, and those of an output layer, ``[49152, 576]``, at 8 GB/s. As a batch of products with some rows of the
weights each, ``[n, in] · [in, 48]``, the same library reads them at 18 to 20 GB/s (two cores of a Xeon, float32).
Weights stay as and where they are. All caches measured on a model share this, the library's own too.
"""

from __future__ import annotations

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


def block_of(features: int) -> int:
    """Output features of one product: the largest divisor in range; 0 if there is none."""
    sizes = range(WIDEST, NARROWEST - 1, -1) if features >= SMALLEST else ()
    return next((size for size in sizes if features % size == 0), 0)


def adapt(model: Any) -> None:
    """Lets the linear layers of a float32 model on a CPU take thin inputs this way."""
    if model.device.type != "cpu" or model.dtype != torch.float32 or (getattr(model, "tp_size", 1) or 1) > 1:
        return
    for module in model.modules():
        if type(module) is nn.Linear and block_of(module.out_features) and module.weight.is_contiguous():
            module.__class__ = ThinLinear
