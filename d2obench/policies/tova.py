"""TOVA, token omission via attention: only the newest query decides, for all heads of a layer together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from d2obench.policies.base import Entries, Needs
from d2obench.policies.mass import MassMerging
from d2obench.policies.protect import Protecting
from d2obench.policies.rules import DecodeRule, LatestAttention, RowSizes


@dataclass(frozen=True)
class TOVA(MassMerging, Protecting):
    """Keeps the ``budget`` tokens that the last query attends to most, on the mean over all heads of the layer.

    The prompt's last query decides at the prompt's end, and each new query during decoding. No scores are kept and no
    token is protected, not even the newest (as in the authors' code).

    Args:
        merge: ``none``, as published, or ``mass`` (:mod:`d2obench.policies.mass`).
        equal: with ``merge=mass``, what a budget stands for, ``slots`` or ``bytes``:
            :mod:`d2obench.policies.biased`.
        protect: ``prompt`` keeps the whole prompt (:mod:`d2obench.policies.protect`).
    """

    name: ClassVar[str] = "tova"
    about: ClassVar[str] = "what the newest query attends to, one choice per layer"
    paper: ClassVar[str] = "TOVA, arXiv 2401.06104"
    needs_attention: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.merge == "mass":
            self.refuse_protection("merge=mass", "this rule has no scores of protected entries to merge by")

    @property
    def judges_heads_together(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(columns=self.merge == "mass", window=1)

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        row = entries.stats["window"].mean(1, keepdim=True).expand_as(entries.position)
        return row.masked_fill(entries.position < 0, float("-inf"))

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        return LatestAttention()
