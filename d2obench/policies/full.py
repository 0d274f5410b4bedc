"""The full cache, which is the reference of every comparison, and the full cache in 8, 4 or 2 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from d2obench.policies.base import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every key and value, GQA unexpanded, in slots allocated once for the prompt and the generated tokens."""

    name: ClassVar[str] = "full"
    about: ClassVar[str] = "keeps everything: the reference"
    takes_budget: ClassVar[bool] = False

    @property
    def grows(self) -> bool:
        return True


@dataclass(frozen=True)
class Quant(Full):
    """Quantises keys per channel in groups of tokens, and values per token, as KIVI does; see
    ``d2obench.slots.quantised``. Appended to another policy, as in ``d2o+quant(bits=4)``, it stores what that policy
    keeps.

    Args:
        bits: bits per stored number; 16 keeps the model's dtype.
    """

    bits: Literal[2, 4, 8, 16] = 4
    name: ClassVar[str] = "quant"
    about: ClassVar[str] = "everything in 8, 4 or 2 bits; goes behind other policies, too"
    paper: ClassVar[str] = "KIVI, arXiv 2402.02750"
