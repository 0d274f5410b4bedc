"""``d2obench gate``: fails on a regression, against a committed baseline or against another revision."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.gate.verdict import Verdicts


def command(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder to judge by a baseline.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="The baseline; reports/baselines/SUITE/DEVICE.json where it is left out.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Measure two revisions with this suite.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Revision to compare with; the trunk's merge base if left out.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Revision to judge; the work tree if left out.")] = None,
    base_python: Annotated[
        str, typer.Option(help="Interpreter of the base's own environment.", show_default=False)
    ] = sys.executable,
    head_python: Annotated[
        str, typer.Option(help="Interpreter of the head's own environment.", show_default=False)
    ] = sys.executable,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A suite's key, as axes.policy=d2o or gate.looks=[8]; repeatable.")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Compare exact, bounded, timed, ratio or sampled figures only; repeatable."),
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="text, json, markdown, html, github or junit; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A folder for files in these formats and comment.md.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List the OK rows too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when something stayed inconclusive.")] = False,
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Report only: exit with 0 whatever is found.")] = False,
) -> None:
    """Fail on a regression: 0 fine, 1 regressed, 2 can't compare, 3 inconclusive (with --strict).

    A run against its committed baseline:  d2obench gate RUN

    Two revisions, measured now in interleaved rounds:  d2obench gate --suite ci --base main
    """
    from d2obench.cli.verdicts import show
    from d2obench.gate.verdict import KINDS

    wrong = [kind for kind in kinds or () if kind not in KINDS]
    if wrong:
        raise UsageError(f"there is no kind '{wrong[0]}' of figures", remedy=f"use one of {', '.join(KINDS)}")
    if (run is None) == (suite is None):
        raise UsageError(
            "a gate needs a run folder, or a suite and two revisions", remedy="try d2obench gate --suite ci"
        )
    if run is not None and (base or head or settings):
        raise UsageError("--base, --head and --set belong to --suite", remedy="leave them out to judge a run")
    if suite is not None and baseline is not None:
        raise UsageError("--baseline belongs to a run", remedy="run the suite, then d2obench gate RUN --baseline FILE")
    if run is not None:
        verdicts = _stored(run, baseline, kinds or KINDS)
    else:
        assert suite is not None
        verdicts = _revisions(suite, (base, base_python), (head, head_python), settings or (), kinds or KINDS)
    show(verdicts, formats or ["text"], output, every=every)
    raise typer.Exit(verdicts.exit_code(strict=strict, exit_zero=exit_zero))


def _stored(folder: Path, baseline: Path | None, kinds: Collection[str]) -> Verdicts:
    from d2obench.gate.baseline import device_class, judge_run, path_of, read_baseline
    from d2obench.gate.facts import facts_of_run
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
    from d2obench.cli.options import overrides
    from d2obench.gate.gate import Side, gate

    def watch(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    given = overrides({}, {}, settings, ())
    return gate(suite, given, Side(*base), Side(*head), folder=Path.cwd(), watch=watch, kinds=kinds)
