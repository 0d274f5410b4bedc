"""A model's own work beside attention: products of a decode step's few rows, norms, a prompt's feed-forward layers.

On a CPU: a product of 8 rows with a weight matrix should cost one reading of the weights. MKL reads them at a fifth to
two thirds of the speed that memory has; :class:`ThinLinear` and :class:`QuickNorm` hand the work to loops of ours
(``d2obench.cpu``), which read at 80 % of it and up.

A prompt's feed-forward layers make four tensors of ``[tokens, 1536]``. Taken in pieces of tokens they are small, and
the peak of memory is lower for it; time is the same. On a GPU norms alone are taken over (:class:`FusedNorm`).

Weights stay as and where they are. All caches measured on a model share this, the library's own too. Where compiled
loops can't run (:func:`d2obench.cpu.available`), and for other dtypes, all is PyTorch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2obench import cpu

ROWS = 16
"""Most rows of an input for which this is the faster way."""
SHARE, FEWEST = 96, 12
"""Outputs of one item of a product: at most, and at least where the threads would else have too few pieces."""
TOKENS = 64
"""Tokens of one item of a norm."""
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm")
"""Norms of transformers that are ``w·(x ÷ √(mean x² + ε))``."""


@functools.cache
def _loops() -> Any:
    """The compiled loops; the first call imports numba."""
    from d2obench.cpu import products

    return products


class ThinLinear(nn.Linear):
    """As ``nn.Linear``; see the module's head."""

    def forward(self, input: Tensor) -> Tensor:
        """``[…, in]`` to ``[…, out]``."""
        inputs, outputs = self.in_features, self.out_features
        rows = input.numel() // inputs
        parameters = self._parameters  # modules look attributes up slowly, and a step does so two hundred times
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        if not 0 < rows <= ROWS or not input.dtype == weight.dtype == torch.float32 or not input.is_cpu:
            return F.linear(input, weight, bias)
        held = input.contiguous()
        out = torch.empty(*input.shape[:-1], outputs)
        share = share_of(outputs, torch.get_num_threads())
        loops = _loops()
        arguments = loops.ProductArguments(
            items=-(-outputs // share), x=held.data_ptr(), weight=weight.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(), out=out.data_ptr(), rows=rows, inputs=inputs, outputs=outputs,
            share=share,
        )  # fmt: skip
        cpu.launch(loops.product, arguments)
        return out


@functools.cache
def share_of(outputs: int, threads: int) -> int:
    """Outputs of one item of a product: four pieces a thread, within bounds; a multiple of a tile's side."""
    wanted = -(-outputs // (4 * threads))
    return -(-max(FEWEST, min(SHARE, wanted)) // 3) * 3


class FusedNorm(nn.Module):
    """The root-mean-square norm of :data:`NORMS` by PyTorch's own kernel, which on a GPU is one launch instead of six;
    it takes the place of their class."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[…, width]`` to the same."""
        return F.rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, self.variance_epsilon)


class QuickNorm(nn.Module):
    """The root-mean-square norm of :data:`NORMS` in one loop; it takes the place of their class."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[…, width]`` to the same."""
        if not hidden_states.dtype == self.weight.dtype == torch.float32 or not hidden_states.is_cpu:
            return F.rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, self.variance_epsilon)
        held = hidden_states.contiguous()
        out = torch.empty_like(held)
        width = held.shape[-1]
        rows = held.numel() // width
        loops = _loops()
        arguments = loops.NormArguments(
            items=-(-rows // TOKENS), x=held.data_ptr(), weight=self.weight.data_ptr(), out=out.data_ptr(), rows=rows,
            width=width, share=TOKENS, epsilon=self.variance_epsilon,
        )  # fmt: skip
        cpu.launch(loops.norm, arguments)
        return out


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


def adapt(model: Any) -> None:
    """Lets a model compute this way. On a CPU its linear layers and norms, if it is float32, and its feed-forward
    layers, unless they look at more than one tensor or route tokens to experts; elsewhere its norms."""
    if (getattr(model, "tp_size", 1) or 1) > 1:
        return
    lent = cpu.suits(model.dtype, model.device)
    if model.device.type != "cpu":
        for module in model.modules():
            if type(module).__name__ in NORMS and "forward" not in vars(module):
                module.__class__ = FusedNorm
        return
    for module in list(model.modules()):
        plain = lent and getattr(module, "weight", None) is not None and module.weight.is_contiguous()
        if plain and type(module) is nn.Linear and module.in_features % 8 == 0:
            module.__class__ = ThinLinear
            _loops()
        elif plain and type(module).__name__ in NORMS:
            module.__class__ = QuickNorm
        mlp = getattr(module, "mlp", None)
        if isinstance(mlp, nn.Module) and not hasattr(mlp, "experts") and len(signature(mlp.forward).parameters) == 1:
            mlp.forward = piecewise(mlp.forward)
