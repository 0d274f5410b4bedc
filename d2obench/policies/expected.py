"""Expected Attention: keeps what future queries are expected to attend to, as their mean and spread tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Needs, window_rank
from d2obench.policies.prompt_only import PromptOnly
from d2obench.policies.rotary import turned


@dataclass(frozen=True)
class ExpectedAttention(PromptOnly):
    """Sinks, and the entries that receive most of the attention that the next queries are expected to pay, per KV head.

    The queries of the prompt before their rotation, without the first four, have a mean μ and a covariance Σ, per query
    head. They are taken as normally distributed and rotated to the positions of the next ``future`` tokens; R is the
    mean of these rotations. With the factor c of the logits (1 ÷ √d), entry j is expected to receive

        softmax_j(c·(Rμ)ᵀk_j + c²·k_jᵀ(RΣRᵀ)k_j ÷ 2),

    over all entries but the sinks, as the mean over the query heads of a KV head. This plus ``epsilon`` is multiplied
    by the norm of the entry's value. No attention map is needed, and no token but the sinks is protected. Decoding
    evicts nothing by itself (``decode``).

    Args:
        window, decode, block: see :class:`d2obench.policies.prompt_only.PromptOnly`.
        future: number of positions after the prompt over which rotations are averaged.
        sinks: tokens at the start that are always kept.
        covariance: whether Σ counts; otherwise only the mean does.
        value_norms: multiply a score by the norm of the entry's value.
        epsilon: added to a score before it is multiplied: 0, as published, or 0.02, as in the paper's runs.
    """

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    value_norms: bool = True
    epsilon: float = 0.0
    name: ClassVar[str] = "expected"
    about: ClassVar[str] = "what future queries are expected to attend to; the prompt only"
    paper: ClassVar[str] = "Expected Attention, arXiv 2510.00636"

    @property
    def needs(self) -> Needs:
        return Needs(moments=True)

    @property
    def protected(self) -> int:
        return self.sinks

    def check(self) -> None:
        super().check()
        for word, least in (("future", 1), ("sinks", 0), ("epsilon", 0)):
            if (given := getattr(self, word)) < least:
                raise PolicyError(f"expected: {word} is {given}", remedy=f"use {least} or more")

    def importance(self, entries: Entries) -> Tensor:
        moments, rotary, position = entries.moments, entries.rotary, entries.position
        assert moments is not None and rotary is not None
        batch, heads, total = position.shape
        group = moments.mean.shape[1] // heads
        # 1. (Rμ)ᵀk = μᵀ(Rᵀk): the keys are turned back, which is cheaper than turning every Σ
        ahead = entries.length[:, None] + torch.arange(self.future, device=rotary.device)
        angles = ahead[..., None] * rotary
        cos, sin = (mean[:, None, None] for mean in (angles.cos().mean(1), angles.sin().mean(1)))
        keys = turned(entries.keys.float() * entries.scale, cos, -sin)
        # 2. expected logits, query head by query head of each group
        mean, covariance = (
            held.view(batch, heads, group, *held.shape[2:]) for held in (moments.mean, moments.covariance)
        )
        hidden = (position < 0) | (position < self.sinks)
        score = torch.zeros(batch, heads, total, device=keys.device)
        for member in range(group):
            logits = (keys @ mean[:, :, member, :, None])[..., 0]
            if self.covariance:
                logits += ((keys @ covariance[:, :, member]) * keys).sum(-1) / 2
            logits = logits.masked_fill(hidden, -torch.inf)
            score += torch.softmax(logits, -1).nan_to_num(0.0) / group
        # 3. times the norms of values
        return (score + self.epsilon) * entries.values.float().norm(dim=-1) if self.value_norms else score

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(self.importance(entries), entries, self.sinks, torch.zeros_like(keep))
