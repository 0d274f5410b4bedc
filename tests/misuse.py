"""Caches used as they must not be, at random; run by ``test_decode_limits.py`` under glibc's heap checks.

Every misuse ends in an error of this package or of PyTorch, or in right numbers; never in a damaged heap. Prints how
many ended which way.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from copy import deepcopy
from typing import Any

import torch
from tiny_families import prompts, tiny_model

import d2obench
from d2obench.attention.interface import keyword

POLICIES = ["full", "h2o", "d2o", "streaming", "snapkv(window=4)", "tova", "roco", "cam", "random", "quant"]


def cache_of(policy: str, model: Any, new: int) -> Any:
    budget = None if policy in ("full", "quant") else 0.4
    return d2obench.cache(policy, budget, model=model, max_new=new)


def feed(model: Any, cache: Any, tokens: list[list[int]]) -> None:
    with torch.inference_mode():
        model(torch.tensor(tokens), **{keyword(model): cache})


def misuse(draw: random.Random) -> None:
    """One prompt, a few steps, and then something that was never meant."""
    model = deepcopy(tiny_model("llama-gqa2").model)
    cache, rows = cache_of(draw.choice(POLICIES), model, 4), draw.randint(1, 3)
    feed(model, cache, prompts(*[20] * rows, seed=draw.randint(0, 9)))
    for _ in range(draw.randint(0, 3)):
        feed(model, cache, [[3]] * rows)
    kind = draw.choice(["batch", "dtype", "foreign", "reused", "beyond", "turn", "reset"])
    if kind == "dtype":
        model = model.to(draw.choice([torch.bfloat16, torch.float64, torch.float16]))
    elif kind == "foreign":
        model = tiny_model(draw.choice(["llama-mha", "llama-gqa4", "llama-deep"])).model
    elif kind == "reset":
        cache.reset()
    rows += draw.choice([-1, 1, 3]) if kind in ("batch", "reused") else 0
    rows = max(1, rows)
    length = {"reused": 20, "turn": 5, "reset": 9}.get(kind, 1)
    for _ in range(12 if kind == "beyond" else 2):
        feed(model, cache, [[5] * length] * rows)


ended: Counter[str] = Counter()
draw = random.Random(int(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    try:
        misuse(draw)
        ended["ran"] += 1
    except Exception as problem:
        ended[type(problem).__name__] += 1
print("done", dict(ended))
