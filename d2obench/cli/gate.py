"""The commands that judge: ``d2obench gate`` and ``d2obench compare``.

``gate`` fails on a regression, against a committed baseline or another revision; ``d2obench.cli.gate_init`` sets it up.
``compare`` shows two runs side by side and never fails. Both print verdicts, or write them in the formats asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2obench.cli import options
from d2obench.errors import D2OBenchError, UsageError
from d2obench.record import cannot_write, write_atomic

if TYPE_CHECKING:
    from d2obench.gate.verdict import Verdicts

FORMATS = {"text": "", "json": "", "markdown": "md", "html": "html", "github": "", "junit": "junit"}
"""The words of ``--format``, and the name of the renderer if one writes the file as it is."""

RunFolder = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN]",
        help="Judge the finished run in this folder by its committed baseline. By default, --suite is measured.",
    ),
]
Command = Annotated[
    str | None,
    typer.Option(
        "--command",
        metavar="WORDS",
        help="Compare what this command measures in two revisions: --command 'python bench.py {record}'. It runs in "
        "each checkout in turns, through no shell, and writes a cells.jsonl into the folder {record}: one line "
        '{"id": "serve", "values": {"tpot_s": 0.012, "kv_bytes": 4096}} for each thing it measures, in seconds and '
        "bytes. By default, a suite is measured.",
    ),
]
BaselineFile = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        metavar="FILE",
        help="Judge the run by this baseline. By default, it is reports/baselines/SUITE/DEVICE.json.",
    ),
]
Suite = Annotated[
    str | None,
    typer.Option(
        help="Measure two revisions of this repository with this suite, in turns: --suite ci, or the path of a file: "
        "--suite gate.toml. By default, no revision is measured and a run has to be given."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION",
        help="Compare with this revision: --base main. By default, it is the merge base of the head and main.",
    ),
]
Head = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Judge this revision: --head HEAD. By default, it is the work tree."),
]
BasePython = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        show_default=False,
        help="Measure the base with this Python interpreter, if it needs an environment of its own. By default, it is "
        "the one that runs this command.",
    ),
]
HeadPython = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        show_default=False,
        help="Measure the head with this Python interpreter, if it needs an environment of its own. By default, it is "
        "the one that runs this command.",
    ),
]
Kinds = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="Compare only figures of this kind: exact, bounded, timed, ratio or sampled. The option can be repeated. "
        "By default, all kinds are compared.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Exit with code 3 if a figure is inconclusive. By default, such a figure does not fail."
    ),
]
ExitZero = Annotated[
    bool,
    typer.Option(
        "--exit-zero",
        help="Exit with code 0 whatever is found; the verdicts are written all the same. By default, a regression "
        "exits with code 1.",
    ),
]
FirstRun = Annotated[Path, typer.Argument(metavar="A", help="Give the folder of the run to compare with.")]
SecondRun = Annotated[Path, typer.Argument(metavar="B", help="Give the folder of the other run.")]


def gate(
    run: RunFolder = None,
    baseline: BaselineFile = None,
    suite: Suite = None,
    command: Command = None,
    base: Base = None,
    head: Head = None,
    base_python: BasePython = sys.executable,
    head_python: HeadPython = sys.executable,
    settings: options.Set = None,
    kinds: Kinds = None,
    formats: options.Formats = None,
    output: options.VerdictFolder = None,
    every: options.AllRows = False,
    strict: Strict = False,
    exit_zero: ExitZero = False,
) -> None:
    """Fail if something became slower, larger or worse, compared with a committed baseline or another revision.

    It works in any git repository: of a policy, a task or a model as a package, of pinned libraries, or of anything
    that a command can measure (see --command). Each side is built as a wheel and runs in an environment with its own
    dependencies, as the table gate of the suite says. d2obench gate init writes a suite and a CI workflow.

    The exit code is 0 without a regression, 1 with one, 2 if no comparison was possible, and 3 for --strict.

    Example, a run against its baseline: d2obench gate d2obench-runs/mine

    Example, two revisions measured in turns: d2obench gate --suite ci --base main
    """
    from d2obench.gate.verdict import KINDS

    _check(run, baseline, suite, command, sides=bool(base or head or settings), kinds=kinds or ())
    try:
        if run is not None:
            verdicts = _stored(run, baseline, kinds or KINDS)
        else:
            sides = (base, base_python), (head, head_python)
            verdicts = _revisions(suite, command, *sides, settings or (), kinds or KINDS)
    except D2OBenchError as problem:
        if output is not None:
            _leave(problem, formats or [], output)
        raise
    show(verdicts, formats or ["text"], output, every=every)
    raise typer.Exit(verdicts.exit_code(strict=strict, exit_zero=exit_zero))


def _leave(problem: D2OBenchError, formats: Iterable[str], output: Path) -> None:
    """Writes the files of a gate that could not compare anything, so that whoever reads them reads why."""
    from d2obench.gate.verdict import Row, Verdict, gather

    row = Row("*", "status", Verdict.INCOMPARABLE, "exact", reason=str(problem))
    with contextlib.suppress(D2OBenchError):  # the problem itself is reported in any case
        show(gather("gate", "base", "head", [row]), [name for name in formats if name != "text"], output)


def compare(
    base: FirstRun,
    head: SecondRun,
    formats: options.Formats = None,
    output: options.VerdictFolder = None,
    every: options.AllRows = False,
) -> None:
    """Show two runs side by side: change, interval and verdict of every figure. It never fails.

    Example: d2obench compare d2obench-runs/monday d2obench-runs/tuesday --format markdown
    """
    from d2obench.gate.compare import compare_runs
    from d2obench.record import read_run

    show(compare_runs(read_run(base), read_run(head)), formats or ["text"], output, every=every)


def show(verdicts: Verdicts, formats: Iterable[str], output: Path | None, *, every: bool = False) -> None:
    """Prints every format, or writes it to a file in the folder ``output``, with ``comment.md`` beside the files.

    ``text`` is printed in any case. With a folder, the forest plots of markdown and HTML are stored beside them as SVG.
    ``github`` prints annotations and appends the page to the file that ``GITHUB_STEP_SUMMARY`` names.

    Raises:
        UsageError: there is no such format; then nothing has been written.
    """
    from rich.console import Console

    from d2obench.report.render import draw, render, write_report
    from d2obench.report.render.console import show_verdicts
    from d2obench.report.render.markdown import COMMENT_BYTES, markdown, summary, workflow_commands
    from d2obench.report.verdicts import as_json, view

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
        _put(f"{mark(output)}\n{markdown(page, limit=COMMENT_BYTES)}", output, "comment.md")


def mark(output: Path) -> str:
    """The first line of ``comment.md``, which is not shown: by it the earlier comment of the same gate is found, which
    is then replaced. Gates whose folders have different names have comments of their own."""
    return f"<!-- d2obench {re.sub(r'[^A-Za-z0-9_.]+', '-', output.resolve().name)} -->"


def check(names: Iterable[str]) -> None:
    """Raises a UsageError for an unknown format."""
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"unknown format '{name}'", remedy=f"use one of {', '.join(FORMATS)}")


def _put(words: str, output: Path | None, name: str) -> None:
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


def _check(
    run: Path | None,
    baseline: Path | None,
    suite: str | None,
    command: str | None,
    *,
    sides: bool,
    kinds: Collection[str],
) -> None:
    """Raises a UsageError for options that exclude each other."""
    from d2obench.gate.verdict import KINDS

    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"there is no kind '{wrong[0]}' of figures", remedy=f"use one of {', '.join(KINDS)}")
    if sum(one is not None for one in (run, suite, command)) != 1:
        raise UsageError(
            "a gate needs one of a run folder, a suite, and a command",
            remedy="try d2obench gate --suite ci, or write a suite with d2obench gate init",
        )
    if run is not None and sides:
        raise UsageError("--base, --head and --set belong to --suite", remedy="leave them out to judge a run")
    if run is None and baseline is not None:
        raise UsageError("--baseline belongs to a run", remedy="run the suite, then d2obench gate RUN --baseline FILE")


def _stored(folder: Path, baseline: Path | None, kinds: Collection[str]) -> Verdicts:
    from d2obench.gate.baseline import device_class, judge_run, path_of, read_baseline
    from d2obench.gate.compare import facts_of_run
    from d2obench.run.run_folder import suite_of

    run, suite = suite_of(folder)
    path = baseline or path_of(run.info.name, device_class(run.info.environment))
    return judge_run(run.info, facts_of_run(run), read_baseline(path), str(path), suite.gate.tolerance, kinds)


def _revisions(
    suite: str | None,
    command: str | None,
    base: tuple[str | None, str],
    head: tuple[str | None, str],
    settings: Iterable[str],
    kinds: Collection[str],
) -> Verdicts:
    from d2obench.gate.command import gate_command
    from d2obench.gate.gate import Side, gate

    def watch(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    given = options.overrides({}, more=settings)
    what, measure = (suite, gate) if suite is not None else (command or "", gate_command)
    return measure(what, given, Side(*base), Side(*head), folder=Path.cwd(), watch=watch, kinds=kinds)
