"""The full cache: nothing is evicted. The yardstick of every comparison, on the same engine and kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
