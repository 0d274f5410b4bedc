"""The commands that judge: ``d2obench gate``, ``d2obench compare``, and ``d2obench baseline update``.

``gate`` fails on a regression, against a committed baseline or against another revision. ``compare`` shows two runs
side by side and never fails. Both print their verdicts, or write them in the formats asked for.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2obench.cli import options
from d2obench.errors import UsageError
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
        help="Measure two revisions with this suite, in turns: --suite ci. By default, no revision is measured and a "
        "run has to be given."
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
Reason = Annotated[
    str,
    typer.Option(
        help='Say why the figures change; the file keeps it: --reason "fewer operators in decode".', show_default=False
    ),
]
NewSuite = Annotated[
    str,
    typer.Option(
        "--suite", help="Run this suite: --suite ci. There is no default: give this or --run.", show_default=False
    ),
]
NewRun = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="FOLDER", help="Take the figures of this finished run. By default, the suite is run."
    ),
]
BaselineFolder = Annotated[Path, typer.Option("--folder", help="Keep baselines in this folder, as SUITE/DEVICE.json.")]


def gate(
    run: RunFolder = None,
    baseline: BaselineFile = None,
    suite: Suite = None,
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

    The exit code is 0 without a regression, 1 with one, 2 if no comparison was possible, and 3 for --strict.

    Example, a run against its baseline: d2obench gate d2obench-runs/mine

    Example, two revisions measured in turns: d2obench gate --suite ci --base main
    """
    from d2obench.gate.verdict import KINDS

    _check(run, baseline, suite, sides=bool(base or head or settings), kinds=kinds or ())
    if run is not None:
        verdicts = _stored(run, baseline, kinds or KINDS)
    else:
        verdicts = _revisions(suite or "", (base, base_python), (head, head_python), settings or (), kinds or KINDS)
    show(verdicts, formats or ["text"], output, every=every)
    raise typer.Exit(verdicts.exit_code(strict=strict, exit_zero=exit_zero))


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


baseline = typer.Typer(no_args_is_help=True, add_completion=False)


@baseline.callback()
def baseline_root() -> None:
    """Rewrite committed baselines, by which d2obench gate judges runs.

    Example: d2obench baseline update --suite ci --reason "one operator less in a decode step"
    """


@baseline.command()
def update(
    reason: Reason, suite: NewSuite = "", run: NewRun = None, folder: BaselineFolder = Path("reports/baselines")
) -> None:
    """Rewrite a baseline on purpose. The diff of the file shows a reviewer what changed.

    Example: d2obench baseline update --suite ci --reason "one operator less in a decode step"
    """
    from d2obench.gate.baseline import baseline_of, path_of, write_baseline
    from d2obench.gate.compare import facts_of_run
    from d2obench.record import read_run

    if not reason.strip():
        raise UsageError("a baseline needs a reason", remedy='say why it changes: --reason "fewer operators in decode"')
    if (run is None) == (not suite):
        raise UsageError("a baseline comes from a suite or from a run", remedy="give --suite ci or --run FOLDER")
    found = read_run(run or _measured(suite))
    made = baseline_of(found.info, facts_of_run(found), reason)
    path = path_of(made.suite, made.device_class, folder)
    write_baseline(path, made)
    typer.echo(f"{path}: {len(made.cells)} cells of {found.path}")


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
        _put(markdown(page, limit=COMMENT_BYTES), output, "comment.md")


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


def _check(run: Path | None, baseline: Path | None, suite: str | None, *, sides: bool, kinds: Collection[str]) -> None:
    """Raises a UsageError for options that exclude each other."""
    from d2obench.gate.verdict import KINDS

    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"there is no kind '{wrong[0]}' of figures", remedy=f"use one of {', '.join(KINDS)}")
    if (run is None) == (suite is None):
        raise UsageError(
            "a gate needs a run folder, or a suite and two revisions", remedy="try d2obench gate --suite ci"
        )
    if run is not None and sides:
        raise UsageError("--base, --head and --set belong to --suite", remedy="leave them out to judge a run")
    if suite is not None and baseline is not None:
        raise UsageError("--baseline belongs to a run", remedy="run the suite, then d2obench gate RUN --baseline FILE")


def _stored(folder: Path, baseline: Path | None, kinds: Collection[str]) -> Verdicts:
    from d2obench.gate.baseline import device_class, judge_run, path_of, read_baseline
    from d2obench.gate.compare import facts_of_run
    from d2obench.run.run_folder import suite_of

    run, suite = suite_of(folder)
    path = baseline or path_of(run.info.name, device_class(run.info.environment))
    return judge_run(run.info, facts_of_run(run), read_baseline(path), str(path), suite.gate.tolerance, kinds)


def _revisions(
    suite: str,
    base: tuple[str | None, str],
    head: tuple[str | None, str],
    settings: Iterable[str],
    kinds: Collection[str],
) -> Verdicts:
    from d2obench.gate.gate import Side, gate

    def watch(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    given = options.overrides({}, more=settings)
    return gate(suite, given, Side(*base), Side(*head), folder=Path.cwd(), watch=watch, kinds=kinds)


def _measured(suite: str) -> Path:
    """Runs the suite. Returns the folder of the run."""
    from d2obench.cli.run import measure
    from d2obench.run.check import check
    from d2obench.run.runner import open_engine
    from d2obench.suite.definition import load_suite

    chosen = load_suite(suite)
    with open_engine("local", chosen) as place:
        folder, stopped = measure(check(place.suite, place.client), place, None, plain=False)
    if stopped:
        raise typer.Abort
    return folder
