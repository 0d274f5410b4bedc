"""KVzip: keeps what the model attends to while it repeats its context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.allocation import water_fill
from d2obench.policies.base import Entries, Needs, Stats, window_rank
from d2obench.policies.prompt_only import PromptOnly
from d2obench.policies.rules import Repeat
from d2obench.suite.grammar import Budget


@dataclass(frozen=True)
class KVzip(PromptOnly):
    """Sinks, and the entries that the model needs most to repeat the prompt, word by word.

    After the prompt, the model is asked to repeat it and is fed with that repetition, in chunks of ``chunk`` tokens
    (``d2obench.cache.repetition``). An entry's score is the highest attention that it receives from the repetition of
    its own chunk, over the tokens and over the query heads of a KV head; this softmax is over the chunk, the sinks and
    the repetition itself. No question needs to be known. The second reading takes about as long as the prompt or twice
    as long, and is counted in TTFT.

    The lowest scores of all layers and heads are evicted together, so every KV head keeps as many entries as it has
    among the highest, and is stored in so many slots (:mod:`d2obench.slots.ragged`). Decoding evicts nothing by itself
    (``decode``). In a later turn, the whole conversation is repeated.

    Args:
        window, decode: see :class:`d2obench.policies.prompt_only.PromptOnly`.
        plus: KVzip+: attention is multiplied with ``‖W_O v‖₂`` of the entry and divided by the norm of what the
            repeating token's attention block reads, before the highest is taken.
        chunk: number of tokens that are repeated at once.
        sinks: tokens at the start that are always kept.
        allocate: ``heads``, as published; ``layers``, where all heads of a layer keep equally many, in proportion to
            how many the layer has among the highest; or ``uniform`` layers and heads.
    """

    plus: bool = False
    chunk: int = 2048
    sinks: int = 4
    allocate: Literal["heads", "layers", "uniform"] = "heads"
    name: ClassVar[str] = "kvzip"
    about: ClassVar[str] = "what is needed to repeat the prompt, which is read twice; the prompt only"
    paper: ClassVar[str] = "KVzip, arXiv 2505.23416"

    @property
    def needs(self) -> Needs:
        return Needs(projection=self.plus)

    @property
    def repeats(self) -> Repeat:
        return Repeat(self.chunk, self.sinks, self.plus)

    @property
    def budgets_need_stats(self) -> bool:
        return True

    @property
    def ragged(self) -> bool:
        return self.allocate == "heads" or super().ragged

    @property
    def protected(self) -> int:
        return self.sinks

    def check(self) -> None:
        super().check()
        if self.chunk < 1:
            raise PolicyError(f"kvzip: chunk is {self.chunk}", remedy="use 1 or more")
        if self.sinks < 0:
            raise PolicyError(f"kvzip: sinks is {self.sinks}", remedy="use 0 or more")

    def importance(self, entries: Entries) -> Tensor:
        return entries.stats["repeated"]

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(self.importance(entries), entries, self.sinks, torch.zeros_like(keep))

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        equal = super().layer_budgets(stats, length, budget)
        if self.allocate == "uniform":
            return equal
        layers, heads = len(stats), stats[0]["repeated"].shape[1]
        budgets = torch.zeros(layers, len(length), heads, dtype=torch.long)
        for sequence, tokens in enumerate(length.tolist()):
            # 1. how many of the highest scores each head has; padding is on the left
            scores = torch.stack([stat["repeated"][sequence, :, -tokens:] for stat in stats]).cpu()
            scores[..., : self.sinks] = torch.inf
            mean = int(equal[0, sequence])
            wanted = min(mean * layers * heads, scores.numel())
            order = scores.flatten().argsort(descending=True, stable=True)[:wanted]
            counts = (order // tokens).bincount(minlength=layers * heads).view(layers, heads).double()
            if self.allocate == "layers":
                counts = counts.mean(1, keepdim=True)
            # 2. whole numbers with the sum that was asked for; no head is without an entry
            share, most = counts.flatten() / counts.sum(), max(tokens, mean)
            parts = water_fill(share.tolist(), mean * counts.numel(), min(max(1, self.sinks), mean), most)
            budgets[:, sequence] = torch.tensor(parts).view(counts.shape)
        return budgets if self.allocate == "heads" else budgets[..., 0]
