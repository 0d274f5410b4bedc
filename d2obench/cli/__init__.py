"""The command line: its contents page, and the one place where errors end.

Each command is one file of this package with a ``command`` function or, where it has subcommands, an ``app``; it is
imported when it is asked for. Heavy packages are imported inside the functions, never at a file's head.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from d2obench import __version__
from d2obench.errors import D2OBenchError

COMMANDS = {
    "run": "Run a suite.",
    "merge": "Make one run of shards.",
    "report": "Render a finished or partial run again.",
    "compare": "Put two runs side by side.",
    "gate": "Fail on a regression.",
    "profile": "Show where a cell's time and memory go.",
    "doctor": "Tell whether this machine is fit to measure.",
    "list": "List suites, policies, tasks, metrics or models.",
    "models": "Bring models to the local cache.",
    "bridges": "Make environments for libraries that can't share ours.",
    "baseline": "Rewrite a committed baseline on purpose.",
}


class Contents(TyperGroup):
    """Commands by name, each imported from its own file on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"d2obench.cli.{cmd_name}")
        if hasattr(module, "app"):
            found = typer.main.get_command(module.app)
        else:
            single = typer.Typer(add_completion=False)
            single.command(cmd_name)(module.command)
            found = typer.main.get_command(single)
        found.name, found.short_help = cmd_name, COMMANDS[cmd_name]
        return found


app = typer.Typer(cls=Contents, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"d2obench {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What D2O, or another KV-cache policy, buys on your model and hardware, and what it costs in quality."""


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits: 0, 1 a regression, 2 a wrong input or a run that can't go on, 130 stopped."""
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    try:
        code = app(args, prog_name="d2obench", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except D2OBenchError as problem:
        return _say(str(problem), problem.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say("stopped", 130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as problem:
        if hasattr(problem, "format_message"):  # the parser's own: an unknown option, a missing argument
            return _say(f"{problem.format_message()} See d2obench --help.", 2)
        if os.environ.get("D2OBENCH_TRACEBACK"):
            raise
        what = f"internal error, {type(problem).__name__}: {problem}"
        return _say(f"{what}; please report it with what D2OBENCH_TRACEBACK=1 shows", 2)


def _say(words: str, code: int) -> int:
    """One line to stderr; line breaks and control characters of quoted input are made visible."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in words)
    print(f"d2obench: {line}", file=sys.stderr)
    return code
