"""AdaKV: the scores of another policy decide how many of a layer's entries each KV head keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from d2obench.errors import PolicyError
from d2obench.policies.base import Policy
from d2obench.policies.sharing import Sharing

BY_POSITION = ("full", "quant", "quest", "streaming", "local", "cam")
"""Policies that choose by position, or not at all: their heads have nothing to compete with."""


@dataclass(frozen=True)
class AdaKV(Policy):
    """Shares a layer's entries out over its KV heads by the scores of another policy, which selects within each head.

    Each layer holds as many entries as without it, but heads that compete better hold more. The other policy's recent
    window and sinks are those of the average budget and are kept in every head; its merges, its layer budgets and its
    decode rule apply as they are. A head is stored in as many slots as it has entries (:mod:`d2obench.slots.ragged`).
    While decoding, a head's number of entries stays (or grows by every token, if the other policy appends).

    Args:
        score: the other policy, with its parameters if need be: ``snapkv``, ``h2o``, ``snapkv(kernel=7,pool=max)`` (the
            authors' own), ``pyramidkv``, ``roco``, ``d2o(allocate=uniform)``, …
        safeguard: the part of the entries that is shared out evenly, in [0, 1].
        form: ``capacity``, as in the authors' code, or ``forced``, as in kvpress: :mod:`d2obench.policies.sharing`.
    """

    score: str = "snapkv"
    safeguard: float = 0.2
    form: Literal["capacity", "forced"] = "capacity"
    name: ClassVar[str] = "adakv"
    about: ClassVar[str] = "KV heads compete for a layer's entries by another policy's scores"
    paper: ClassVar[str] = "AdaKV, arXiv 2407.11550"

    def check(self) -> None:
        if not 0 <= self.safeguard <= 1:
            raise PolicyError(f"adakv: safeguard is {self.safeguard}", remedy="use a part in [0, 1]")

    def resolved(self) -> Policy:
        from d2obench.policies import parse_choice

        choice = parse_choice(self.score)
        inner = choice.policy
        unfit = ""
        if choice.spec.parts[0].name in BY_POSITION:
            unfit = "it has no scores"
        elif inner.ragged:
            unfit = "it gives every KV head a budget of its own already"
        elif inner.judges_heads_together:
            unfit = "it judges the KV heads of a layer together"
        elif inner.protects_prompt:
            unfit = "heads share out what they keep of the prompt, and with protect=prompt they keep all of it"
        if unfit:
            raise PolicyError(f"adakv can't wrap '{self.score}'", why=unfit, remedy="use score=snapkv or score=h2o")
        return replace(inner, sharing=Sharing(self.safeguard, self.form))
