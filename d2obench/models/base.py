"""The result of a model source, :class:`LoadedModel`, and the protocol for writing one, :class:`Source`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from d2obench.models.devices import local

if TYPE_CHECKING:
    import torch

CONSTANT_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Types of rotary positions whose angles do not depend on the length; those of dynamic NTK and longrope do."""
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``, in bytes or steps of the work named ``what``."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model, known without its weights.

    Args:
        architecture: ``model_type`` of transformers, for example ``llama``.
        layers, heads, kv_heads, head_dim, hidden, vocab: as in its configuration.
        context: largest number of tokens that its positions support.
        parameters: number of weights; tied ones count once.
        bound: why no token can have a position beyond the context, even if only time is measured; empty if one can.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    parameters: int
    bound: str = ""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Args:
        name: as it was asked for.
        model: the transformers ``PreTrainedModel``, in eval mode.
        tokenizer: its tokenizer; None where there is none (``shape:`` models).
        dtype: of the weights.
        device: all weights are there; where they lie on several, its tokens and logits are there.
        context: tokens its positions may reach.
        has_sense: False for random weights: no task that scores text can use it.
        digest: what identifies the weights (see the source).
        weights_bytes: storage of parameters and buffers; tied ones count once, and a rank counts its own share.
        layers: count of decoder layers.
        kv_heads: KV heads a layer.
        head_dim: elements of a key.
        note: what a report must say about the weights; may be empty.
        kernels: whose kernels compute its linear layers, norms and rotary positions: ``d2obench``, where ours serve, or
            ``library``.
    """

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    context: int
    has_sense: bool
    digest: str
    weights_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    note: str = ""
    kernels: str = "d2obench"


class Source(Protocol):
    """A place models come from. Built as ``Source(rest)`` with the name's part after ``source:``."""

    def check(self) -> None:
        """Raises a ModelError if ``load`` could not work; quick, and loads nothing."""

    def describe(self) -> Dimensions:
        """The model's dimensions, read without its weights."""

    def load(self, dtype: torch.dtype, device: torch.device, progress: Progress) -> LoadedModel:
        """The model itself."""

    def pull(self, progress: Progress) -> Path | None:
        """Fetches everything ``load`` needs, verifies it, and returns its location."""


def dimensions_of(config: Any, *, parameters: int | None = None, context: int | None = None) -> Dimensions:
    """Dimensions from a transformers configuration; parameters are counted on the meta device unless given."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Dimensions(
        architecture=config.model_type,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=_kv_heads(text),
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        context=min(context or int(text.max_position_embeddings), rotary_limit(config) or sys.maxsize),
        parameters=_count(config) if parameters is None else parameters,
        bound=bound_of(config),
    )


def bound_of(config: Any) -> str:
    """Why a model can't run beyond its context at all; empty for rotary positions, which can simply be continued.

    Beyond its context such a model costs the same as within it, but its output is meaningless.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if not rope or getattr(text, "alibi", False):
        return "its positions are not rotary: there are none beyond it"
    parts = rope.values() if "rope_type" not in rope else [rope]
    kinds = {part.get("rope_type", "default") for part in parts if isinstance(part, dict)}
    if odd := sorted(kinds - set(CONSTANT_ROPE)):
        return f"its rotary positions ({', '.join(odd)}) change with the length"
    layers = getattr(text, "layer_types", None)
    slides = all(kind == "sliding_attention" for kind in layers) if layers else True
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) and slides else None
    return f"all its layers see a window of {window:,} tokens" if window else ""


def rotary_limit(config: Any) -> int | None:
    """Number of tokens up to which a model's rotary angles are constant; None if they never depend on the length.

    Beyond it, longrope uses other angles for all positions, and dynamic NTK changes them with every token, so that keys
    cached before no longer match.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    limits = []
    for part in rope.values() if "rope_type" not in rope else [rope]:
        if isinstance(part, dict) and part.get("rope_type", "default") not in CONSTANT_ROPE:
            own = part.get("original_max_position_embeddings")
            own = own or getattr(text, "original_max_position_embeddings", None)
            limits.append(int(own or text.max_position_embeddings))
    return min(limits, default=None)


def waiting_rope(config: Any) -> str:
    """The kind of a model's rotary positions if transformers reads the length of the text on the host in every forward
    pass, which waits for a GPU; empty if it doesn't.

    Dynamic NTK does; longrope did before transformers 5.24.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = rope.values() if "rope_type" not in rope else [rope]
    waiting = {"dynamic"} if _version("transformers") >= (5, 24) else {"dynamic", "longrope"}
    kinds = (part.get("rope_type", "default") for part in parts if isinstance(part, dict))
    return next((kind for kind in kinds if kind in waiting), "")


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2] if part.isdecimal())


def loaded(
    name: str, model: Any, tokenizer: Any, *, digest: str, context: int | None = None, **rest: Any
) -> LoadedModel:
    """Freezes ``model`` and describes it; ``rest`` are fields of :class:`LoadedModel`."""
    model.eval().requires_grad_(False)
    dimensions = dimensions_of(model.config, parameters=0, context=context)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        dtype=model.dtype,
        device=model.device,
        context=dimensions.context,
        digest=digest,
        weights_bytes=_storage(model),
        layers=dimensions.layers,
        kv_heads=dimensions.kv_heads,
        head_dim=dimensions.head_dim,
        **rest,
    )


def _kv_heads(text: Any) -> int:
    """Number of KV heads; Falcon's configuration uses other names."""
    if text.model_type == "falcon" and not text.new_decoder_architecture:
        return 1 if text.multi_query else int(text.num_attention_heads)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    return int(heads or text.num_attention_heads)


def _count(config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _storage(model: Any) -> int:
    stores = (local(tensor).untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())
