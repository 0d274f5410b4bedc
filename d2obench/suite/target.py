"""What a suite promises of its figures: a metric of the table, the cells it is asked of, and a bound.

    [[targets]]
    metric = "to_streaming"      # any key of d2obench list metrics
    policy = "h2o"               # and, where it matters: budget, shape, batch, model, task
    shape = "2048+64"
    at_least = 0.97              # and / or at_most, in the metric's recorded unit

Whether a figure keeps its bounds is decided by ``d2obench.stats.claims.outcome``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from d2obench.metric import METRICS, show
from d2obench.suite.grammar import parse_budget, parse_shape, parse_spec


class Where(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """Cells by their axes; an axis that is not named may be anything."""

    task: str | None = None
    model: str | None = None
    policy: str | None = None
    budget: float | int | None = None
    shape: str | None = None
    batch: int | str | None = None

    @property
    def axes(self) -> dict[str, str]:
        """The axes that are named, spelt as cells spell them.

        Raises:
            UsageError: a word that can't be read.
        """
        spell: dict[str, Any] = {
            "task": lambda text: str(parse_spec(text, "task")),
            "policy": lambda text: str(parse_spec(text)),
            "budget": lambda value: str(parse_budget(value)),
            "shape": lambda text: str(parse_shape(text)[0]),
        }
        named = {key: getattr(self, key) for key in Where.__struct_fields__}
        return {key: spell.get(key, str)(value) for key, value in named.items() if value is not None}

    def covers(self, axes: object) -> bool:
        """Whether ``axes`` (an ``Axes``, or anything with the same names) is one of these cells."""
        return all(str(getattr(axes, key)) == value for key, value in self.axes.items())


class Target(Where, frozen=True, kw_only=True):
    """One promise; see the module's head."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        """``≥ 0.97 ×``, ``≤ 1.08 ×``, or ``0.97 … 1.03 ×``, as the metric is shown."""
        low, high = (None if end is None else show(self.metric, end) for end in (self.at_least, self.at_most))
        words = f"{low} … {high}" if low and high else f"≥ {low}" if low else f"≤ {high}"
        return f"{words} {METRICS[self.metric].unit}".rstrip()

    def margin(self, value: float) -> float:
        """How far a figure is inside the nearest bound, as a share of it; negative outside."""
        shares = []
        if self.at_least is not None:
            shares.append(value / self.at_least - 1 if self.at_least else value)
        if self.at_most is not None:
            shares.append(1 - value / self.at_most if self.at_most else -value)
        return min(shares)

    def fault(self) -> str:
        """What is wrong with the target itself, in words; empty where nothing is."""
        if self.metric not in METRICS:
            return f"no metric is called '{self.metric}'"
        if self.at_least is None and self.at_most is None:
            return f"'{self.metric}' has no bound: give at_least or at_most"
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            return f"'{self.metric}' has at_least above at_most"
        return ""
