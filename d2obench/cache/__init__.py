"""The policy cache: keys and values of a prompt, their compression, and the decoding that follows.

``PolicyCache`` is the class that transformers uses; ``Session`` runs one batch through prefill, compression and
decoding; ``policy_cache.cache`` makes a cache for ``model.generate``. Imported by ``external`` and above; imports
``decode``, ``attention`` and ``policies``. The names below are imported on first use, because transformers loads
slowly.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2obench.cache.policy_cache import PolicyCache
    from d2obench.cache.session import Footprint, Session

__all__ = ["Footprint", "PolicyCache", "Session"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'policy_cache' if name == 'PolicyCache' else 'session'}"), name)


class _CallableModule(ModuleType):
    """This package, which is also the public function ``d2obench.cache(…)``.

    Both names are wanted, and Python has only one attribute ``cache`` of ``d2obench`` for them: importing a package
    sets it on its parent. A module may be given a class of its own (Python's data model, "Customizing module attribute
    access"), so the package itself is what is called, whatever was imported first.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> PolicyCache:
        """See :func:`d2obench.cache.policy_cache.cache`."""
        from d2obench.cache.policy_cache import cache

        return cache(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
