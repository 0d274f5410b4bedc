"""KeyDiff: keeps the entries whose keys are least like the mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from d2obench.policies.base import Entries
from d2obench.policies.prompt_only import PromptOnly


@dataclass(frozen=True)
class KeyDiff(PromptOnly):
    """The entries whose keys point away from the others, per KV head.

    The anchor is the mean of all keys, each divided by its norm. An entry's score is the negative cosine between its
    key and the anchor, so entries whose keys repeat what most keys say are evicted first. No attention is needed, and
    no token is protected, not even the newest. The paper reads a prompt in blocks and evicts between them, which is
    ``block=128``; by default the whole prompt is read first. Decoding evicts nothing by itself (``decode``).

    Args:
        window, decode, block: see :class:`d2obench.policies.prompt_only.PromptOnly`.
    """

    name: ClassVar[str] = "keydiff"
    about: ClassVar[str] = "keys least like the mean key; the prompt only"
    paper: ClassVar[str] = "KeyDiff, arXiv 2504.15364"

    def importance(self, entries: Entries) -> Tensor:
        keys, real = entries.keys.float(), (entries.position >= 0)[..., None]
        anchor = (F.normalize(keys, dim=-1) * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)
        return -F.cosine_similarity(keys, anchor, dim=-1)
