"""Integration into transformers' model classes: which families are supported, and how our attention is called by them.

A model keeps its own attention. Only while its ``forward`` runs with one of our caches (:class:`AttendingCache`), two
hooks on the model switch its configuration to our attention and mask functions and back (:func:`attach`). So any other
use of the model, with or without a cache, is unaffected.

Models whose attention goes through transformers' attention interface need nothing else. Falcon's class calls
``scaled_dot_product_attention`` itself, so its keys are returned as :class:`BridgedKeys`, a tensor type that intercepts
this one call (``__torch_function__``) and computes the same attention. No model code is copied or patched.

A supported family has causal softmax attention without soft-capping, through the interface or through one
``scaled_dot_product_attention`` call, and stores one key and value per token and KV head.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from d2obench.errors import ModelError, PolicyError
from d2obench.models.base import CONSTANT_ROPE, rotary_limit

IMPLEMENTATION = "d2obench"
"""The name of our attention in transformers' interface."""
INTERFACE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma3_text")
BRIDGED = ("falcon",)
"""Families whose own code calls ``scaled_dot_product_attention``."""
SUPPORTED = (*INTERFACE, *BRIDGED)


class AttendingCache(Cache):
    """A cache that computes the attention over its own contents.

    Args:
        layers: the cache's layers.
        model: the model it was made for; None if its layers are called without a model.
    """

    def __init__(self, layers: list[Any], model: PreTrainedModel | None = None) -> None:
        super().__init__(layers=layers)
        self._module = None if model is None else weakref.ref(model.base_model)
        self._configs = [] if model is None else attention_configs(model)
        self._own_attention = "sdpa" if model is not None and _family(model) in BRIDGED else IMPLEMENTATION
        self._limit = None if model is None else rotary_limit(model.config)
        self.before_forward: list[str] | None = None
        """The attention implementation of each configuration before the current forward pass; None if none is
        running."""

    def note_tokens(self, tokens: Tensor | None) -> None:
        """Told before each forward pass which tokens ``[B, n]`` the model is given; None for embeddings."""

    @property
    def module(self) -> torch.nn.Module | None:
        """The model without its head; None if the cache's layers are called without a model."""
        return None if self._module is None else self._module()

    def begin_forward(self, module: torch.nn.Module) -> None:
        """Switches the model to our attention for one forward pass.

        Raises:
            ModelError: the cache was made for another model.
        """
        made_for = self._module and self._module()
        if made_for is not module:
            raise ModelError(
                "this cache was made for another model",
                why="its layers, heads and attention need not be those of the one that it was given to",
                remedy="make one for this model: d2obench.cache(policy, budget, model=model)",
            )
        self.before_forward = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = self._own_attention

    def end_forward(self) -> None:
        """Switches the model back to its own attention."""
        for config, attention in zip(self._configs, self.before_forward or (), strict=False):
            config._attn_implementation_internal = attention
        self.before_forward = None

    def check_forward(self, tokens: int) -> None:
        """Refuses a forward pass that would give wrong numbers.

        Args:
            tokens: what the model will have seen at its end, padding included.

        Raises:
            ModelError: the cache is used outside of a forward pass of its model, so that attention is not ours; or
                rotary angles would change, so that what is cached no longer fits.
        """
        if self._limit is not None and tokens > self._limit:
            raise ModelError(
                f"this model's rotary angles change beyond {self._limit} tokens, and {tokens} were given",
                why="what is cached was turned by the angles of shorter texts",
                remedy="use a shorter text, or transformers' own cache",
            )
        if self._module is not None and self.before_forward is None:
            raise ModelError(
                "this cache was made for another model",
                why="the model that it was given to has never been prepared for it",
                remedy="make one for this model: d2obench.cache(policy, budget, model=model)",
            )


def attach(model: PreTrainedModel) -> None:
    """Enables a model to use our caches. Its own attention, configuration and weights stay unchanged.

    Raises:
        ModelError: the family is not supported; the message lists those that are.
    """
    family = _family(model)
    if family not in SUPPORTED:
        raise ModelError(
            f"the architecture '{family}' is not supported",
            why="the policy cache has not been checked with its attention",
            remedy=f"use one of {', '.join(SUPPORTED)}",
        )
    if getattr(model.config.get_text_config(), "alibi", False):
        raise ModelError(f"this {family} model adds ALiBi to attention", remedy="use one with rotary positions")
    module = model.base_model
    if _begin not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_begin, with_kwargs=True)
        module.register_forward_hook(_end, with_kwargs=True, always_call=True)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configurations from which a model's modules read the name of their attention."""
    found = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def _begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    caches = [value for value in (*kwargs.values(), *args) if isinstance(value, AttendingCache)]
    for cache in caches:
        cache.begin_forward(module)
        cache.note_tokens(kwargs.get("input_ids", next(iter(args), None)))
    limit = getattr(module.config, "original_max_position_embeddings", None)
    if limit is not None and not caches and _dropped_by_generate():
        raise ModelError(
            f"transformers gives up the cache of this model at {limit} tokens",
            why="from there on it computes the whole text anew, with other rotary angles and without the policy",
            remedy=f"stay below {limit} tokens, prompt and generation together",
        )


def _dropped_by_generate() -> bool:
    """Whether ``generate`` was given a cache of ours and now runs the model without it."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name in ("_prefill", "_sample", "_beam_search"):
            given = frame.f_locals.get("model_kwargs", {})
            return any(isinstance(value, AttendingCache) for value in given.values())
        frame = frame.f_back
    return False


def _end(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    for value in (*kwargs.values(), *args):
        if isinstance(value, AttendingCache):
            value.end_forward()


def _family(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config().model_type)


def keyword(model: PreTrainedModel) -> str:
    """The name of the cache argument of a model's ``forward``, which changed in transformers 5.24."""
    return _keyword(cast(Hashable, type(model)))


