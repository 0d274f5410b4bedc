"""Registries of classes by name: the built-in ones, and those that other packages provide through entry points.

A registry holds import paths, so that its names can be listed without importing anything; ``get`` imports one class.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from d2obench.errors import D2OBenchError


class Offer(NamedTuple):
    """An entry point of another package: its name and origin, and why it can't be used (empty if it can)."""

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    problem: str


class Registry:
    """Classes of one kind by name.

    Args:
        kind: the word used in messages, for example ``policy``.
        group: the entry-point group other packages use, for example ``d2obench.policies``.
        builtin: name → ``module:attribute``.
        error: the error class raised for an unknown name.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str], error: type[D2OBenchError]) -> None:
        self.kind, self.group, self.builtin, self._error = kind, group, dict(builtin), error

    def names(self) -> list[str]:
        """Built-in names in the order of definition, then plugins in alphabetical order."""
        return [*self.builtin, *sorted(self.plugins())]

    def plugins(self) -> dict[str, str]:
        """Names of other packages' classes → ``distribution: module:attribute``; built-in names can't be overridden."""
        found = {}
        for point in entry_points(group=self.group):
            if point.name not in self.builtin:
                found[point.name] = f"{point.dist.name if point.dist else '?'}: {point.value}"
        return found

    def offers(self) -> list[Offer]:
        """Every entry point of this group; each is imported to find out whether it can be used."""
        found = []
        for point in entry_points(group=self.group):
            source = (point.dist.name, point.dist.version) if point.dist else ("?", "")
            problem = f"'{point.name}' is built in and stays so" if point.name in self.builtin else _fault(point)
            found.append(Offer(self.kind, point.name, *source, point.value, problem))
        return sorted(found)

    def get(self, name: str) -> Any:
        """The class with that name.

        Raises:
            D2OBenchError: of the registry's own class, for an unknown name or a plugin that can't be imported.
        """
        if name in self.builtin:
            module, _, attribute = self.builtin[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for point in entry_points(group=self.group):
            if point.name == name:
                try:
                    return point.load()
                except (Exception, SystemExit) as problem:
                    raise self._error(
                        f"the {self.kind} plugin '{name}' can't be imported",
                        why=f"{type(problem).__name__}: {problem}",
                        remedy="reinstall or remove its package",
                    ) from problem
        raise self._unknown(name)

    def check(self, name: str) -> None:
        """Raises the registry's error if a name is unknown; imports nothing."""
        if name not in self.builtin and name not in self.plugins():
            raise self._unknown(name)

    def _unknown(self, name: str) -> D2OBenchError:
        near = difflib.get_close_matches(name, self.names(), 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return self._error(
            f"unknown {self.kind} '{name}'", remedy=f"{hint}the known ones are {', '.join(self.names())}"
        )


def _fault(point: EntryPoint) -> str:
    """Why an entry point can't be imported, in one line; empty if it can."""
    try:
        point.load()
    except (Exception, SystemExit) as problem:
        return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
    return ""
