"""Tiny random models of every family the engine runs, from transformers' own configurations."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from d2obench.models import LoadedModel
from d2obench.models.base import loaded
from d2obench.models.kernels import adapt
from d2obench.models.shapes import fill

VOCAB = 128
PAD: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def _sizes(heads: int, kv: int, width: int = 16, layers: int = 2) -> dict[str, Any]:
    return {
        "hidden_size": heads * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": 2 * heads * width,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **PAD,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-mha": {"model_type": "llama", **_sizes(2, 2)},
    "llama-gqa2": {"model_type": "llama", **_sizes(4, 2)},
    "llama-gqa4": {"model_type": "llama", **_sizes(4, 1, 32)},
    "llama-deep": {"model_type": "llama", **_sizes(4, 2, 16, 5)},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None, **_sizes(4, 2)},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, **_sizes(4, 2)},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "use_sliding_window": False, **_sizes(4, 2)},
    "phi3": {"model_type": "phi3", "sliding_window": None, **_sizes(2, 2, 32)},
    "gpt-neox": {"model_type": "gpt_neox", "rotary_pct": 0.25, **_sizes(4, 4)},
    "falcon": {
        "model_type": "falcon", "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False,
        "bias": False, "alibi": False, **_sizes(4, 1),
    },
    "falcon-new": {
        "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "alibi": False,
        **_sizes(4, 2),
    },
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2, **_sizes(4, 2, 16, 4),
    },
}  # fmt: skip


def plain_model(family: str, dtype: str = "float32", attention: str = "sdpa", **settings: Any) -> Any:
    """A random model of the family as transformers makes it; the same weights on every call, another model each time.

    ``settings`` change its configuration.
    """
    settings = CONFIGS[family] | settings
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    fill(model, 7)
    return model.to(getattr(torch, dtype)).eval()


@cache
def tiny_model(family: str, dtype: str = "float32") -> LoadedModel:
    """The same, loaded as d2obench loads models, once."""
    model = plain_model(family, dtype)
    adapt(model)
    return loaded(family, model, None, digest=family, has_sense=False)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]
