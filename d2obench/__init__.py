"""d2obench: what a KV-cache policy buys on your model and hardware, and what it costs in quality.

``d2obench.cache("d2o", budget=0.2, model=model)`` is a cache for ``model.generate(cache=…)`` (``past_key_values=…``
in transformers before 5.24); see
:func:`d2obench.cache.policy_cache.cache`. It is imported when it is asked for: ``import d2obench`` loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2obench.cache.policy_cache import cache

__all__ = ["__version__", "cache"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "cache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("d2obench.cache.policy_cache").cache
