"""The engine: one cache, one attention and one decode loop for every policy.

Its names are imported when they are asked for: policies use single modules of this package, and reading a policy's
name must not load transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2obench.engine.cache import PolicyCache
    from d2obench.engine.session import Footprint, Session

__all__ = ["Footprint", "PolicyCache", "Session"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = "cache" if name == "PolicyCache" else "session"
    return getattr(import_module(f"{__name__}.{module}"), name)
