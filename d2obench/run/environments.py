"""Python environments of other libraries, which can't be imported into ours: kvpress wants an older transformers.

A managed one is a plain ``venv`` in the cache folder with pinned packages and nothing of ours; d2obench's own code
reaches it by a folder that holds a link to this package and nothing else, so that no package of ours gets in.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from d2obench import errors
from d2obench.errors import UsageError, WorkerError
from d2obench.models.embedded import cache_folder

PINS = {
    "kvpress": (
        "kvpress==0.5.5", "transformers==5.2.0", "gguf>=0.17", "msgspec>=0.20", "nvidia-ml-py>=12", "psutil>=6",
    ),
}  # fmt: skip
"""What goes into each environment, beside torch in our own version."""
MARKER = "environment.json"


def requirements(name: str) -> list[str]:
    """What ``install`` asks pip for.

    Raises:
        UsageError: no environment of that name is known.
    """
    if name not in PINS:
        raise UsageError(f"no bridge is called '{name}'", remedy=f"use {', '.join(PINS)}")
    try:
        torch = [f"torch=={version('torch').partition('+')[0]}"]
    except PackageNotFoundError:
        torch = ["torch"]
    return [*PINS[name], *torch]


def folder(name: str) -> Path:
    """Where a managed environment lies."""
    return cache_folder() / "environments" / name


def interpreter(name: str) -> Path | None:
    """The interpreter of a finished managed environment; None where there is none, or it was made to other pins."""
    place = folder(name)
    try:
        made = msgspec.json.decode((place / MARKER).read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError):
        return None
    python = place / "bin" / "python"
    return python if made == requirements(name) and python.exists() else None


def install(name: str, say: Callable[[str], None]) -> Path:
    """Makes a managed environment anew; what pip says goes to the terminal.

    Raises:
        UsageError: an unknown name.
        WorkerError: venv or pip failed; nothing of it stays.
    """
    wanted, place = requirements(name), folder(name)
    say(f"downloads with pip into {place}:")
    say(f"  {', '.join(wanted)}, and what they depend on (about 1.5 GB on a CPU, more with CUDA)")
    shutil.rmtree(place, ignore_errors=True)
    python = place / "bin" / "python"
    done = False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for words in ([sys.executable, "-m", "venv", str(place)], [str(python), "-m", "pip", "install", *wanted]):
            subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
        (place / MARKER).write_bytes(msgspec.json.encode(wanted))
        done = True
    except (OSError, subprocess.CalledProcessError) as problem:
        raise WorkerError(
            f"the environment of {name} could not be made",
            why=str(problem)[:300],
            remedy="see what pip says above; or make one yourself and give its interpreter as --python PATH",
        ) from None
    finally:
        if not done:
            shutil.rmtree(place, ignore_errors=True)
    return python


def code_only() -> tempfile.TemporaryDirectory[str]:
    """A folder for another interpreter's PYTHONPATH: it holds this package and nothing beside it."""
    made = tempfile.TemporaryDirectory(prefix="d2obench-code-")
    package = Path(errors.__file__).resolve().parent
    Path(made.name, package.name).symlink_to(package, target_is_directory=True)
    return made
