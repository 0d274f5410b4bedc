"""``shape:NAME``: the published dimensions of a model with random weights made on the device.

For speed and memory if no weights are available. Weights are drawn from N(0, 1/last dimension), so that activations and
attention logits have the scale of a trained model and nothing overflows in float16; norms are 1, biases 0. All of these
models have rotary positions, so the context is extended beyond the published one: random weights have no trained range,
and the paper's own 2048+8192 would not fit Llama-3's 8,192 or Llama-2's 4,096 otherwise.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2obench.errors import ModelError
from d2obench.models.base import Dimensions, LoadedModel, Progress, loaded
from d2obench.models.devices import dispatch_layers
from d2obench.suite.definition import Placement

if TYPE_CHECKING:
    import torch

SEED = 2024
LIFTED = 131_072


def _llama(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, theta: float, **rest: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": LIFTED,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **rest,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 128_256, 5e5),
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32_000, 1e4),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32_000, 1e4),
    # the base model has no sliding window from v0.2 on
    "mistral-7b": _llama(4096, 32, 32, 8, 14336, 32_000, 1e6, model_type="mistral", sliding_window=None),
    "falcon-7b": {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": False,
        "alibi": False,
        "vocab_size": 65_024,
        "max_position_embeddings": LIFTED,
    },
    "qwen2.5-7b": _llama(
        3584, 28, 28, 4, 18944, 152_064, 1e6, model_type="qwen2", rms_norm_eps=1e-6, use_sliding_window=False
    ),
    # small and quick, with GQA, for tests
    "tiny": _llama(64, 4, 4, 2, 128, 256, 1e4, max_position_embeddings=4096),
}
"""Name → transformers configuration."""


class Shape:
    """A source of random weights in a published shape.

    Args:
        name: a key of :data:`SHAPES`.
        changes: of its configuration, for checks that need not all of its layers.
    """

    def __init__(self, name: str, **changes: Any) -> None:
        if name not in SHAPES:
            raise ModelError(f"unknown shape '{name}'", remedy=f"use shape: with one of {', '.join(SHAPES)}")
        self.name, self._settings = name, SHAPES[name] | changes

    def check(self) -> None:
        """Does nothing: no files are needed."""

    def describe(self) -> Dimensions:
        """The dimensions by arithmetic, without transformers, because a run is planned before anything large is
        imported."""
        return _dimensions(self._settings)

    def load(
        self, dtype: torch.dtype, device: torch.device, progress: Progress, placement: Placement | None = None
    ) -> LoadedModel:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        placed = placement or Placement()
        if placed.tensor_parallel > 1:
            raise ModelError(
                f"--tensor-parallel can't split shape:{self.name}",
                why="transformers splits a model while it reads its weights, and this one has none to read",
                remedy="use a folder with safetensors, or --device-map auto",
            )
        on_many = placed.device_map != "none"
        with no_init_weights(), torch.device("cpu" if on_many else device):  # untouched, memory is not yet taken
            model = AutoModelForCausalLM.from_config(
                self._config(), dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
        model.tie_weights()
        if on_many:
            model = dispatch_layers(model, placed.device_map)
        fill(model, SEED)
        identity = json.dumps([self._settings, SEED], sort_keys=True)
        return loaded(
            f"shape:{self.name}",
            model,
            None,
            digest=hashlib.sha256(identity.encode()).hexdigest(),
            has_sense=False,
            note="random weights",
        )

    def pull(self, progress: Progress) -> Path | None:
        """Returns None: there is nothing to fetch."""
        return None

    def _config(self) -> Any:
        from transformers import AutoConfig

        settings = dict(self._settings)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _dimensions(shape: dict[str, Any]) -> Dimensions:
    """The same as :func:`d2obench.models.base.dimensions_of` returns for the same configuration.

    Parameters of a layer: the projections to queries, keys, values and back, with biases for queries, keys and values
    in qwen2; the feed-forward layer, with three matrices if gated, or Falcon's two of four times the width; the norms.
    """
    hidden, layers, heads, vocab = (
        shape[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    )
    head_dim = hidden // heads
    if shape["model_type"] == "falcon":  # one KV head, one norm per layer, and the output layer tied to the embedding
        kv_heads, norms, head = 1, 2 * hidden, 0
        inner = 8 * hidden * hidden
    else:
        kv_heads, norms, head = shape["num_key_value_heads"], 2 * hidden, vocab * hidden
        inner = 3 * hidden * shape["intermediate_size"]
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * head_dim
    biases = hidden + 2 * kv_heads * head_dim if shape["model_type"] == "qwen2" else 0
    last = 2 * hidden if shape["model_type"] == "falcon" else hidden
    parameters = layers * (attention + biases + inner + norms) + vocab * hidden + head + last
    context = shape["max_position_embeddings"]
    return Dimensions(shape["model_type"], layers, heads, kv_heads, head_dim, hidden, vocab, context, parameters)


def fill(model: Any, seed: int) -> None:
    """Draws all weights in place, in their dtype, reproducibly; those on other devices are drawn on the first one."""
    import torch

    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                drawn = weight if weight.device == model.device else torch.empty_like(weight, device=model.device)
                drawn.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
                if drawn is not weight:
                    weight.copy_(drawn)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
