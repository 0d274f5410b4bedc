"""The command line: the table of its commands, and the one place where errors end.

A command is imported only when it is asked for, and packages that take long to import are imported inside functions,
so that help appears at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from d2obench import __version__
from d2obench.errors import D2OBenchError

MEASURE, READ, GUARD, PREPARE = "Measure", "Read results", "Guard against regressions", "Prepare"


class Entry(NamedTuple):
    """Where a command is defined, and what the help of ``d2obench`` says about it.

    Args:
        where: ``module:name`` in this package; the name is a function, or a Typer application with subcommands.
        panel: the heading under which it is listed.
        about: one sentence.
    """

    where: str
    panel: str
    about: str


COMMANDS = {
    "run": Entry("run:run", MEASURE, "Run a suite: compare KV-cache policies in speed, memory and quality."),
    "merge": Entry("run:merge", MEASURE, "Make one run of several shards."),
    "profile": Entry("profile:profile", MEASURE, "Show where the time and memory of a cell go."),
    "report": Entry("report:app", READ, "Render a finished or partial run again, or publish it."),
    "compare": Entry("gate:compare", READ, "Show two runs side by side."),
    "list": Entry("listing:list_", READ, "List suites, policies, tasks, metrics, models, formats or plugins."),
    "gate": Entry("gate:gate", GUARD, "Fail if something became slower, larger or worse."),
    "gate init": Entry("gate_init:init", GUARD, "Write a suite and a CI workflow for a repository that is gated."),
    "history": Entry("history:app", GUARD, "Keep figures over time, and see when a level changed."),
    "baseline": Entry("baseline:app", GUARD, "Rewrite a committed baseline on purpose."),
    "doctor": Entry("doctor:doctor", PREPARE, "Tell whether this machine is fit to measure."),
    "calibrate": Entry("calibrate:calibrate", PREPARE, "Measure statistics of a model's queries, for triattention."),
    "models": Entry("fetch:models", PREPARE, "Fetch models ahead of a run."),
    "bridges": Entry("fetch:bridges", PREPARE, "Make environments for libraries that can't share this one."),
}


class Contents(TyperGroup):
    """The commands by name; each is imported from its module when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (two := " ".join(args[:2])) in COMMANDS:  # the command of two words, not a command with that argument
            args = [two, *args[2:]]
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        entry = COMMANDS[cmd_name]
        module, _, name = entry.where.partition(":")
        app_ = getattr(importlib.import_module(f"d2obench.cli.{module}"), name)
        if not isinstance(app_, typer.Typer):
            function, app_ = app_, typer.Typer(add_completion=False)
            app_.command(cmd_name)(function)
        found: Any = typer.main.get_command(app_)
        found.name, found.short_help, found.rich_help_panel = cmd_name, entry.about, entry.panel
        return found


app = typer.Typer(
    cls=Contents,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="Begin with d2obench run quick. The help of a command explains each of its options: d2obench run --help.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"d2obench {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure what D2O, or another KV-cache policy, gains on your model and hardware, and what it costs in quality.

    Example: d2obench run quick
    """


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits with 0; 1, a regression; 2, a wrong input or a run that can't go on; or 130,
    stopped by the user."""
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    try:
        code = app(args, prog_name="d2obench", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except D2OBenchError as problem:
        return _say(str(problem), problem.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say("stopped", 130)
    except BrokenPipeError:  # the program that reads our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as problem:
        if hasattr(problem, "format_message"):  # an error of the parser, such as an unknown option
            return _say(f"{problem.format_message()} See d2obench --help.", 2)
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            return _say(f"can't write {problem.filename or 'a file'}: {problem.strerror}; free some space", 2)
        if os.environ.get("D2OBENCH_TRACEBACK"):
            raise
        what = f"internal error, {type(problem).__name__}: {problem}"
        return _say(f"{what}; please report it with what D2OBENCH_TRACEBACK=1 shows", 2)


def _say(words: str, code: int) -> int:
    """Prints one line to stderr; line breaks and control characters of quoted input are made visible."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in words)
    print(f"d2obench: {line}", file=sys.stderr)
    return code
