"""The prompts of timed cells."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2obench.models import LoadedModel


def prompts(loaded: LoadedModel, prompt: int, batch: int, seed: int) -> list[list[int]]:
    """Readable text where the model has a tokenizer, seeded random tokens where it has none; no two alike."""
    if loaded.tokenizer is None:
        vocab = loaded.model.config.get_text_config().vocab_size
        return [random.Random(f"{seed}/{i}").choices(range(vocab), k=prompt) for i in range(batch)]
    from d2obench.tasks.text import token_ids

    start = loaded.tokenizer("")["input_ids"][:1]  # the token a text begins with, where the model has one

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return [[*start, *token_ids(1000 * seed + i, prompt, encode, theme="speed")][:prompt] for i in range(batch)]
