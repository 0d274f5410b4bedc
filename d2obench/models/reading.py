"""Loads saved models with transformers: safetensors or GGUF, no code from the model, no console output, one-line
errors."""

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
    """Loads the model and the tokenizer (None if there is none) of a local folder, or of one GGUF file in it.

    Only safetensors or GGUF, and no code from the folder. Weights missing from the file are an error, because
    transformers would fill them with random numbers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # 1. read the weights to where they belong; with several ranks, only this rank's share
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
        # 2. the tokenizer, if the folder has one
        tokenizer = None
        if gguf_file or any((folder / file).exists() for file in TOKENIZER_FILES):
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    # 3. nothing may be missing or left on another device; free what a rank does not need
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
    """Turns any error of the libraries into a one-line ModelError; out-of-memory errors pass unchanged."""
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

    It distinguishes two checkpoints (a safetensors header holds every tensor's name, shape and offset) without the
    minute that reading all of a large one takes; it does not prove that no byte in between was changed.
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
    """Suppresses transformers' progress bars, notices and warnings; a run has its own progress display."""
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
