"""Renderers: each turns a :class:`~d2obench.report.view.Report` into the files of one format and computes nothing.

A renderer is a function of the report and of its figures as SVG text by figure id; the figures are drawn only if a
format that shows them was asked for. It returns pairs of file name and text. Another package can offer a renderer under
the entry-point group ``d2obench.renderers``; its name is then a format of ``d2obench report --format``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from d2obench.errors import RecordError, UsageError
from d2obench.plugin import Registry
from d2obench.record import write_atomic
from d2obench.report.view import KINDS, Report

Drawn = Mapping[str, str]
Files = Iterable[tuple[str, str]]
Renderer = Callable[[Report, Drawn], Files]

RENDERERS = Registry(
    "format",
    "d2obench.renderers",
    {
        "md": "d2obench.report.render.markdown:files",
        "csv": "d2obench.report.render.data:csv_files",
        "html": "d2obench.report.render.html:files",
        "json": "d2obench.report.render.data:json_files",
        "junit": "d2obench.report.render.data:junit_files",
        "github": "d2obench.report.render.markdown:github_files",
        "svg": "d2obench.report.render.console:files",
    },
    UsageError,
)
FORMATS = tuple(RENDERERS.builtin)
"""The built-in formats, in the order in which their files are named to the user: the most useful first."""
DRAWN = frozenset({"md", "html"})
"""Formats that show the figures."""
USUAL = ("csv", "md", "html")
"""Formats that are written unless others are asked for."""
RECORDS = ("run.json", "cells.jsonl")
"""Files of a run folder that no renderer may overwrite."""


def check(formats: Iterable[str]) -> None:
    """Raises a UsageError for an unknown format, and for a plugin that can't be imported."""
    for form in formats:
        RENDERERS.get(form)


def write_report(report: Report, folder: Path, formats: Sequence[str] = USUAL) -> list[Path]:
    """Writes a report into ``folder``. The figures are drawn once for all formats that show them.

    Returns: the files, in the order of FORMATS; the SVG of the figures come last.
    """
    check(formats)
    drawn = _write_figures(report, folder) if DRAWN & set(formats) else {}
    written: list[Path] = []
    for form in [*(name for name in FORMATS if name in formats), *(name for name in formats if name not in FORMATS)]:
        for name, text in render(form, report, drawn):
            write_atomic(folder / name, text.encode("utf-8", "replace"))
            written.append(folder / name)
    return [*written, *(folder / "figures" / f"{name}.svg" for name in drawn)]


def render(form: str, report: Report, drawn: Mapping[str, str]) -> list[tuple[str, str]]:
    """The files of one format, as (name, text).

    Raises:
        UsageError: the renderer of another package failed; the message names it.
        RecordError: it would write outside the folder or over a record.
    """
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
    """Every figure as SVG text, by figure id."""
    if not report.figures:
        return {}
    from d2obench.report.charts import svg

    return {figure.id: svg(figure) for figure in report.figures}


def _write_figures(report: Report, folder: Path) -> dict[str, str]:
    """Writes every figure as SVG and CSV into ``figures/``, and removes figures of an earlier report that are gone."""
    from d2obench.report.render.data import points

    drawn = draw(report)
    for figure in report.figures:
        write_atomic(folder / "figures" / f"{figure.id}.svg", drawn[figure.id].encode())
        write_atomic(folder / "figures" / f"{figure.id}.csv", points(figure).encode("utf-8", "replace"))
    for old in (folder / "figures").glob("*.*"):
        if old.suffix in (".svg", ".csv") and old.stem.split("-")[0] in KINDS and old.stem not in drawn:
            old.unlink()
    return drawn
