"""Our kernels in place of a model's own layers: products with few rows, norms, feed-forward layers, rotary positions.

On a CPU, a product of 8 rows with a weight matrix should cost no more than reading the weights once. MKL reads them at
a fifth to two thirds of the memory bandwidth; :class:`ThinLinear` and :class:`QuickNorm` use compiled loops
(``d2obench.cpu``), which reach 80 % and more. The feed-forward layers make four tensors of ``[tokens, 1536]`` for a
prompt. Computed in pieces of tokens they are small, which lowers peak memory at the same speed. On a GPU norms are one
launch (:class:`FusedNorm`), products with the same input are one product, and ``activation(gate)·up`` is one kernel
(``d2obench.models.joined``).

Rotary positions of queries and keys are one kernel instead of fourteen operators. In a decode step these work on a few
vectors of the hidden size, and every operator costs a launch: in a step of Llama-3-8B at batch 32 on a GPU they are a
third of all launches. The attention modules of transformers call a global function of their Python module,
``apply_rotary_pos_emb``. A module gets the same code with this one name bound to our function (:func:`rebind`): no
model code is copied, and nothing changes for other users of the library. The results are those of the library's
function, with one rounding instead of four for 16-bit types. Inputs that the kernels don't support are passed to the
library's function.

Weights stay unchanged, and none is held twice. All caches measured on a model use these kernels, including the
library's own caches. If PyTorch's threads can't be used, or for other dtypes, everything runs as PyTorch operators.
``--kernels library`` turns all of these kernels off.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import signature
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2obench import cpu
from d2obench.compiler import end_process, missing, off
from d2obench.errors import in_a_line, is_device_fault, is_out_of_memory
from d2obench.models import joined

ROWS = 16
"""Largest number of input rows for which the compiled loop is faster."""
SHARE, FEWEST = 96, 12
"""Outputs per work item of a product: the largest number, and the smallest if there would be too few items for all
threads."""
TOKENS = 64
"""Tokens per work item of a norm."""
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm")
"""Norm classes of transformers that compute ``w·(x ÷ √(mean x² + ε))``."""


@functools.cache
def _loops() -> Any:
    """The compiled loops; the first call imports numba."""
    from d2obench.cpu import products

    return products


class ThinLinear(nn.Linear):
    """``nn.Linear`` with a compiled loop for inputs of few rows; see the module's docstring."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[…, in]`` to ``[…, out]``."""
        inputs, outputs = self.in_features, self.out_features
        rows = input.numel() // inputs
        parameters = self._parameters  # attribute access on modules is slow, and a step does this two hundred times
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
    """Outputs per work item of a product: four items per thread, within bounds; a multiple of a tile's side."""
    wanted = -(-outputs // (4 * threads))
    return -(-max(FEWEST, min(SHARE, wanted)) // 3) * 3


class FusedNorm(nn.Module):
    """The root-mean-square norm of :data:`NORMS` by PyTorch's own kernel, which on a GPU is one launch instead of six;
    replaces the model's class."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[…, width]`` to the same."""
        return F.rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, self.variance_epsilon)


class QuickNorm(nn.Module):
    """The root-mean-square norm of :data:`NORMS` in one compiled loop; replaces the model's class."""

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


PIECE, GPU_PIECE = 1024, 8192
"""Number of a prompt's tokens that a feed-forward layer processes at once; on a GPU, whose products are slow if they
are small."""


def piecewise(module: nn.Module, on_gpu: bool = False) -> Callable[[Tensor], Tensor]:
    """A ``forward`` for a feed-forward layer that processes ``[B, L, hidden]`` in pieces; possible because it computes
    each token independently.

    It is a bound method of the module, so that a copy of the model uses its own weights.
    """
    plain = type(module).forward
    own = joined.feed_forward(plain) if on_gpu and joined.serves(module) else plain

    @functools.wraps(plain)
    def in_pieces(self: nn.Module, hidden_states: Tensor) -> Tensor:
        forward: Callable[[Tensor], Tensor] = functools.partial(own, self)
        tokens, piece = hidden_states.numel() // hidden_states.shape[-1], GPU_PIECE if on_gpu else PIECE
        if tokens <= piece:
            return forward(hidden_states)
        flat = hidden_states.reshape(1, tokens, -1)
        out = torch.empty_like(flat)
        for first in range(0, tokens, piece):
            out[:, first : first + piece] = forward(flat[:, first : first + piece])
        return out.view(hidden_states.shape)

    return MethodType(in_pieces, module)


def adapt(model: Any) -> None:
    """Replaces a model's layers by our kernels, as far as its device and dtype are supported."""
    adapt_layers(model)
    adapt_rotary(model)


def adapt_layers(model: Any) -> None:
    """Replaces layers: on a CPU the linear layers and norms of a float32 model; on a GPU norms and products with the
    same input; on both the feed-forward layers, unless they use more than one tensor or route tokens to experts; on
    other devices norms only."""
    if (getattr(model, "tp_size", 1) or 1) > 1:
        return
    compiled, on_gpu = cpu.suits(model.dtype, model.device), model.device.type == "cuda"
    if model.device.type != "cpu":
        for module in model.modules():
            if type(module).__name__ in NORMS and "forward" not in vars(module):
                module.__class__ = FusedNorm
        if not on_gpu:
            return
        joined.join(model)
        joined.verify(model)
    for module in list(model.modules()):
        plain = compiled and getattr(module, "weight", None) is not None and module.weight.is_contiguous()
        if plain and type(module) is nn.Linear and module.in_features % 8 == 0:
            module.__class__ = ThinLinear
            _loops()
        elif plain and type(module).__name__ in NORMS:
            module.__class__ = QuickNorm
        mlp = getattr(module, "mlp", None)
        if not isinstance(mlp, nn.Module) or "forward" in vars(mlp) or hasattr(mlp, "experts"):
            continue
        if len(signature(mlp.forward).parameters) == 1:
            mlp.forward = piecewise(mlp, on_gpu)


ROTARY_FUNCTION = "apply_rotary_pos_emb"
ROTARY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt_neox", "falcon")
"""Model packages of transformers whose ``apply_rotary_pos_emb`` computes the same as our function."""
ROTARY_TOKENS = 16
"""Tokens per work item of the CPU loop."""
Pair = tuple[Tensor, Tensor]
_refused: dict[torch.device, str] = {}


def rotary_fallback(device: torch.device) -> str:
    """Why rotary positions on a GPU are computed by the library's operators; empty if they are not."""
    return _refused.get(device, "") or off("kernels")


def adapt_rotary(model: Any) -> None:
    """Makes the attention modules of a model use our rotary kernels, if its device has any."""
    on_cpu = model.device.type == "cpu"
    if not (cpu.suits(model.dtype, model.device) if on_cpu else not missing(model.device)):
        return
    for module in model.modules():
        family = type(module).__module__.split(".")[-2:-1]
        # if the instance has its own forward, something has wrapped it, for example for several devices
        if family and family[0] in ROTARY_FAMILIES and "forward" not in vars(module):
            rebind(module)


def rebind(module: Any) -> None:
    """Gives a module the same code, with the library's rotary function replaced by ours."""
    code = inspect.unwrap(type(module).forward)
    if ROTARY_FUNCTION not in code.__code__.co_names or code.__closure__:
        return
    scope = {**code.__globals__, ROTARY_FUNCTION: with_rotary_kernel(code.__globals__[ROTARY_FUNCTION])}
    forward = FunctionType(code.__code__, scope, code.__name__, code.__defaults__)
    forward.__kwdefaults__ = code.__kwdefaults__
    module.forward = MethodType(forward, module)


@functools.cache
def with_rotary_kernel(library: Callable[..., Pair]) -> Callable[..., Pair]:
    """Our replacement for ``library``; calls it for inputs that no kernel supports."""

    @functools.wraps(library)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Pair:
        if not args and not kwargs and _fits_rotary(q, k, cos, sin):
            if q.device.type == "cuda":
                if (turned := _rotate_on_gpu(q, k, cos, sin)) is not None:
                    return turned
            elif (given := _by_token(q, k)) is not None:
                return _rotate_on_cpu(*given, cos, sin)
        return library(q, k, cos, sin, *args, **kwargs)

    return apply


def _fits_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are queries and keys ``[B, H, L, d]`` with angles ``[B or 1, L, d]`` for all channels."""
    width, tokens = q.shape[-1], q.shape[0] * q.shape[2]
    lines = cos.numel() // width
    same = q.dtype == k.dtype == cos.dtype == sin.dtype and q.stride(-1) == k.stride(-1) == 1
    whole = cos.shape[-1] == width and width % 2 == 0 and lines in (tokens, q.shape[2])
    return q.dim() == 4 and same and whole and cos.is_contiguous() and sin.is_contiguous() and tokens > 0


def _by_token(q: Tensor, k: Tensor) -> Pair | None:
    """Both as ``[B, L, H, d]``, if they have this memory layout and the loops support them; otherwise None."""
    queries, keys = q.transpose(1, 2), k.transpose(1, 2)
    whole = queries.is_contiguous() and keys.is_contiguous() and cpu.suits(q.dtype, q.device)
    return (queries, keys) if whole else None


def _rotate_on_cpu(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    batch, length, heads, width = queries.shape
    out, out_keys = torch.empty_like(queries), torch.empty_like(keys)
    tokens = batch * length
    loops = _loops()
    arguments = loops.RotateArguments(
        items=-(-tokens // ROTARY_TOKENS), queries=queries.data_ptr(), keys=keys.data_ptr(), cos=cos.data_ptr(),
        sin=sin.data_ptr(), out_queries=out.data_ptr(), out_keys=out_keys.data_ptr(), tokens=tokens, query_heads=heads,
        key_heads=keys.shape[2], width=width, lines=cos.numel() // width, share=ROTARY_TOKENS,
    )  # fmt: skip
    cpu.launch(loops.rotate, arguments)
    return out.transpose(1, 2), out_keys.transpose(1, 2)


def _rotate_on_gpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair | None:
    """Rotary positions by the Triton kernel; None if it can't be compiled, which is tried once per device."""
    if q.device in _refused or off("kernels"):
        return None
    try:
        from d2obench.models.rotary_triton import rotated

        return rotated(q, k, cos, sin)
    except Exception as problem:  # a compiler may raise anything; the library's function is the fallback
        if is_out_of_memory(problem) or is_device_fault(problem):
            end_process(f"rotary positions failed ({in_a_line(problem)})")
            raise
        _refused[q.device] = f"the kernel did not compile ({in_a_line(problem)})"
        return None
