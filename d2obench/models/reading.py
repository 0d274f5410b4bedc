"""Reading saved models with transformers: safetensors or GGUF, no foreign code, in silence, one line on failure."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2obench.errors import ModelError
from d2obench.models.devices import check_whole, no_gguf, options, own_share
from d2obench.suite.definition import Placement

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_EDGE = 1 << 20


def read_folder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    gguf_file: str | None = None,
    placement: Placement | None = None,
) -> tuple[Any, Any]:
    """Model and tokenizer (None where there is none) of a folder on this machine, or of one GGUF file in it.

    Safetensors or GGUF only, no code from the folder; weights that the file lacks are an error, for transformers
    would fill them at random.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "gguf_file": gguf_file}
    if gguf_file and placement is not None and placement.tensor_parallel > 1:
        raise no_gguf(folder / gguf_file)
    placed = options(placement or Placement(), device)
    with read_errors(folder / (gguf_file or "")):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            **where,
            **placed,
        )
        tokenizer = None
        if gguf_file or any((folder / file).exists() for file in TOKENIZER_FILES):
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    if lacking := sorted(info["missing_keys"]):
        raise ModelError(
            f"{folder / (gguf_file or '')} is incomplete", why=f"{len(lacking)} weights are missing, first {lacking[0]}"
        )
    check_whole(folder / (gguf_file or ""), model)
    if placement is not None and placement.tensor_parallel > 1:
        own_share(model)
    return model, tokenizer


def read_config(folder: Path, gguf_file: str | None = None) -> Any:
    """The transformers configuration of a folder, or of one GGUF file in it."""
    from transformers import AutoConfig

    with silent(), read_errors(folder / (gguf_file or "")):
        return AutoConfig.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False, local_files_only=True)


@contextmanager
def read_errors(name: Path) -> Iterator[None]:
    """One line for whatever the libraries raise on a model they can't read; want of memory stays what it is."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as problem:
        text = " ".join(str(problem).split())
        if "trust_remote_code" in text or "custom code" in text:
            raise ModelError(
                f"can't load {name}", why="it needs code from its repository, which d2obench never runs"
            ) from problem
        raise ModelError(f"can't load {name}", why=f"{type(problem).__name__}: {text[:300]}") from problem


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 over names, sizes and the first and last MiB of ``files``.

    It tells two checkpoints apart (a safetensors header holds every tensor's name, shape and offset) without the
    minute that reading all of a large one takes; it does not prove that none of the bytes between was changed.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_EDGE))
            if size > _EDGE:
                file.seek(max(_EDGE, size - _EDGE))
                digest.update(file.read(_EDGE))
    return digest.hexdigest()


@contextmanager
def silent() -> Iterator[None]:
    """Keeps transformers' bars, notices and warnings off the terminal; a run has its own progress display."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
