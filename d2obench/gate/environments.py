"""What each side of a gate is imported from, if it is not simply its checkout.

Each side's package is built as a wheel and installed into a folder of its own, without its dependencies. This folder
goes in front of the worker's path, followed by this d2obench, which measures both sides. In d2obench's own repository
the wheel is d2obench itself, and nothing follows it. A checkout that is no package is put on the path as it is.

The dependencies are those that the wheel, ``requirements.txt`` or ``uv.lock`` of the checkout declare:

* ``shared``: the environment that runs the gate serves both sides. If a side needs something that is missing there, or
  another version, that side gets a layer: an environment on top of this one that holds only what differs.
* ``own``: each side gets an environment with all of its dependencies, and with those of d2obench.

Layers and environments are kept in the cache folder under a digest of everything they are made of, and are made by one
gate at a time. uv is used if it is installed, otherwise pip; layers are always made by pip, which sees what lies below.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import InvalidRequirement, Requirement

from d2obench import errors
from d2obench.errors import UsageError, WorkerError
from d2obench.gate.exclusive import CACHE, exclusive
from d2obench.gate.worktree import SPACE, full_disk, scratch
from d2obench.models.embedded import cache_folder
from d2obench.record import cannot_write

Mode = Literal["none", "shared", "own"]
MARKER = "d2obench-environment.json"
KEPT = 8
"""How many layers and environments stay in the cache."""
PACKAGED = ("pyproject.toml", "setup.py")
CODE = Path(errors.__file__).resolve().parents[1]
"""The folder from which this d2obench is imported."""


class Place(NamedTuple):
    """Where one side runs: its interpreter, the folders in front of its path, and the one d2obench must come from."""

    python: str
    paths: tuple[Path, ...]
    code: Path


def mode_of(asked: str, head: Path) -> Mode:
    """What ``auto`` stands for in the repository that is checked out in ``head``."""
    if asked == "auto":
        return "none" if (head / "d2obench/run/worker.py").is_file() else "shared"
    return asked  # type: ignore[return-value]


@contextmanager
def places(
    checkouts: Mapping[str, Path], pythons: Mapping[str, str], mode: Mode, watch: Callable[[str], None]
) -> Iterator[dict[str, Place]]:
    """Builds both sides and yields where each runs; what was built for this gate alone is removed afterwards.

    Args:
        checkouts: the folder of each side; building may leave files in it.
        pythons: the interpreter of each side; one that differs from ours needs no environment made for it.
        mode: see above.
        watch: receives a line on what is going on.

    Raises:
        WorkerError: a side does not build, or its dependencies can't be installed; the log is on stderr.
    """
    if mode == "none":
        yield {name: Place(pythons[name], (root,), root) for name, root in checkouts.items()}
        return
    with scratch("sides") as folder:
        try:
            code = folder / "code"
            code.mkdir()
            (code / "d2obench").symlink_to(CODE / "d2obench", target_is_directory=True)
            found = {}
            for name, root in checkouts.items():
                watch(f"building the {name}")
                found[name] = _place(name, root, folder / name, code, pythons[name], mode, watch)
        except OSError as problem:
            raise cannot_write(folder, problem, SPACE) from None
        with visible(found["head"].paths[:1]):
            yield found


def _place(
    name: str, source: Path, site: Path, code: Path, python: str, mode: Mode, watch: Callable[[str], None]
) -> Place:
    packaged = any((source / file).is_file() for file in PACKAGED)
    if packaged:
        _run([*_installer(), "--no-deps", "--quiet", "--target", str(site), str(source)], f"the {name} does not build")
    mine = site if packaged else source
    if python == sys.executable:
        wanted = _requirements(source, site, mode, name)
        if mode == "own" or not all(map(_satisfied, wanted)):
            python = str(_environment(wanted, source, mode, name, watch))
    if (mine / "d2obench/run/worker.py").is_file():
        return Place(python, (mine,), mine)
    return Place(python, (mine, code), CODE)


@contextmanager
def visible(paths: Sequence[Path]) -> Iterator[None]:
    """Lets this process see the plug-ins of the head, whose names the plan of a suite needs.

    Modules that were imported from there are forgotten afterwards.
    """
    from d2obench.policies import parse_choice

    def renew() -> None:
        importlib.invalidate_caches()
        parse_choice.cache_clear()

    added = [str(path) for path in paths]
    sys.path += added
    renew()
    try:
        yield
    finally:
        sys.path[:] = [path for path in sys.path if path not in added]
        for name, module in list(sys.modules.items()):
            if any((getattr(module, "__file__", None) or "").startswith(path + os.sep) for path in added):
                del sys.modules[name]
        renew()


def _requirements(source: Path, site: Path, mode: Mode, name: str) -> list[str]:
    """The dependencies of a side, one a line, as requirements files have them; d2obench is not among them, because the
    one that runs the gate measures both sides."""
    lines: list[str] = []
    if mode == "own" and (source / "uv.lock").is_file() and shutil.which("uv"):
        export = ["uv", "export", "--frozen", "--no-dev", "--no-emit-project", "--no-hashes", "--quiet"]
        lines = _run([*export, "--project", str(source)], f"the lock file of the {name} can't be read").splitlines()
    else:
        for one in distributions(path=[str(site)]):
            lines += one.requires or ()
        if (source / "requirements.txt").is_file():
            lines += (source / "requirements.txt").read_text("utf-8").splitlines()
    wanted = [line for raw in lines if (line := re.sub(r"(^|\s)#.*", "", raw).strip()) and not _unused(line)]
    if mode == "own":
        try:
            wanted += [line for line in requires("d2obench") or () if not _unused(line)]
        except PackageNotFoundError:
            raise UsageError(
                "gate.environment = own needs d2obench as an installed package",
                why="its dependencies are read from its metadata",
                remedy="install it with pip, or use gate.environment=shared",
            ) from None
    return list(dict.fromkeys(wanted))


def _unused(line: str) -> bool:
    """Whether a requirement is d2obench, or belongs to another platform or to an extra."""
    try:
        wanted = Requirement(line)
    except InvalidRequirement:
        return False
    elsewhere = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
    return elsewhere or re.sub(r"[-_.]+", "-", wanted.name).lower() == "d2obench"


def _satisfied(line: str) -> bool:
    """Whether this environment has what a requirement asks for; one that pip alone can read counts as missing."""
    try:
        wanted = Requirement(line)
        return not wanted.url and wanted.specifier.contains(version(wanted.name), prereleases=True)
    except (InvalidRequirement, PackageNotFoundError):
        return False


def _environment(wanted: Sequence[str], source: Path, mode: Mode, name: str, watch: Callable[[str], None]) -> Path:
    """The interpreter of a layer or an environment with these packages, which is made unless the cache holds it."""
    below = sorted(f"{one.name}=={one.version}" for one in distributions()) if mode == "shared" else []
    made_of = [mode, sys.version, sys.prefix if below else "", *wanted, "--", *below]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
    folder = cache_folder() / "environments" / "gate"
    place = folder / digest
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    with exclusive(folder / f"{digest}.lock", f"another gate makes the environment of the {name}", watch):
        if (place / MARKER).is_file():
            os.utime(place / MARKER)
            return python
        watch(f"installing {len(wanted)} requirements of the {name}")
        why = f"the requirements of the {name} can't be installed"
        done = False
        try:
            shutil.rmtree(place, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            _run([sys.executable, "-m", "venv", "--without-pip", str(place)], why)
            file = place / "requirements.txt"
            file.write_text("\n".join(wanted) + "\n", "utf-8")
            if mode == "shared":
                _put_on_top(place)
            _run([*_installer(python, layer=mode == "shared"), "--quiet", "-r", str(file)], why, cwd=source)
            (place / MARKER).write_text(json.dumps(made_of, indent=1) + "\n", "utf-8")
            done = True
        except OSError as problem:
            raise cannot_write(place, problem, CACHE) from None
        finally:
            if not done:
                shutil.rmtree(place, ignore_errors=True)
    _forget_old(folder)
    return python


def _put_on_top(place: Path) -> None:
    """Lets an environment see the packages of this one below its own."""
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)}))
    below = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    lines = [f"import site; site.addsitedir({folder!r})" for folder in below]
    (site / "below.pth").write_text("\n".join(lines) + "\n", "utf-8")


def _forget_old(folder: Path) -> None:
    """Removes all but the environments that were used last; one in use was used within a day and stays."""
    known = sorted(folder.glob(f"*/{MARKER}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for marker in known[KEPT:]:
        if known[0].stat().st_mtime - marker.stat().st_mtime > 86_400:
            shutil.rmtree(marker.parent, ignore_errors=True)
            marker.parent.with_suffix(".lock").unlink(missing_ok=True)


def _installer(python: Path | None = None, *, layer: bool = False) -> list[str]:
    """The command that installs into ``python``, by default into a folder for this interpreter."""
    if (uv := shutil.which("uv")) and not layer:
        return [uv, "pip", "install", "--python", str(python or sys.executable)]
    if importlib.util.find_spec("pip") is None:
        raise UsageError(
            "there is no pip here", remedy="run python -m ensurepip" + ("" if layer else ", or install uv")
        )
    into = ["--python", str(python)] if python else []
    return [sys.executable, "-m", "pip", *into, "install", "--disable-pip-version-check", "--no-input"]


def _run(command: Sequence[str], problem: str, cwd: Path | None = None) -> str:
    """The output of a command; if it fails, its log goes to stderr."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        command, cwd=cwd, env=env, text=True, errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, log = process.communicate()
    except BaseException:
        os.killpg(process.pid, 9)
        process.wait()
        raise
    if process.returncode:
        print(f"--- {' '.join(command[:4])} …\n{log.rstrip()}\n---", file=sys.stderr)
        lines = [line.strip() for line in log.splitlines() if re.search("error", line, re.IGNORECASE)]
        full = full_disk(log.splitlines())
        why = full or (lines or [f"exit code {process.returncode}"])[-1]
        raise WorkerError(problem, why=why[:300], remedy=SPACE if full else "see its log above")
    return out
