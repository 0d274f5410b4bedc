"""Writes the views of a run into files, and prints its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2obench.errors import UsageError
from d2obench.record import write_atomic
from d2obench.report.build import build
from d2obench.report.view import KINDS, Report

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("md", "csv", "html", "json", "junit", "github")
USUAL = ("csv", "md", "html")


def write_views(folder: Path, formats: Sequence[str] = USUAL) -> list[Path]:
    """Makes the views of one run in its own folder.

    Args:
        folder: a finished or partial run.
        formats: some of FORMATS.

    Returns: the files, the most useful first.
    """
    return write_report(build([folder]), folder, formats)


def write_report(report: Report, folder: Path, formats: Sequence[str] = USUAL) -> list[Path]:
    """Writes a report's views into ``folder``; the figures are drawn once for all formats that show them."""
    check(formats)
    drawn = _figures(report, folder) if {"md", "html"} & set(formats) else {}
    written: list[Path] = []
    for form in FORMATS:
        if form in formats:
            for name, text in _VIEWS[form](report, drawn):
                write_atomic(folder / name, text.encode("utf-8", "replace"))
                written.append(folder / name)
    return [*written, *(folder / "figures" / f"{name}.svg" for name in drawn)]


def print_tables(folder: Path, console: Console) -> None:
    """The verdict and the headline tables of a run on ``console``."""
    from d2obench.report.render.console import show_report

    show_report(build([folder]), console)


def check(formats: Iterable[str]) -> None:
    """An unknown format is a UsageError."""
    for form in formats:
        if form not in FORMATS:
            raise UsageError(f"unknown format '{form}'", remedy=f"use some of {','.join(FORMATS)}")


def _figures(report: Report, folder: Path) -> dict[str, str]:
    """Every figure as SVG and CSV in ``figures/``; figures of an earlier rendering that are no more are removed."""
    from d2obench.report.charts import svg
    from d2obench.report.render.csvs import figure as data

    drawn = {}
    for figure in report.figures:
        drawn[figure.id] = svg(figure)
        write_atomic(folder / "figures" / f"{figure.id}.svg", drawn[figure.id].encode())
        write_atomic(folder / "figures" / f"{figure.id}.csv", data(figure).encode("utf-8", "replace"))
    for old in (folder / "figures").glob("*.*"):
        if old.suffix in (".svg", ".csv") and old.stem.split("-")[0] in KINDS and old.stem not in drawn:
            old.unlink()
    return drawn


Drawn = dict[str, str]
Files = list[tuple[str, str]]


def _md(report: Report, drawn: Drawn) -> Files:
    from d2obench.report.render.markdown import markdown

    return [("report.md", markdown(report, drawn))]


def _csv(report: Report, drawn: Drawn) -> Files:
    from d2obench.report.render import csvs

    return [("results.csv", csvs.tidy(report)), ("results-wide.csv", csvs.wide(report))]


def _html(report: Report, drawn: Drawn) -> Files:
    from d2obench.report.render.html import html

    return [("report.html", html(report, drawn))]


def _json(report: Report, drawn: Drawn) -> Files:
    from d2obench.record import dump

    return [("report.json", dump(report).decode("utf-8", "replace") + "\n")]


def _junit(report: Report, drawn: Drawn) -> Files:
    from d2obench.report.render.junit import junit

    return [("junit.xml", junit(report))]


def _github(report: Report, drawn: Drawn) -> Files:
    from d2obench.report.render.github import summary

    return [("summary.md", summary(report))]


_VIEWS: dict[str, Callable[[Report, Drawn], Files]] = {
    "md": _md, "csv": _csv, "html": _html, "json": _json, "junit": _junit, "github": _github,
}  # fmt: skip
