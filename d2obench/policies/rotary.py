"""Rotary positions: turning keys and queries, and what queries have in common before they are turned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEADING = 4
"""Number of tokens at the start of a text whose queries are left out of the moments: they are outliers."""


def rotate(held: Tensor, angle: Tensor) -> Tensor:
    """Keys or queries ``[…, d]`` rotated by angles ``[…, r/2]``, in the layout of transformers' rotary embeddings (two
    halves); only the first r channels are rotated."""
    return turned(held, angle.cos(), angle.sin())


def turned(held: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for given cosines and sines ``[…, r/2]``, which may be means of several."""
    half = cos.shape[-1]
    first, second, rest = torch.split(held.float(), [half, half, held.shape[-1] - 2 * half], -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).to(held.dtype)


@dataclass(frozen=True)
class QueryMoments:
    """Mean and covariance of the queries of a text before they are rotated, without its first LEADING tokens.

    Args:
        count: float32 ``[B]``, number of queries.
        mean: float32 ``[B, Hq, d]``.
        scatter: float32 ``[B, Hq, d, d]``, sum of the products of deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, queries: Tensor, position: Tensor, rotary: Tensor) -> QueryMoments:
        """Those of a block of rotated queries.

        Args:
            queries: ``[B, Hq, n, d]``.
            position: int64 ``[B, n]``; negative for padding.
            rotary: rotation angle per position of each rotary pair, float32 ``[r/2]``.
        """
        counted = (position >= LEADING)[:, None, :, None]
        count = counted.sum(2).float()
        plain = rotate(queries.float(), -position[:, None, :, None] * rotary)
        mean = (plain * counted).sum(2) / count.clamp_min(1)
        apart = (plain - mean[:, :, None]) * counted
        return cls(count[:, 0, 0], mean, apart.transpose(2, 3) @ apart)

    def and_then(self, other: QueryMoments) -> QueryMoments:
        """Those of this text and another block."""
        count = self.count + other.count
        share = (other.count / count.clamp_min(1))[:, None, None]
        apart = other.mean - self.mean
        between = (apart[..., None] * apart[..., None, :]) * (self.count[:, None, None] * share)[..., None]
        return QueryMoments(count, self.mean + apart * share, self.scatter + other.scatter + between)

    def select(self, sequences: Tensor) -> QueryMoments:
        """Those of other sequences."""
        return QueryMoments(self.count[sequences], self.mean[sequences], self.scatter[sequences])

    @property
    def covariance(self) -> Tensor:
        """float32 ``[B, Hq, d, d]``."""
        return self.scatter / self.count.clamp_min(1)[:, None, None, None]
