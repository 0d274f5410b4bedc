"""Statistics of a model's queries before their rotation, for policies that score keys without attention.

Queries of a head lie near a fixed centre before they are rotated, whatever the text. So their mean is measured once for
a model, on any plain text (``d2obench calibrate``, :mod:`d2obench.cache.calibration`), and kept in a safetensors file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2obench.errors import PolicyError

GENERATED = "generated"
"""In place of a file: statistics that are measured on generated texts when they are first needed."""
FORMAT = 1
RECALIBRATE = "make it with d2obench calibrate MODEL --out FILE"


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """Statistics of a model's queries, of every compressed layer; G query heads share each of its H KV heads.

    Queries are those that attention uses, turned back to position 0; a factor that the model's rotary embedding
    multiplies them with stays in them.

    Args:
        mean: float32 ``[layers, H, G, d]``.
        size: mean length of each rotary pair, float32 ``[layers, H, G, r/2]``.
        model: the name of the model.
        weights: what identifies its weights (``LoadedModel.digest``); empty if not known.
        text: what was read: names of files, ``generated``, or ``random tokens``.
        tokens: number of queries.
        digest: sha256 of the file's bytes.
    """

    mean: Tensor
    size: Tensor
    model: str
    weights: str
    text: str
    tokens: int
    digest: str = ""

    def packed(self) -> bytes:
        """The content of a file. The same statistics give the same bytes."""
        from safetensors.torch import save

        about = {"format": FORMAT, "model": self.model, "weights": self.weights, "text": self.text}
        # one entry, because safetensors writes several of them in any order
        words = json.dumps({**about, "tokens": self.tokens}, sort_keys=True)
        tensors = {"mean": self.mean.float().cpu().contiguous(), "size": self.size.float().cpu().contiguous()}
        return bytes(save(tensors, {"query statistics": words}))

    def check_fits(self, layers: int, heads: int, group: int, width: int, pairs: int, name: str, weights: str) -> None:
        """Raises a PolicyError where they are not those of a model.

        Args:
            layers: number of compressed layers.
            heads: number of KV heads of each.
            group: query heads per KV head.
            width: head dimension of keys.
            pairs: number of rotary pairs.
            name: the name of the model.
            weights: what identifies its weights; empty if not known.
        """
        remedy = f"make them anew: d2obench calibrate {name or 'MODEL'} --out FILE"
        found, wanted = (*self.mean.shape, self.size.shape[3]), (layers, heads, group, width, pairs)
        if found != wanted:
            names = ("layers", "KV heads", "query heads each", "channels", "rotary pairs")
            told = [", ".join(f"{n} {word}" for n, word in zip(one, names, strict=True)) for one in (found, wanted)]
            raise PolicyError(
                f"these statistics of queries are of another model, {self.model}",
                why=f"they have {told[0]}; {name or 'this one'} has {told[1]}",
                remedy=remedy,
            )
        if weights and self.weights and weights != self.weights:
            raise PolicyError(
                f"these statistics of queries are of other weights, those of {self.model}",
                why=f"{self.weights[:12]} is not {weights[:12]}",
                remedy=remedy,
            )

    @property
    def record(self) -> dict[str, Any]:
        """What the record of a cell says of them."""
        return {"digest": self.digest, "text": self.text, "tokens": self.tokens, "model": self.model}


def digest_of(content: bytes) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()


def read(path: str) -> QueryStatistics:
    """The statistics in a file.

    Raises:
        PolicyError: it is missing, or is not such a file.
    """
    place = Path(path).expanduser()
    try:
        stat = place.stat()
        return _read(str(place), stat.st_mtime_ns, stat.st_size)
    except OSError as problem:
        raise PolicyError(
            f"can't read the statistics of queries {path}", why=problem.strerror or str(problem), remedy=RECALIBRATE
        ) from None


@lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> QueryStatistics:
    from safetensors import SafetensorError, safe_open

    def refused(why: str) -> PolicyError:
        return PolicyError(f"{path} holds no statistics of queries", why=why, remedy=RECALIBRATE)

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("query statistics", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, ValueError) as problem:
        raise refused(str(problem)) from None
    if not isinstance(about, dict) or not {"mean", "size"} <= tensors.keys():
        raise refused("it is a safetensors file with other content")
    if about.get("format") != FORMAT:
        raise refused(f"its format is {about.get('format')}, and this version reads {FORMAT}")
    mean, sizes = tensors["mean"], tensors["size"]
    if mean.ndim != 4 or sizes.ndim != 4 or mean.shape[:3] != sizes.shape[:3] or 2 * sizes.shape[3] > mean.shape[3]:
        raise refused(f"its tensors are {list(mean.shape)} and {list(sizes.shape)}")
    if not (mean.isfinite().all() and sizes.isfinite().all()):
        raise refused("some of its numbers are not finite")
    model, weights, text = (str(about.get(name, "")) for name in ("model", "weights", "text"))
    digest = digest_of(Path(path).read_bytes())
    return QueryStatistics(mean.float(), sizes.float(), model, weights, text, int(about.get("tokens", 0)), digest)


def sums_of(queries: Tensor, position: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the queries of a layer: of themselves before their rotation, float64 ``[Hq, d]``, and of the lengths of
    their rotary pairs, float64 ``[Hq, r/2]``.

    Args:
        queries: as attention uses them, ``[Hq, n, d]``.
        position: int64 ``[n]``.
        rotary: rotation angle per position of each rotary pair, float32 ``[r/2]``.
    """
    half = len(rotary)
    angle = position[:, None].double() * rotary.double()
    first, second, rest = torch.split(queries.double(), [half, half, queries.shape[-1] - 2 * half], -1)
    cos, sin = angle.cos(), angle.sin()
    plain = torch.cat((first * cos + second * sin, second * cos - first * sin, rest), -1)
    return plain.sum(1), torch.hypot(first, second).sum(1)
