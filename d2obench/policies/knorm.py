"""Knorm: keeps the entries whose keys have the smallest norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from d2obench.policies.base import Entries
from d2obench.policies.prompt_only import PromptOnly


@dataclass(frozen=True)
class Knorm(PromptOnly):
    """The entries whose keys have the smallest L2 norm, per KV head: such keys tend to receive much attention.

    The norm is computed in float32. (A model that normalises its keys, such as qwen3, leaves little to tell them apart
    by.) No attention is needed, and no token is protected, not even the newest. Decoding
    evicts nothing by itself (``decode``).

    Args:
        window, decode, block: see :class:`d2obench.policies.prompt_only.PromptOnly`.
    """

    name: ClassVar[str] = "knorm"
    about: ClassVar[str] = "keys of the smallest norm; the prompt only"
    paper: ClassVar[str] = "Devoto et al., arXiv 2406.11430"

    def importance(self, entries: Entries) -> Tensor:
        norm: Tensor = entries.keys.float().norm(dim=-1)
        return -norm
