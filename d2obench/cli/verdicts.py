"""What ``gate`` and ``compare`` do with their outcome: print it, write files, and fill GitHub's step summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from d2obench.gate.verdict import Verdicts
from d2obench.record import cannot_write

FILES = {
    "json": "verdicts.json",
    "markdown": "verdicts.md",
    "html": "verdicts.html",
    "github": "annotations.txt",
    "junit": "junit.xml",
}


def show(verdicts: Verdicts, formats: Iterable[str], output: Path | None, *, every: bool = False) -> None:
    """Writes every format: to stdout, or with ``output`` to a file in that folder, ``comment.md`` beside them.

    ``text`` goes to stdout in any case. With a folder, markdown and HTML have the forest plots beside them as SVG.
    ``github`` prints annotations to stdout and appends the markdown to the file that ``GITHUB_STEP_SUMMARY`` names.
    """
    from d2obench.report.verdicts import check, render
    from d2obench.report.verdicts_markdown import comment, markdown
    from d2obench.report.verdicts_text import text

    names = list(dict.fromkeys(formats))
    check(names)
    drawn = _figures(verdicts, output) if output is not None and {"markdown", "html"} & set(names) else {}
    for name in names:
        if name == "text":
            color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            _print(text(verdicts, color=color, width=_width(), every=every))
            continue
        made = render(name, verdicts, drawn)
        if name == "github":
            _print(made)
            summary = os.environ.get("GITHUB_STEP_SUMMARY")
            if summary:
                _append(Path(summary), markdown(verdicts))
        if output is None and name != "github":
            _print(made)
        elif output is not None:
            _write(output / FILES[name], made)
    if output is not None:
        _write(output / "comment.md", comment(verdicts))


def _figures(verdicts: Verdicts, output: Path) -> dict[str, str]:
    from d2obench.report.verdicts_html import draw

    drawn = draw(verdicts)
    for name, picture in drawn.items():
        _write(output / f"{name}.svg", picture)
    return drawn


def _width() -> int:
    import shutil

    return max(80, shutil.get_terminal_size((160, 24)).columns)


def _print(words: str) -> None:
    print(words, end="")


def _write(path: Path, words: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words, encoding="utf-8")
    except OSError as problem:
        raise cannot_write(path, problem) from None


def _append(path: Path, words: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(words + "\n")
    except OSError as problem:
        raise cannot_write(path, problem) from None
