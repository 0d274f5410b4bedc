"""A model whose logits are not finite gets no figures; tasks and timed requests share this check.

A single NaN in a weight, or one overflow in a narrow dtype, spoils everything computed from it, yet greedy decoding of
NaN still produces tokens and takes time. So the cell fails, and the error names the first layer where it happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch

from d2obench.errors import ModelError
from d2obench.ranges import ranges_as


class Steps(Protocol):
    """The methods of :class:`d2obench.cache.Session` that the check uses."""

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor: ...
    def step(self, tokens: torch.Tensor) -> torch.Tensor: ...


def require_finite(
    logits: torch.Tensor, when: str, session: Steps | None = None, prompts: Sequence[Sequence[int]] | None = None
) -> None:
    """Raises where logits hold NaN or infinity.

    Args:
        logits: ``[B, V]``; on a GPU the host waits for them.
        when: what they belong to, for example ``after the prompt``.
        session: the open session that they came from; where given, it is used up to find the layer.
        prompts: the prompts it has read, which are then read once more.

    Raises:
        ModelError: names the first layer with such an output, where it can be found.
    """
    if bool(torch.isfinite(logits).all()):
        return
    layer = ""
    model = getattr(getattr(session, "loaded", None), "model", None)
    if session is not None and isinstance(model, torch.nn.Module):
        layer = _first_layer(model, session, logits.argmax(-1), prompts)
    raise ModelError(
        f"the logits {when} are not finite",
        why=f"the first layer with such an output is {layer}" if layer else "",
        remedy="check the model's weights, or use --dtype float32",
    )


def _first_layer(
    model: torch.nn.Module, session: Steps, tokens: torch.Tensor, prompts: Sequence[Sequence[int]] | None
) -> str:
    """The name of the first module whose output is not finite."""
    # 1. One more decode step shows NaN in a weight or in the cache. 2. Reading the prompts again shows where it began:
    #    the caches hold NaN only in the layers after that one.
    step = _first_output(model, lambda: session.step(tokens))
    whole = [list(prompt) for prompt in prompts or ()]
    return (_first_output(model, lambda: session.prefill(whole)) if whole else "") or step


def _first_output(model: torch.nn.Module, work: Callable[[], object]) -> str:
    """Runs ``work`` until a module of the model gives an output that is not finite; its name, or nothing.

    Modules end from the inside to the outside, so the innermost one is found.
    """
    try:
        # Ranges are on, because a CUDA graph, inside which no hook runs, is not used with them.
        with torch.inference_mode(), _ending_where_not_finite(model), ranges_as(lambda name: nullcontext()):
            work()
    except _NotFiniteError as problem:
        return str(problem)
    except Exception:  # the cache may be full, or the memory: then the layer stays unknown
        return ""
    return ""


class _NotFiniteError(Exception):
    """Carries the name of a module."""


@contextmanager
def _ending_where_not_finite(model: torch.nn.Module) -> Iterator[None]:
    """In this context the forward pass ends at the first module whose output is not finite, with an error that names
    it."""

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def check(module: Any, arguments: Any, output: Any) -> None:
            for value in output if isinstance(output, list | tuple) else (output,):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                    raise _NotFiniteError(name)

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
