"""``d2obench calibrate MODEL``: statistics of a model's queries, for policies that score keys by them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Name the model: embedded, a hub id such as Qwen/Qwen2.5-0.5B, a folder, or a .gguf file.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the statistics to this safetensors file. By default, it is MODEL.queries.safetensors, in the "
        "present folder.",
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Read this text: --data essay.txt. The option can be repeated. By default, generated prose is read.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Read at most so many tokens of all texts together. By default, 32768 tokens of files, or 4096 of "
        "generated prose.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        help="Run the model in this type: float32, bfloat16, float16, or auto, bfloat16 on a GPU and float32 on a CPU.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="Run on this device: auto, cpu, cuda or cuda:1. auto is the first GPU.")
]
MOST = 32_768
"""Tokens of files that are read by default, as many as the authors read at most."""


def calibrate(
    model: ModelName,
    data: Data = None,
    out: Out = None,
    tokens: Tokens = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure statistics of a model's queries on plain text, for the policy triattention.

    The text may be anything that the model can read. Without --data, the policy measures the same by itself when it is
    first used; a file of your own is for other texts, and for runs whose processes share a model's heads.

    Example: d2obench calibrate embedded --data essay.txt --out essay.safetensors
    """
    from rich.progress import TimeRemainingColumn

    from d2obench.cache.calibration import LENGTH as GENERATED_LENGTH
    from d2obench.cache.calibration import TEXTS, generated_texts, measure, write
    from d2obench.cli.bars import bars
    from d2obench.errors import ModelError
    from d2obench.models import load

    texts = [_read(path) for path in data or ()]
    place = out or Path(f"{Path(model.rstrip('/')).name.partition('@')[0]}.queries.safetensors")
    with bars(TimeRemainingColumn()) as progress:
        loaded = load(model, dtype, device, progress)
        if loaded.tokenizer is None:
            raise ModelError(
                f"{model} has no tokenizer", why="it can't read text", remedy="use a model with real weights"
            )
        if texts:
            parts = split([_encode(loaded.tokenizer, text) for text in texts], tokens or MOST, loaded.context)
        else:
            parts = generated_texts(loaded.model, loaded.tokenizer, tokens or TEXTS * GENERATED_LENGTH)
        found = measure(
            loaded.model, parts, about=", ".join(path.name for path in data or ()) or "generated", name=loaded.name,
            weights=loaded.digest, progress=progress,
        )  # fmt: skip
    write(found, place)
    typer.echo(f"{place}: {found.tokens} tokens of {found.text}, sha256 {found.digest}")
    typer.echo(f"Use it as --policy 'triattention(stats={place})'")


def split(texts: list[list[int]], most: int, context: int) -> list[list[int]]:
    """Texts cut into parts that the model's context holds, equally long for each text, of ``most`` tokens together; the
    last ones are left out."""
    parts: list[list[int]] = []
    for text in texts:
        text = text[:most]
        most -= len(text)
        count = -(-len(text) // context)
        parts += [text[i * len(text) // count : (i + 1) * len(text) // count] for i in range(count)]
    return parts


def _read(path: Path) -> str:
    from d2obench.errors import DataError
    from d2obench.tasks.data import read_text

    text = read_text(str(path))
    if not text.strip():
        raise DataError(f"{path} is empty", remedy="give a text of a few thousand words")
    return text


def _encode(tokenizer: object, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # type: ignore[operator]
    return ids
