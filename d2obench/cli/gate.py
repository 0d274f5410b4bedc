"""``d2obench gate``: fails on a regression, against a committed baseline or against another revision."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2obench.cli import options
from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.gate.verdict import Verdicts


RunFolder = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="The folder of a finished run, to judge by its committed baseline."),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The baseline to judge the run by. Default: reports/baselines/SUITE/DEVICE.json."
    ),
]
Suite = Annotated[
    str | None,
    typer.Option(help="Measure two revisions with this suite, in turns, instead of judging a run: --suite ci."),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION", help="The revision to compare with: --base main. Default: its merge base with main."
    ),
]
Head = Annotated[
    str | None, typer.Option(metavar="REVISION", help="The revision to judge: --head HEAD. Default: the work tree.")
]
BasePython = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        show_default=False,
        help="The interpreter that measures the base, where it needs an environment of its own. Default: this one.",
    ),
]
HeadPython = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        show_default=False,
        help="The interpreter that measures the head, where it needs an environment of its own. Default: this one.",
    ),
]
Kinds = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        help="Compare figures of this kind only: exact, bounded, timed, ratio or sampled. Can be given several times. "
        "Default: all of them.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="End with code 3 where a figure stayed inconclusive.")]
ExitZero = Annotated[
    bool, typer.Option("--exit-zero", help="End with code 0 whatever is found; the verdicts are written all the same.")
]


def command(
    run: RunFolder = None,
    baseline: Baseline = None,
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
    """Fail on a regression: 0 none, 1 a regression, 2 no comparison was possible, 3 inconclusive (with --strict).

    A run against its committed baseline:  d2obench gate d2obench-runs/mine

    Two revisions, measured now in turns:  d2obench gate --suite ci --base main
    """
    from d2obench.cli.verdicts import show
    from d2obench.gate.verdict import KINDS

    _check(run, baseline, suite, sides=bool(base or head or settings), kinds=kinds or ())
    if run is not None:
        verdicts = _stored(run, baseline, kinds or KINDS)
    else:
        verdicts = _revisions(suite or "", (base, base_python), (head, head_python), settings or (), kinds or KINDS)
    show(verdicts, formats or ["text"], output, every=every)
    raise typer.Exit(verdicts.exit_code(strict=strict, exit_zero=exit_zero))


def _check(run: Path | None, baseline: Path | None, suite: str | None, *, sides: bool, kinds: Collection[str]) -> None:
    """Refuses options that don't go together."""
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
    from d2obench.gate.gate import Side, gate

    def watch(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    given = options.overrides({}, more=settings)
    return gate(suite, given, Side(*base), Side(*head), folder=Path.cwd(), watch=watch, kinds=kinds)
