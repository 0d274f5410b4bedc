"""The full cache, the reference of every comparison on the same path, and the same in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from d2obench.policies.base import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every key and value, GQA unexpanded, in slots allocated once for prompt and generation."""

    name: ClassVar[str] = "full"
    about: ClassVar[str] = "keeps everything: the reference"
    takes_budget: ClassVar[bool] = False

    @property
    def grows(self) -> bool:
        return True


@dataclass(frozen=True)
class Quant(Full):
    """Keys quantised per channel in groups of tokens, values per token, as KIVI does; see
    ``d2obench.slots.quantised``. Behind another policy, ``d2o+quant(bits=4)``, it stores what that one keeps.

    Args:
        bits: of a stored number; 16 leaves the model's dtype alone.
    """

    bits: Literal[4, 8, 16] = 4
    name: ClassVar[str] = "quant"
    about: ClassVar[str] = "everything in 8 or 4 bits; goes behind other policies, too"
    paper: ClassVar[str] = "KIVI, arXiv 2402.02750"
