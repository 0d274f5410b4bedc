"""A folder on this machine with ``config.json`` and safetensors weights, as ``save_pretrained`` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from d2obench.errors import ModelError
from d2obench.models.base import Dimensions, LoadedModel, Progress, dimensions_of, loaded
from d2obench.models.reading import fingerprint, read_config, read_folder
from d2obench.suite.placement import Placement

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


class Local:
    """A source of one saved model. Its digest is the :func:`fingerprint` of the configuration and the weights.

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
    """The safetensors files of a saved model; a ModelError says what is missing or why its weights are refused."""
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
