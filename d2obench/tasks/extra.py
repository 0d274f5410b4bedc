"""Packages that only some tasks' scores need: the optional extra ``accuracy``."""

from __future__ import annotations

import importlib
from types import ModuleType

from d2obench.errors import UsageError


def accuracy_package(name: str) -> ModuleType:
    """Imports a module of the extra; a missing one is one clear line."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise UsageError(
            f"this task's score needs the package {package}", remedy="install it: pip install 'd2obench[accuracy]'"
        ) from None
