"""Saved models: a folder with safetensors, one GGUF file, or a model of the Hugging Face hub.

:func:`read_folder` loads them with transformers: safetensors or GGUF, no code from the model, no console output, and
one-line errors. The sources, :class:`Local`, :class:`Gguf` and :class:`Hub`, find the files.

* A folder holds ``config.json`` and safetensors weights, as ``save_pretrained`` writes them. Its digest is the
  :func:`fingerprint` of both.
* The weights of a ``.gguf`` file are dequantised by transformers, so compute and KV cache are in full precision.
* ``org/name`` or ``org/name@revision`` of the hub: safetensors only, no code from the hub. ``HF_HUB_OFFLINE=1`` uses
  the hub's local cache alone. The digest is the commit the weights came from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2obench.errors import ModelError
from d2obench.models.base import Dimensions, LoadedModel, Progress, dimensions_of, loaded
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


INDEX = "model.safetensors.index.json"


class Local:
    """The source of a saved model in a folder. Its digest is the :func:`fingerprint` of the configuration and the
    weights.

    Args:
        path: the folder.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def check(self) -> None:
        weight_files(self.path)

    def describe(self) -> Dimensions:
        weight_files(self.path)
        return dimensions_of(read_config(self.path))

    def load(
        self, dtype: torch.dtype, device: torch.device, progress: Progress, placement: Placement | None = None
    ) -> LoadedModel:
        files = weight_files(self.path)
        model, tokenizer = read_folder(self.path, dtype, device, placement=placement)
        digest = fingerprint([self.path / "config.json", *files])
        return loaded(str(self.path), model, tokenizer, digest=digest, has_sense=True)

    def pull(self, progress: Progress) -> Path | None:
        weight_files(self.path)
        return self.path


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a saved model; raises a ModelError that says what is missing or why weights are
    refused."""
    if not path.is_dir():
        raise ModelError(f"no model folder {path}", remedy="check the path; it must hold config.json and *.safetensors")
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} is not a saved model", why="it has no config.json", remedy="save it with save_pretrained"
        )
    index = path / INDEX
    if index.is_file():
        try:
            shards = sorted({str(shard) for shard in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError):
            raise ModelError(f"can't read {index}", remedy="save the model again") from None
        if any(Path(shard).name != shard for shard in shards):
            raise ModelError(f"{index} names files outside its folder", remedy="save the model again")
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise ModelError(
                f"{path / missing[0]} is missing", why=f"{INDEX} names it", remedy="copy all of the model's files"
            )
        return [path / shard for shard in shards]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelError(
            f"{path} has no safetensors weights",
            why="its .bin files are pickles, which can run code when they are read, so d2obench does not",
            remedy="save the model again with save_pretrained",
        )
    gguf = next(iter(sorted(path.glob("*.gguf"))), None)
    raise ModelError(
        f"{path} has no safetensors weights",
        remedy=f"use --model {gguf}" if gguf else "save the model with save_pretrained",
    )


MAGIC = b"GGUF"


class Gguf:
    """The source of a model in one GGUF file. Its digest is the :func:`fingerprint` of the file.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def check(self) -> None:
        try:
            with open(self.path, "rb") as file:
                magic = file.read(4)
        except OSError as problem:
            raise ModelError(f"can't read {self.path}", why=problem.strerror or "", remedy="check the path") from None
        if magic != MAGIC:
            raise ModelError(
                f"{self.path} is not a GGUF file", why="its first bytes are not GGUF", remedy="fetch it again"
            )

    def describe(self) -> Dimensions:
        self.check()
        return dimensions_of(read_config(self.path.parent, self.path.name))

    def load(
        self, dtype: torch.dtype, device: torch.device, progress: Progress, placement: Placement | None = None
    ) -> LoadedModel:
        self.check()
        model, tokenizer = dequantise(self.path, dtype, device, progress, placement)
        return loaded(
            str(self.path),
            model,
            tokenizer,
            digest=fingerprint([self.path]),
            has_sense=True,
            note="weights dequantised from GGUF; the KV cache is full precision",
        )

    def pull(self, progress: Progress) -> Path | None:
        self.check()
        return self.path


def dequantise(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    placement: Placement | None = None,
) -> tuple[Any, Any]:
    """Loads the model and the tokenizer of a GGUF file; ``progress`` counts tensors."""
    with _listening(progress):
        model, tokenizer = read_folder(path.parent, dtype, device, path.name, placement)
    model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


@contextmanager
def _listening(progress: Progress) -> Iterator[None]:
    """transformers shows its own progress bar here, which no setting turns off; its steps go to ``progress``
    instead."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def counted(tensors: Any, **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress("dequantise", done, len(tensors))
            yield tensor
        progress("dequantise", len(tensors), len(tensors))

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = counted
    try:
        yield
    finally:
        reader.tqdm = bar


def check_gguf(name: str) -> None:
    """Raises a ModelError if a model has no GGUF file."""
    if name != "embedded" and not name.lower().endswith(".gguf"):
        raise ModelError(
            f"{name} is no GGUF file", why="llama.cpp reads nothing else", remedy="use --model embedded or a .gguf file"
        )


WANTED = ("*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja")


class Hub:
    """The source of a model on the Hugging Face hub.

    Args:
        name: ``org/name``, optionally with ``@`` and a branch, tag or commit.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.repo, _, self.revision = name.partition("@")

    def check(self) -> None:
        self._fetched(["config.json"])

    def describe(self) -> Dimensions:
        return dimensions_of(read_config(self._fetched(["config.json"])))

    def load(
        self, dtype: torch.dtype, device: torch.device, progress: Progress, placement: Placement | None = None
    ) -> LoadedModel:
        folder = self._complete()
        model, tokenizer = read_folder(folder, dtype, device, placement=placement)
        return loaded(self.name, model, tokenizer, digest=folder.name, has_sense=True)

    def pull(self, progress: Progress) -> Path | None:
        return self._complete()

    def _complete(self) -> Path:
        folder = self._fetched(WANTED)
        if not any(folder.glob("model*.safetensors")):
            raise ModelError(
                f"{self.name} has no safetensors weights",
                why="pickled ones can run code when they are read, so d2obench does not",
                remedy="use a revision that has them, or convert it and use --model FOLDER",
            )
        weight_files(folder)
        return folder

    @silent()
    def _fetched(self, patterns: Sequence[str]) -> Path:
        """The folder in the hub's cache that contains at least the files matching ``patterns``; fetches them if
        needed."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        remedy = "use a local folder (--model PATH), or the default --model embedded"
        try:
            return Path(snapshot_download(self.repo, revision=self.revision or None, allow_patterns=list(patterns)))
        except GatedRepoError:
            why, remedy = "its owner gives access on request only", "ask there, then set HF_TOKEN"
        except RepositoryNotFoundError:
            why = "the hub has no such model, or it is private"
        except RevisionNotFoundError:
            why, remedy = f"it has no revision '{self.revision}'", "use a branch, tag or commit of it"
        except HFValidationError:
            why = "that is no hub id"
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
            why = "HF_HUB_OFFLINE is set and it is not in the hub's cache" if _offline() else _reason(problem)
        raise ModelError(f"can't fetch {self.name}", why=why, remedy=remedy)


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _reason(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
        return "the disk is full"
    return "the hub can't be reached and the model is not in its cache"