@functools.cache
def _keyword(kind: Any) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def layer_kinds(model: PreTrainedModel) -> list[int | None]:
    """For each layer: None if it is compressed, or the window of a sliding-window layer, which is not compressed.

    If *all* layers slide (Mistral 7B v0.1), they are treated as full attention: within the window both are the same,
    and :func:`longest` keeps a session within it.
    """
    config: Any = model.config.get_text_config()
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    if all(kind == "sliding_attention" for kind in kinds):
        return [None] * layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def longest(model: PreTrainedModel) -> int:
    """The largest number of tokens of a session: the model's context; the window if all layers slide; or the length up
    to which the model's rotary angles are constant (:func:`d2obench.models.base.rotary_limit`)."""
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    slides = all(kind == "sliding_attention" for kind in kinds) if kinds else True
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) and slides else None
    context: int = config.max_position_embeddings
    return min(context, window or context, rotary_limit(config) or context)


def rotary(model: PreTrainedModel) -> Tensor | None:
    """Rotation angle per position of each rotary pair of the compressed layers, float32 ``[r/2]``; None if the angles
    depend on the length."""
    module: Any = getattr(model.base_model, "rotary_emb", None)
    kind = getattr(module, "rope_type", None)
    prefix = ""
    if isinstance(kind, dict):
        prefix, kind = "full_attention_", kind.get("full_attention")
    angles: Tensor | None = getattr(module, f"{prefix}inv_freq", None) if kind in CONSTANT_ROPE else None
    return None if angles is None else angles.float()


def decoder_layers(model: Any) -> Any:
    """The decoder layers of a model or of its base model, in order."""
    base = model.base_model
    return base.layers if hasattr(base, "layers") else base.h


def attention_of(layer: torch.nn.Module) -> Any:
    """The attention module of a decoder layer."""
    names = ("self_attn", "self_attention", "attention")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def output_projection(layer: torch.nn.Module) -> Tensor:
    """The weight ``[hidden, Hq·d_v]`` of the projection W_O of a decoder layer's attention; if heads are divided among
    ranks, the columns of this rank's heads."""
    attention = attention_of(layer)
    weight: Any = (attention.o_proj if hasattr(attention, "o_proj") else attention.dense).weight
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local.detach()


def kv_heads(model: PreTrainedModel) -> tuple[int, int]:
    """Number of KV heads in the cache, and of query heads per KV head."""
    config: Any = model.config.get_text_config()
    queries = config.num_attention_heads
    if config.model_type == "falcon":
        # Falcon 40B's new architecture broadcasts its KV heads before it caches them.
        heads = queries if config.new_decoder_architecture or not config.multi_query else 1
    else:
        heads = getattr(config, "num_key_value_heads", None) or queries
    return heads, queries // heads


def policy_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # some callers pass it by position, as to transformers' own SDPA function
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Our attention function for transformers' interface: calls the layer that is attached to ``key``. Without one (a
    sliding-window layer) it calls transformers' own SDPA."""
    layer = getattr(key, "slot_layer", None)
    if layer is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    return layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask), None


def policy_mask(*args: Any, mask_function: Any = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """The padding mask ``[B, L]`` itself for compressed layers; a sliding layer's own 4D mask otherwise."""
    if mask_function is causal_mask_function:
        mask: Tensor | None = kwargs.get("attention_mask")
        return mask
    sliding: Tensor | None = sdpa_mask(*args, mask_function=mask_function, **kwargs)
    return sliding


class BridgedKeys(Tensor):
    """Keys whose ``scaled_dot_product_attention`` calls are answered by their layer's attention."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, keys = args[0], args[1]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            return keys.slot_layer.attend(query, scale, kwargs.get("attn_mask")).transpose(1, 2)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def real_tokens(mask: Tensor, seen: int, new: int) -> Tensor:
    """Number of tokens in a block that are not padding, ``[B]``; padding must be on the left.

    Args:
        mask: a padding mask ``[B, seen + new]``, or a 4D attention mask, whose last row is used.
        seen: number of columns before the block.
        new: number of columns of the block.

    Raises:
        PolicyError: padding on the right or inside, or a mask that does not reach the end of the block.
    """
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask == 0
    if mask.shape[1] < seen + new:
        raise PolicyError(
            f"the attention mask has {mask.shape[1]} columns for {seen + new} tokens",
            why="it must cover what the cache has seen and what is new",
            remedy="give the mask of the whole text, as generate does, or none",
        )
    real = mask[:, seen : seen + new].bool()
    counts = real.sum(1)
    if not bool((real == (torch.arange(new, device=mask.device) >= (new - counts)[:, None])).all()):
        raise PolicyError("the batch is padded on the right or inside", remedy="pad on the left")
    return counts


def generate_reads_prompt() -> bool:
    """Whether transformers' ``generate`` is reading a prompt now, in one block or in several.

    A chunk of one token at the end of a prompt looks like a decode step to a cache: only who called it can tell.
    """
    prefill = inspect.unwrap(getattr(GenerationMixin, "_prefill", generate_reads_prompt)).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not prefill:
        frame = frame.f_back
    return frame is not None


AttentionInterface.register(IMPLEMENTATION, policy_attention)
AttentionMaskInterface.register(IMPLEMENTATION, policy_mask)
