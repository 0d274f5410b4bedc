"""Writes the views of a run into files, and prints its tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2obench.errors import RecordError, UsageError
from d2obench.record import write_atomic
from d2obench.report.build import build
from d2obench.report.render import DRAWN, FORMATS, RENDERERS, Renderer
from d2obench.report.view import KINDS, Report

if TYPE_CHECKING:
    from rich.console import Console

USUAL = ("csv", "md", "html")
RECORDS = ("run.json", "cells.jsonl")
"""What no renderer may write over."""


def write_views(folder: Path, formats: Sequence[str] = USUAL) -> list[Path]:
    """Makes the views of one run in its own folder.

    Args:
        folder: a finished or partial run.
        formats: names of ``d2obench.report.render``.

    Returns: the files, the most useful first.
    """
    return write_report(build([folder]), folder, formats)


def write_report(report: Report, folder: Path, formats: Sequence[str] = USUAL) -> list[Path]:
    """Writes a report's views into ``folder``; the figures are drawn once for all formats that show them."""
    check(formats)
    drawn = _figures(report, folder) if DRAWN & set(formats) else {}
    written: list[Path] = []
    for form in [*(name for name in FORMATS if name in formats), *(name for name in formats if name not in FORMATS)]:
        for name, text in render(form, report, drawn):
            write_atomic(folder / name, text.encode("utf-8", "replace"))
            written.append(folder / name)
    return [*written, *(folder / "figures" / f"{name}.svg" for name in drawn)]


def print_tables(folder: Path, console: Console) -> None:
    """The verdict and the headline tables of a run on ``console``."""
    from d2obench.report.render.console import show_report

    show_report(build([folder]), console)


def check(formats: Iterable[str]) -> None:
    """An unknown format, or a plugin that can't be imported, is a UsageError."""
    for form in formats:
        RENDERERS.get(form)


def render(form: str, report: Report, drawn: Mapping[str, str]) -> list[tuple[str, str]]:
    """Files of one format; whatever goes wrong in another package's renderer is a UsageError that names it."""
    renderer: Renderer = RENDERERS.get(form)
    if form in FORMATS:
        return list(renderer(report, drawn))
    try:
        files = [(str(name), str(text)) for name, text in renderer(report, drawn)]
    except Exception as problem:
        raise UsageError(
            f"the format plugin '{form}' failed",
            why=f"{type(problem).__name__}: {problem}",
            remedy="update or remove its package, or leave the format out",
        ) from problem
    for name, _ in files:
        if not re.fullmatch(r"[\w-][\w.-]*", name) or name in RECORDS:
            raise RecordError(
                f"the format plugin '{form}' may not write '{name[:100]}'",
                why="a view is a plain file of the run folder and no record",
            )
    return files


def draw(report: Report) -> dict[str, str]:
    """Every figure as SVG, by id."""
    if not report.figures:
        return {}
    from d2obench.report.charts import svg

    return {figure.id: svg(figure) for figure in report.figures}


def _figures(report: Report, folder: Path) -> dict[str, str]:
    """Every figure as SVG and CSV in ``figures/``; figures of an earlier rendering that are no more are removed."""
    from d2obench.report.render.csvs import figure as data

    drawn = draw(report)
    for figure in report.figures:
        write_atomic(folder / "figures" / f"{figure.id}.svg", drawn[figure.id].encode())
        write_atomic(folder / "figures" / f"{figure.id}.csv", data(figure).encode("utf-8", "replace"))
    for old in (folder / "figures").glob("*.*"):
        if old.suffix in (".svg", ".csv") and old.stem.split("-")[0] in KINDS and old.stem not in drawn:
            old.unlink()
    return drawn
