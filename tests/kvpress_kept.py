"""What kvpress keeps of a prompt: a helper for the tests that compare our policies with its presses.

It needs kvpress, and so the transformers that kvpress wants. ``python tests/kvpress_kept.py`` in such an environment,
with this package on the path, writes tests/golden/kvpress.json anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_families import plain_model, prompts

GOLDEN = Path(__file__).parent / "golden" / "kvpress.json"
FAMILY, LENGTH, KEEP = "llama-deep", 420, 126
PRESSES: dict[str, Callable[[Any], Any]] = {
    "keydiff": lambda kvpress: kvpress.KeyDiffPress(),
    "knorm": lambda kvpress: kvpress.KnormPress(),
    "lagkv(lag=50)": lambda kvpress: kvpress.LagKVPress(lag_size=50),
    "lagkv(lag=30,sinks=2)": lambda kvpress: kvpress.LagKVPress(lag_size=30, n_sink=2),
    "expected": lambda kvpress: kvpress.ExpectedAttentionPress(),
    "expected(epsilon=0.02,future=100)": lambda kvpress: kvpress.ExpectedAttentionPress(
        epsilon=0.02, n_future_positions=100
    ),
    "expected(covariance=false,value_norms=false)": lambda kvpress: kvpress.ExpectedAttentionPress(
        use_covariance=False, use_vnorm=False
    ),
    "criticalkv(window=64)": lambda kvpress: kvpress.CriticalKVPress(kvpress.SnapKVPress()),
    "criticalkv(score=expected(value_norms=false))": lambda kvpress: kvpress.CriticalKVPress(
        kvpress.ExpectedAttentionPress(use_vnorm=False)
    ),
    "adakv(score=snapkv(window=64),form=forced)": lambda kvpress: kvpress.AdaKVPress(kvpress.SnapKVPress()),
    "adakv(score=expected(epsilon=0.02),form=forced,safeguard=0.5)": lambda kvpress: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(epsilon=0.02), alpha_safeguard=0.5
    ),
    "kvzip(sinks=0)": lambda kvpress: kvpress.KVzipPress(n_sink=0),
    "kvzip(sinks=0,chunk=200)": lambda kvpress: kvpress.KVzipPress(n_sink=0, chunk_size=200),
    "kvzip(sinks=0,plus=true)": lambda kvpress: kvpress.KVzipPress(n_sink=0, kvzip_plus_normalization=True),
}
"""Our policies, and the presses that should keep the same entries."""
Kept = list[list[list[int]]]
"""Positions of the kept entries, ascending, of each layer and KV head."""


class NoWords:
    """In place of a tokenizer: asks for a repetition without words."""

    chat_template = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoWords:
        return cls()

    def encode(self, text: str, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(1, 0, dtype=torch.long)


def kept(press: Callable[[Any], Any], model: Any, text: list[int], keep: int) -> Kept:
    """What a press, made from the module kvpress, keeps of a text."""
    import kvpress
    import kvpress.presses.kvzip_press as kvzip
    from transformers import DynamicCache

    kvzip.AutoTokenizer = NoWords
    made = press(kvpress)
    # kvpress rounds down the number of entries that a head keeps, or that all heads together evict
    together = model.config.num_hidden_layers * model.config.num_key_value_heads
    off = -0.5 / together if isinstance(made, kvpress.KVzipPress) else 0.5
    made.compression_ratio = 1 - (keep + off) / len(text)
    ids = torch.tensor([text])
    full, cut = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model.model(ids, past_key_values=full, use_cache=True)
        with made(model):
            model.model(input_ids=ids, past_key_values=cut, use_cache=True)
    return [
        [_which(layer, cut.layers[at].keys[0, head], full.layers[at].keys[0, head], head) for head in range(heads)]
        for at, layer in enumerate(model.model.layers)
        for heads in [full.layers[at].keys.shape[1]]
    ]


def _which(layer: Any, held: torch.Tensor, every: torch.Tensor, head: int) -> list[int]:
    """Positions of the keys ``[n, d]`` that are held of ``every`` key, without those that are masked."""
    masked = getattr(layer.self_attn, "masked_key_indices", None)
    found = (held[:, None] == every[None]).all(-1).int().argmax(1).sort().values.tolist()
    gone = set() if masked is None else {int(j) for h, j in zip(masked[1], masked[2], strict=True) if int(h) == head}
    return [j for j in found if j not in gone]


def main() -> None:
    model, (text,) = plain_model(FAMILY), prompts(LENGTH)
    found = {policy: kept(press, model, text, KEEP) for policy, press in PRESSES.items()}
    GOLDEN.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
