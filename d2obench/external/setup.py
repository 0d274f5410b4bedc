"""What stands in for a policy, seen from the process that runs it: whether it can, and what its record must say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from d2obench.models.base import LoadedModel
from d2obench.policies import other
from d2obench.policies.others import Other


def prepare(policies: Sequence[str]) -> dict[str, str | None]:
    """Imports what ``policies`` need and reads their parameters, before anything runs; the versions found.

    Raises:
        D2OBenchError: one line for the first thing that is wrong.
    """
    found: dict[str, str | None] = {}
    for text in policies:
        asked = other(text)
        if asked is not None and asked.session:
            asked.opens().ready(asked)
            found |= _versions(asked)
    return found


def marks(policy: str) -> dict[str, Any]:
    """``versions`` and ``flags`` of a cell's record; empty for a policy of ours."""
    asked = other(policy)
    if asked is None or not asked.packages:
        return {}
    versions = _versions(asked)
    return {"versions": versions, "flags": asked.flags(versions)}


def loader(policy: str) -> Callable[..., LoadedModel]:
    """What loads the model of a policy's cells: ``d2obench.models.load``, or another engine's own, called alike."""
    from d2obench.models import load

    asked = other(policy)
    if asked is None or not asked.loads:
        return load
    module, _, name = asked.loads.partition(":")
    found: Callable[..., LoadedModel] = getattr(import_module(module), name)
    return found


def _versions(asked: Other) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in asked.packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
