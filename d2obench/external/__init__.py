"""Caches and engines that are not ours: transformers' own caches, kvpress and llama.cpp.

``open_session`` makes the session of a policy, ours or another's. ``tasks``, ``run``, ``cli`` and ``bridges`` import
this package for it; it imports ``cache`` and what stands below. A library is imported when its session is opened, and
importing this package loads nothing of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from d2obench.policies import PolicyChoice, parse_choice
from d2obench.policies.yardsticks import Yardstick

if TYPE_CHECKING:
    from d2obench.cache import Session
    from d2obench.models import LoadedModel
    from d2obench.policies.base import Policy
    from d2obench.suite.grammar import Budget

__all__ = ["check_installed", "loader_of", "open_session", "record_of"]


def open_session(
    loaded: LoadedModel, policy: Policy | Yardstick | str, budget: Budget | str | None, **options: Any
) -> Session:
    """Opens the session that runs ``policy``, on our cache or on that of another library or engine.

    Args:
        loaded: the model.
        policy: as text (``d2o(merge=values)``, ``hf-static``, ``kvpress:SnapKVPress``) or as an object.
        budget: as text (``0.2``, ``512``) or as an object; None for a policy without a budget.
        options: ``max_new``, ``seed``, ``mark`` and ``beyond``, see :class:`d2obench.cache.Session`.

    Raises:
        PolicyError: an unknown policy, or one that needs a budget and has none.
        UsageError: the library it needs is not installed.
    """
    from d2obench.cache import Session

    asked = parse_choice(policy).built if isinstance(policy, str) else policy
    if isinstance(asked, Yardstick):
        session: Session = asked.opens()(loaded, asked, budget, **options)
        return session
    return Session(loaded, asked, budget, **options)


def check_installed(policies: Sequence[str]) -> dict[str, str | None]:
    """Imports the libraries that ``policies`` need and checks their parameters, before anything runs.

    Returns:
        The version of each distribution they need; None if a version can't be determined.

    Raises:
        D2OBenchError: the first problem found.
    """
    versions: dict[str, str | None] = {}
    for text in policies:
        asked = parse_choice(text).yardstick
        if asked is not None:
            asked.opens().ready(asked)
            versions |= _versions(asked)
    return versions


def record_of(choice: PolicyChoice, loaded: LoadedModel) -> dict[str, Any]:
    """What the record of a cell must contain beside the model: ``versions`` and ``flags`` of another library,
    ``calibration`` of a policy of ours that uses statistics of the model; empty for most policies."""
    asked = choice.yardstick
    if asked is None:
        from d2obench.cache import calibration

        return calibration.record_of(choice.policy, loaded)
    if not asked.packages:
        return {}
    versions = _versions(asked)
    return {"versions": versions, "flags": asked.flags(versions)}


def loader_of(choice: PolicyChoice) -> Callable[..., LoadedModel]:
    """The function that loads the model for a policy's cells: ``d2obench.models.load``, or another engine's with the
    same signature."""
    from d2obench.models import load

    asked = choice.yardstick
    if asked is None or not asked.loads:
        return load
    module, _, name = asked.loads.partition(":")
    found: Callable[..., LoadedModel] = getattr(import_module(module), name)
    return found


def _versions(asked: Yardstick) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in asked.packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
