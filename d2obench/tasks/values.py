"""Items → figures with intervals. The one place where a task's scores are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from d2obench.metric import METRICS
from d2obench.record import Value
from d2obench.tasks.base import Item

if TYPE_CHECKING:
    from d2obench.cache import Session


def values_of(items: Sequence[Item]) -> dict[str, Value]:
    """Every metric the items hold, as a mean with its 95 % interval, resampled by ``document``.

    An item that lacks a metric, or holds None, is left out of that metric only; ``n`` counts what went in. Perplexity
    is made from ``nll``, ``budget_effective`` from ``kept``, the share of its prompt an item's cache kept. One
    document alone carries no interval; items that all failed, or all succeeded, have the exact binomial one.
    """
    found = {}
    for key, metric in METRICS.items():
        if metric.group != "quality" or metric.kind == "info" or key == "ppl":
            continue
        pairs = [(value, item["document"]) for item in items for value in _flat(item.get(key))]
        if not pairs:
            continue
        values, documents = [value for value, _ in pairs], [document for _, document in pairs]
        if metric.unit == "%" and len(set(documents)) == len(values) > 1 and {*values} in ({0.0}, {1.0}):
            found[key] = _unanimous(values)
        else:
            found[key] = mean(values, documents)
        if key == "nll":
            found["ppl"] = _exp(found[key])
    shares = [item["kept"] for item in items if item.get("kept") is not None]
    if shares:
        found["budget_effective"] = Value(sum(shares) / len(shares))
    return {key: found[key] for key in METRICS if key in found}


def kept_shares(session: Session) -> list[float]:
    """Of each sequence, entries kept right after compression ÷ prompt tokens, mean over layers."""
    found = session.footprint()
    return [
        sum(layer[i] for layer in found.kept) / (len(found.kept) * tokens)
        for i, tokens in enumerate(found.prompt_tokens)
    ]


def mean(values: Sequence[float], clusters: Sequence[str]) -> Value:
    """Mean and interval as a recorded value."""
    from d2obench.stats.bootstrap import mean_interval

    middle, lo, hi = mean_interval(values, clusters)
    return Value(middle, lo, hi, len(values))


def _unanimous(values: Sequence[float]) -> Value:
    from d2obench.stats.bootstrap import unanimous_interval

    return Value(*unanimous_interval(values[0], len(values)), len(values))


def _exp(value: Value) -> Value:
    def exp(x: float | None) -> float | None:
        return None if x is None else math.exp(x) if x < 700 else math.inf

    return Value(exp(value.value), exp(value.lo), exp(value.hi), value.n)


def _flat(value: Any) -> list[float]:
    if value is None:
        return []
    return [float(x) for x in value if x is not None] if isinstance(value, list | tuple) else [float(value)]
