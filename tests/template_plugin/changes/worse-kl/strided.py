"""A KV-cache policy: every ``stride``-th token and a recent window."""

from dataclasses import dataclass
from typing import ClassVar

from d2obench.policies.base import Policy, window_rank
from d2obench.policies.rules import Ring


@dataclass(frozen=True)
class Strided(Policy):
    """Every ``stride``-th token and a recent window."""

    stride: int = 4
    name: ClassVar[str] = "strided"
    about: ClassVar[str] = "every n-th token and a recent window"

    def rank(self, entries, keep):
        score = (entries.position % self.stride == 0).float()
        return window_rank(score, entries, sinks=1, recent=keep // 2)

    def absorb(self, entries, kept, keep):
        kept.values = kept.values * 0.5
        return {}

    def decode_rule(self, sizes):
        return Ring(first=sizes.budget // 2)
