"""Verdicts as one self-contained page, by the same template as a run's report: words, forest plots, every row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from d2obench.gate.verdict import Row, Verdict, Verdicts, short_names
from d2obench.report.forest import forest
from d2obench.report.view import Column, Entry, Mark, Report, Table

MAX_ROWS = 2500
MARKS: dict[Verdict, Mark] = {
    Verdict.REGRESSED: "bad",
    Verdict.INCOMPARABLE: "bad",
    Verdict.INCONCLUSIVE: "warn",
    Verdict.IMPROVED: "best",
    Verdict.OK: "quiet",
}
COLUMNS = (
    Column("verdict", "verdict", numeric=False),
    Column("cell", "cell", numeric=False),
    Column("metric", "metric", numeric=False),
    Column("base", "base"),
    Column("head", "head"),
    Column("change", "change", about="head ÷ base − 1, or head − base for quality, with its interval"),
    Column("why", "why", numeric=False),
)


def draw(verdicts: Verdicts) -> dict[str, str]:
    """The forest plots as SVG, by id."""
    figures = forest(verdicts)
    if not figures:
        return {}
    from d2obench.report.charts import svg

    return {figure.id: svg(figure) for figure in figures}


def page(verdicts: Verdicts, drawn: Mapping[str, str]) -> str:
    """The page; ``drawn`` is what :func:`draw` made."""
    from d2obench.report.render.html import html

    return html(view(verdicts), drawn)


def view(verdicts: Verdicts) -> Report:
    """Verdicts as the page's view model."""
    names = short_names(verdicts.rows)
    eyes, fine = verdicts.of(*list(Verdict)[:-1]), verdicts.of(Verdict.OK)
    tables = [("What needs a look", eyes), ("OK", fine)]
    return Report(
        title=verdicts.title,
        subtitle=f"{verdicts.base} → {verdicts.head}",
        verdict=(verdicts.summary,),
        warnings=verdicts.notes,
        headline=tuple(_table(title, rows, names) for title, rows in tables if rows),
        reading=(),
        machine=(),
        figures=tuple(forest(verdicts)),
        cells=Table("Cells", (), ()),
        environment=(),
        suites=(),
        again=verdicts.commands,
        tidy=(),
        cases=(),
    )


def _table(title: str, rows: list[Row], names: Mapping[str, str]) -> Table:
    body = tuple(tuple(_entries(row, names)) for row in rows[:MAX_ROWS])
    rest = len(rows) - len(body)
    return Table(title, COLUMNS, body, notes=(f"{rest} more rows are in the JSON output.",) if rest else ())


def _entries(row: Row, names: Mapping[str, str]) -> Iterable[Entry]:
    yield Entry(row.verdict.value, sort=float(row.verdict.severity), mark=MARKS[row.verdict])
    yield Entry(names[row.cell], note=row.cell)
    yield Entry(row.header)
    for figure in (row.base, row.head):
        yield Entry(row.shown(figure), sort=float(figure) if isinstance(figure, int | float) else None)
    yield Entry(row.change, sort=row.effect)
    yield Entry(row.reason)
