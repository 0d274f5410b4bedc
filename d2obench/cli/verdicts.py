"""What ``gate`` and ``compare`` do with their outcome: print it, write files, and fill GitHub's step summary."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from d2obench.record import cannot_write

if TYPE_CHECKING:
    from d2obench.gate.verdict import Verdicts

FORMATS = {"text": "", "json": "", "markdown": "md", "html": "html", "github": "", "junit": "junit"}
"""The words of ``--format``, and the renderer's name where one writes the file as it is."""


def show(verdicts: Verdicts, formats: Iterable[str], output: Path | None, *, every: bool = False) -> None:
    """Writes every format: to stdout, or with ``output`` to a file in that folder, ``comment.md`` beside them.

    ``text`` goes to stdout in any case. With a folder, markdown and HTML have the forest plots beside them as SVG.
    ``github`` prints annotations to stdout and appends the markdown to the file that ``GITHUB_STEP_SUMMARY`` names.

    Raises:
        UsageError: no such format; nothing has been written then.
    """
    from rich.console import Console

    from d2obench.report.render.console import show_verdicts
    from d2obench.report.render.github import summary, workflow_commands
    from d2obench.report.render.markdown import COMMENT_BYTES, markdown
    from d2obench.report.verdicts import as_json, view
    from d2obench.report.write import draw, render, write_report

    names = list(dict.fromkeys(formats))
    check(names)
    page = view(verdicts)
    for name in names:
        if name == "text":
            width = max(80, shutil.get_terminal_size((160, 24)).columns)
            show_verdicts(page, Console(width=width), every=every)
        elif name == "json":
            _put(as_json(verdicts), output, "verdicts.json")
        elif name == "github":
            print(workflow_commands(page), end="")
            if output is not None:
                _put(workflow_commands(page), output, "annotations.txt")
            if target := os.environ.get("GITHUB_STEP_SUMMARY"):
                _append(Path(target), summary(page))
        elif output is None:
            print(
                "".join(text for _, text in render(FORMATS[name], page, draw(page) if name == "html" else {})), end=""
            )
    if output is not None:
        write_report(page, output, [FORMATS[name] for name in names if FORMATS[name]])
        _put(markdown(page, limit=COMMENT_BYTES), output, "comment.md")


def check(names: Iterable[str]) -> None:
    """An unknown format is a UsageError."""
    from d2obench.errors import UsageError

    for name in names:
        if name not in FORMATS:
            raise UsageError(f"unknown format '{name}'", remedy=f"use one of {', '.join(FORMATS)}")


def _put(words: str, output: Path | None, name: str) -> None:
    from d2obench.record import write_atomic

    if output is None:
        print(words, end="")
    else:
        write_atomic(output / name, words.encode("utf-8", "replace"))


def _append(path: Path, words: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(words + "\n")
    except OSError as problem:
        raise cannot_write(path, problem) from None
