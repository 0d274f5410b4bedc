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
        return window_rank(-entries.position.float(), entries, sinks=1, recent=keep // 8)

    def decode_rule(self, sizes):
        return Ring(first=sizes.budget // 2)
