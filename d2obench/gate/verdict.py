"""The result of a comparison: one :class:`Row` for each cell and metric, gathered in :class:`Verdicts`.

A gate may say that it does not know (INCONCLUSIVE), or that two things can't be compared and why (INCOMPARABLE). It
never passes because it compared nothing. The rules that decide a row are in :mod:`d2obench.gate.rules`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping

import msgspec

from d2obench.errors import UsageError
from d2obench.metric import METRICS, show

Figure = float | str | tuple[float, ...] | None
KINDS = ("exact", "bounded", "timed", "ratio", "sampled")
"""The statistical kinds that are judged."""
BUDGET = "budget"
"""The kind of rows that compare the head's own figure with a bound of the suite."""


class Verdict(enum.Enum):
    """The verdicts, worst first. NOT_JUDGED is a figure that is shown beside another without being compared with it."""

    REGRESSED = "REGRESSED"
    INCOMPARABLE = "INCOMPARABLE"
    INCONCLUSIVE = "INCONCLUSIVE"
    IMPROVED = "IMPROVED"
    OK = "OK"
    NOT_JUDGED = "not judged"

    @property
    def severity(self) -> int:
        """0 is worst."""
        return list(Verdict).index(self)


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One judged figure.

    Args:
        cell: the cell's id, or ``*`` if the row concerns the whole comparison.
        metric: a key of the metric table or of FACTS.
        verdict: of the figure.
        kind: the statistical kind whose rule was applied.
        base, head: the two figures in base units.
        effect: head ÷ base − 1, or head − base for ``sampled``; None if there is no number.
        lo, hi: bounds of ``effect``.
        limit: how far ``effect`` may go in the worse direction.
        n: number of pairs of rounds, or of items.
        reason: of the verdict, in words.
    """

    cell: str
    metric: str
    verdict: Verdict
    kind: str
    base: Figure = None
    head: Figure = None
    effect: float | None = None
    lo: float | None = None
    hi: float | None = None
    limit: float = 0.0
    n: int = 0
    reason: str = ""

    @property
    def header(self) -> str:
        """The metric's name as tables show it."""
        name = METRICS[self.metric].header if self.metric in METRICS else FACTS.get(self.metric, self.metric)
        return f"{name}, budget" if self.kind == BUDGET else name

    def shown(self, figure: Figure) -> str:
        """A figure with its unit; digests and tokens by layer are shortened."""
        if isinstance(figure, int | float) and self.metric in METRICS:
            return show(self.metric, figure, unit=True)
        if isinstance(figure, tuple):
            return f"{sum(figure):g} in {len(figure)} layers"
        return "–" if figure is None else str(figure)[:16]

    @property
    def change(self) -> str:
        """The effect with its interval in percent, or in the metric's unit for ``sampled``; empty if there is none."""
        if self.effect is None:
            return ""
        if self.kind == "sampled" and self.metric in METRICS:
            metric = METRICS[self.metric]
            scale, digits, unit = metric.scale, metric.digits + 1, f" {metric.unit}".rstrip()
        else:
            scale, digits, unit = 100.0, 1, " %"
        text = f"{self.effect * scale:+.{digits}f}{unit}"
        if self.lo is None or self.hi is None:
            return text
        return f"{text} [{self.lo * scale:+.{digits}f}, {self.hi * scale:+.{digits}f}]"


FACTS = {
    "kept_layers": "kept tokens a layer",
    "tokens_digest": "greedy tokens",
    "status": "status",
    "suite": "suite",
    "environment": "environment",
}
"""Header of each figure that is judged like a metric but is not a single number."""


class Verdicts(msgspec.Struct, frozen=True):
    """A whole comparison: what was compared with what, every row, notes for the reader, and commands to type next.

    :func:`gather` makes it, with the worst rows first.
    """

    title: str
    base: str
    head: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    about: dict[str, str] = {}
    """Facts by which a history keeps figures apart: suite, settings, commit, machine and versions."""

    def of(self, *verdicts: Verdict) -> list[Row]:
        """The rows with one of these verdicts, in order."""
        return [row for row in self.rows if row.verdict in verdicts]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Number of rows of each verdict that occurs, worst first."""
        found = {verdict: len(self.of(verdict)) for verdict in Verdict}
        return {verdict: count for verdict, count in found.items() if count}

    @property
    def worst(self) -> Verdict:
        """The worst verdict, which is that of the whole comparison."""
        return next(iter(self.counts))

    @property
    def summary(self) -> str:
        """``REGRESSED: 2 REGRESSED, 14 OK``."""
        return f"{self.worst.value}: {', '.join(f'{count} {verdict.value}' for verdict, count in self.counts.items())}"

    def exit_code(self, *, strict: bool = False, exit_zero: bool = False) -> int:
        """1 if something regressed; otherwise 2 if something could not be compared; otherwise, with ``strict``, 3 if
        something is inconclusive; otherwise 0. With ``exit_zero`` it is always 0."""
        if exit_zero:
            return 0
        if self.of(Verdict.REGRESSED):
            return 1
        if self.of(Verdict.INCOMPARABLE):
            return 2
        return 3 if strict and self.of(Verdict.INCONCLUSIVE) else 0


def of_kinds(rows: Iterable[Row], kinds: Collection[str]) -> list[Row]:
    """The rows of these kinds, those of budgets, and those that say how a cell ended or why nothing is compared."""
    return [row for row in rows if row.kind in (*kinds, BUDGET) or row.cell == "*" or row.metric == "status"]


def short_names(rows: Iterable[Row]) -> dict[str, str]:
    """A short name for each cell id: without the words between slashes that all ids have in common; never empty."""
    split = {row.cell: row.cell.split("/") for row in rows if row.cell != "*"}
    common = set.intersection(*map(set, split.values())) if len(split) > 1 else set()
    short = {cell: "/".join(word for word in words if word not in common) for cell, words in split.items()}
    return {"*": "*", **{cell: name or cell for cell, name in short.items()}}


def gather(
    title: str,
    base: str,
    head: str,
    rows: Iterable[Row],
    notes: Iterable[str] = (),
    commands: Iterable[str] = (),
    about: Mapping[str, str] | None = None,
) -> Verdicts:
    """Makes a comparison of its rows: sorted by verdict, worst first, then by effect relative to limit, then by name.

    Raises:
        UsageError: there is no row, because a gate that compared nothing must not pass.
    """
    ordered = sorted(rows, key=lambda row: (row.verdict.severity, -_excess(row), row.cell, row.metric))
    if not ordered:
        raise UsageError(
            f"nothing was compared between {base} and {head}",
            why="no cell and metric is in both",
            remedy="run the same suite on both sides, or write a baseline with d2obench baseline update",
        )
    return Verdicts(title, base, head, tuple(ordered), tuple(notes), tuple(commands), dict(about or {}))


def _excess(row: Row) -> float:
    return abs(row.effect) / (row.limit or 1e-9) if row.effect is not None else 0.0
