"""A ``.gguf`` file: its weights are dequantised by transformers, so compute and KV cache are full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2obench.errors import ModelError
from d2obench.models.base import Dimensions, LoadedModel, Progress, dimensions_of, loaded
from d2obench.models.reading import fingerprint, read_config, read_folder
from d2obench.suite.placement import Placement

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"


class Gguf:
    """A source of one GGUF file. Its digest is the :func:`fingerprint` of the file.

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
    """Model and tokenizer of a GGUF file; ``progress`` counts tensors."""
    with _listening(progress):
        model, tokenizer = read_folder(path.parent, dtype, device, path.name, placement)
    model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


@contextmanager
def _listening(progress: Progress) -> Iterator[None]:
    """transformers shows a bar of its own here, which no setting turns off: its steps go to ``progress`` instead."""
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
