"""Quest: everything is held, and a decode step reads the pages that matter most to its query. A yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from d2obench.errors import PolicyError
from d2obench.policies.base import Policy
from d2obench.policies.rules import PagedReads


@dataclass(frozen=True)
class Quest(Policy):
    """Holds every token, and reads as many as the budget says in each decode step: pages of high bounds on attention.

    Tokens are divided into pages by their positions. Of each page and KV head, the lowest and the highest number of
    every channel of its keys are kept. With them, no key of the page can have a larger product with a query q than

        Σ_d max(q_d·low_d, q_d·high_d).

    Of each KV head, the newest ``recent`` pages are read and those of the highest bound, as a mean over its query
    heads: ``budget // pages`` pages together, at least one. The prompt is read in full, and nothing is evicted: what
    this saves is reads, not memory (``KV read a step`` beside ``KV``). It shows what eviction with the same reads gives
    up. Steps run as PyTorch operators, which copy the pages that they read, so its speed says nothing about Quest's own
    kernels.

    Args:
        pages: tokens of a page.
        recent: newest pages that are always read, the one that is being filled included.
        dense: the first layers, which read everything: 2 in the paper, where the budget is exceeded there; 0 holds it.
    """

    pages: int = 16
    recent: int = 1
    dense: int = 0
    name: ClassVar[str] = "quest"
    about: ClassVar[str] = "holds everything, reads the pages that may matter most: a yardstick"
    paper: ClassVar[str] = "Quest, arXiv 2406.10774"

    @property
    def grows(self) -> bool:
        return True

    @property
    def reads(self) -> PagedReads:
        return PagedReads(self.pages, self.recent, self.dense)

    def check(self) -> None:
        for word, least in (("pages", 1), ("recent", 1), ("dense", 0)):
            if (given := getattr(self, word)) < least:
                raise PolicyError(f"quest: {word} is {given}", remedy=f"use {least} or more")
