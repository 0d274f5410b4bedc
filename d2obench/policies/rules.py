"""What a decode step does with the entry that must go, as data: the rule that chooses it, and how it is merged.

A policy returns one of these rules from ``decode_rule`` and one of these merges from ``merge_spec``; the backends of
``d2obench.decode`` execute them. A policy whose rule is a kind of its own declares it in its own file
(``d2obench.decode`` describes what else that takes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DecodeRule:
    """How a decode step chooses the slot that the next token overwrites. ``d2obench.decode.rules`` has the reference
    implementation of each kind.

    A tensor among a rule's fields has one number per row, int64 ``[layers, rows]``; a row is one KV head of one
    sequence.
    """


@dataclass(frozen=True)
class RowSizes:
    """The sizes that a decode rule may depend on; a row is one KV head of one sequence.

    Args:
        budget: entries that a row may hold, without the slots reserved for new tokens, int64 ``[layers, rows]``.
        position: true position of each slot's entry, ascending, ``[layers, rows, C]``; negative for a slot without one.
        length: tokens of each row's sequence so far, int64 ``[rows]``.
    """

    budget: Tensor
    position: Tensor
    length: Tensor

    @property
    def held(self) -> Tensor:
        """Entries that a row holds now, int64 ``[layers, rows]``."""
        return (self.position >= 0).sum(-1)

    def leading(self, count: Tensor) -> Tensor:
        """Number of slots that hold one of the first ``count`` ``[layers, rows]`` tokens of a text: fewer than
        ``count`` if an earlier, smaller budget has already evicted some of them."""
        there = ((self.position >= 0) & (self.position < count[..., None])).sum(-1)
        return count - (torch.minimum(count, self.length) - there)


@dataclass(frozen=True, eq=False)
class LowestScore(DecodeRule):
    """Evicts the entry of lowest accumulated attention outside a recent window.

    Args:
        recent: size of the window, int64 ``[layers, rows]``.
        sinks: positions below this (a number or ``[layers, rows]``) are never evicted.
        normalised: divide each score by the number of queries that could attend to the token.
    """

    recent: Tensor
    sinks: Tensor | int = 0
    normalised: bool = False


@dataclass(frozen=True, eq=False)
class LowestWeightedScore(DecodeRule):
    """Evicts the entry of lowest accumulated attention times weight, outside sinks and a recent window.

    An entry's weight is fixed when it comes into its slot. It is the product of the statistic "diversity" of the
    prompt's entries (for a decoded token their mean; 1 if the policy has no such statistic) and, with ``value_norms``,
    of the norm of its value.

    Args:
        recent: size of the window, int64 ``[layers, rows]``.
        sinks: positions below this (a number or ``[layers, rows]``) are never evicted.
        normalised: divide each score by the number of queries that could attend to the token.
        value_norms: whether the norm of its value is a factor of an entry's weight.
    """

    recent: Tensor
    sinks: Tensor | int = 0
    normalised: bool = False
    value_norms: bool = False


@dataclass(frozen=True, eq=False)
class Ring(DecodeRule):
    """Evicts the oldest entry, except for the first ones. Entries are stored in the order of their positions, so the
    slots from ``first`` on (int64 ``[layers, rows]``) are overwritten in turn, as a ring."""

    first: Tensor


@dataclass(frozen=True, eq=False)
class LatestAttention(DecodeRule):
    """Evicts the entry that the newest query attends to least, by the mean over all heads of a layer.

    Args:
        sinks: positions below this (a number or ``[layers, rows]``) are never evicted; not with a merge by mass.
    """

    sinks: Tensor | int = 0


@dataclass(frozen=True, eq=False)
class MeanOfLowDeviation(DecodeRule):
    """Evicts the lowest mean attention among the entries of low standard deviation.

    Args:
        safe: number of entries of highest deviation that are not evicted, int64 ``[layers, rows]``.
        newest: number of newest tokens whose deviation counts as infinite, int64 ``[layers, rows]``.
    """

    safe: Tensor
    newest: Tensor


@dataclass(frozen=True, eq=False)
class LowestDraw(DecodeRule):
    """Evicts the entry with the lowest random number; each entry draws one number once
    (``d2obench.policies.random``).

    Args:
        sinks: positions below this (a number or ``[layers, rows]``) are never evicted.
    """

    sinks: Tensor | int = 0


@dataclass(frozen=True, eq=False)
class Custom(DecodeRule):
    """A rule implemented in code: the policy's own ``observe``, ``victims`` and ``absorb_step`` run, as PyTorch
    operators.

    Args:
        inherited: the rule used for those of the three methods that the policy does not override.
        why: the reason that a record's decode path gives for running PyTorch operators.
        sinks: positions below this (a number or ``[layers, rows]``) are never evicted; None if the rule heeds no such
            bound.
    """

    inherited: DecodeRule | None = None
    why: str = "the policy's rule is code of its own"
    sinks: Tensor | int | None = None


@dataclass(frozen=True)
class MergeSpec:
    """D2O's merge of an evicted entry: into the kept entry whose key is most similar, its *merge target*, if the
    similarity reaches a threshold (``d2obench.policies.merging``). Otherwise the entry is dropped.

    Args:
        beta: weight of the newest similarity in the threshold's moving average.
        keys: whether keys are merged, in addition to values.
        per_layer: one threshold per sequence and layer instead of one per KV head.
        targets: which kept entries can be merge targets: ``all``, or ``important``, those that are neither sinks nor in
            the recent window.
        inherit: whether the score of an evicted entry is added to that of its merge target.
    """

    beta: float
    keys: bool = True
    per_layer: bool = False
    targets: Literal["all", "important"] = "all"
    inherit: bool = False


@dataclass(frozen=True)
class SpreadSpec:
    """CaM's merge of an evicted entry: with the probability ``attention ÷ mean attention of the younger entries`` (at
    most 1), ``value / parts`` is added to the values of the next ``parts`` slots of a :class:`Ring`."""

    parts: int


@dataclass(frozen=True)
class MassSpec:
    """The merge of an evicted entry by mass (``d2obench.policies.mass``): its attention is added to that of the kept
    entry whose key is most similar, by a bias of that entry's logit. Keys stay as they are."""


Merge = MergeSpec | SpreadSpec | MassSpec
"""How an evicted entry is merged during decoding."""


@dataclass(frozen=True)
class PagedReads:
    """That everything is held and a decode step reads some pages of it (``d2obench.decode.pages``).

    Args:
        size: tokens of a page.
        recent: newest pages that are always read.
        dense: number of first layers that read everything.
    """

    size: int
    recent: int
    dense: int


@dataclass(frozen=True)
class Repeat:
    """That the model repeats the prompt before it is compressed (``d2obench.cache.repetition``).

    Args:
        chunk: number of tokens that are repeated at once.
        sinks: number of tokens at the start to which every chunk's repetition also attends.
        plus: whether attention is weighted by what a value adds to the output.
    """

    chunk: int
    sinks: int
    plus: bool
