"""Tails of a teacher-forced comparison: what a mean over positions hides.

A cache that lost one fact predicts most tokens as before and a few ones quite wrongly, so the largest values of KL say
more about it than the mean. Quantiles are those of all positions of all documents; their bounds are the smallest and
the largest quantile of a single document. A quantile is left out where no position lies above it.

``dp`` is the probability of the text's own token less that under the full cache. The root of its mean square, and the
agreement of the most likely tokens, are the figures that llama.cpp's ``perplexity`` tool prints for quantised models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from d2obench.record import Value
from d2obench.tasks.base import Item

QUANTILES = {"kl_p99": 0.99, "kl_p999": 0.999}
BINS = 16
"""Number of points of a drift: KL is averaged over as many parts of the generation."""


def tails(items: Sequence[Item]) -> dict[str, Value]:
    """Quantiles and maximum of the ``kl`` of every position, and the root mean square of ``dp``.

    Args:
        items: one for each document, with a list of numbers under each of the two names; a name may be missing.
    """
    from d2obench.stats.intervals import highest, mean

    found: dict[str, Value] = {}
    documents = [item["kl"] for item in items if item.get("kl")]
    every = [kl for document in documents for kl in document]
    for key, q in QUANTILES.items():
        if len(every) * (1 - q) >= 1 - 1e-9:
            found[key] = _quantile(documents, q)
    if every:
        found["kl_max"] = highest([max(document) for document in documents])
    squares = [(dp * dp, item["document"]) for item in items for dp in item.get("dp") or ()]
    if squares:
        found["dp_rms"] = _root(mean([square for square, _ in squares], [document for _, document in squares]))
    return found


def drift(items: Sequence[Item]) -> list[dict[str, float]]:
    """KL against the position in the generation: for each of at most :data:`BINS` parts of it the last ``position``,
    counted from 1, the mean ``kl`` over documents, and the largest, ``kl_max``."""
    import numpy as np

    rows = np.array([item["kl"] for item in items], dtype=np.float64)
    parts = np.array_split(np.arange(rows.shape[1]), min(BINS, rows.shape[1]))
    return [
        {"position": int(part[-1]) + 1, "kl": float(rows[:, part].mean()), "kl_max": float(rows[:, part].max())}
        for part in parts
    ]


def _quantile(documents: Sequence[Sequence[float]], q: float) -> Value:
    import numpy as np

    value = float(np.quantile(np.concatenate([np.asarray(document) for document in documents]), q))
    single = [float(np.quantile(document, q)) for document in documents]
    lo, hi = min(value, *single), max(value, *single)
    if len(documents) < 2:
        return Value(value)
    return Value(value, lo, hi, len(documents), kind="exact" if lo == hi else "range")


def _root(square: Value) -> Value:
    ends = [None if end is None else math.sqrt(max(0.0, end)) for end in (square.value, square.lo, square.hi)]
    return msgspec.structs.replace(square, value=ends[0], lo=ends[1], hi=ends[2])
