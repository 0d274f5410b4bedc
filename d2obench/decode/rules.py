"""The rules of ``d2obench.policies.rules`` in PyTorch operators: the reference for every backend.

``STEPS`` has one entry for each kind of rule, which says what a decode step does for it. The functions below the table
look the entry up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench.policies.base import Stats
from d2obench.policies.mass import LEAST
from d2obench.policies.random import drawn
from d2obench.policies.roco import moments, places
from d2obench.policies.rules import (
    Custom,
    DecodeRule,
    LatestAttention,
    LowestDraw,
    LowestScore,
    LowestWeightedScore,
    MassSpec,
    MeanOfLowDeviation,
    Ring,
)
from d2obench.slots.dense import EMPTY, NEVER, PROTECTED

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


class Steps:
    """What a decode step does for one kind of rule; without overrides it evicts the oldest token."""

    accumulates = False
    """Whether ``state.score`` is the attention that an entry has received; what is merged by mass needs that."""

    def begin(self, state: DecodeState, rule: Any, scores: list[Stats]) -> None:
        """Initialises the state's fields that the rule uses from the statistics of the kept entries."""

    def observe(self, state: DecodeState, rule: Any) -> None:
        """Updates the rule's statistics with the attention of a step (``state.attention``)."""

    def victims(self, state: DecodeState, rule: Any) -> Tensor:
        """The slots that the next tokens will overwrite, ``[layers, rows, interval]``."""
        return oldest(state, 0)

    def known(self, state: DecodeState, rule: Any) -> Stats:
        """The prompt statistics that can still be read from the rule's fields, ``[layers, rows, C]`` by name."""
        return {}


class LowestScoreSteps(Steps):
    """``state.score`` is the accumulated attention; that of sinks is NEVER."""

    accumulates = True

    def begin(self, state: DecodeState, rule: LowestScore, scores: list[Stats]) -> None:
        fill(state.score, scores, "sum")
        spare_sinks(state.score, state, rule.sinks)

    def observe(self, state: DecodeState, rule: LowestScore) -> None:
        state.score += state.attention

    def victims(self, state: DecodeState, rule: LowestScore) -> Tensor:
        score = state.score
        if rule.normalised:
            score = score / (state.now[None, :, None] - state.position + 1)
        return lowest(state, score, rule.recent[..., None])

    def known(self, state: DecodeState, rule: LowestScore) -> Stats:
        return {"sum": state.score}


class LowestWeightedScoreSteps(Steps):
    """``state.score`` is the accumulated attention, ``state.factor`` the weight of each entry, and ``state.fresh`` the
    diversity of a decoded token."""

    accumulates = True

    def begin(self, state: DecodeState, rule: LowestWeightedScore, scores: list[Stats]) -> None:
        fill(state.score, scores, "sum")
        state.factor, state.fresh = torch.ones_like(state.score), torch.ones_like(state.threshold)
        if all("diversity" in stats for stats in scores):
            fill(state.factor, scores, "diversity")
            held = state.position >= 0
            state.fresh = (state.factor * held).sum(-1) / held.sum(-1).clamp_min(1)
        if rule.value_norms:
            for layer, capacity in enumerate(state.store.capacities):
                state.factor[layer, :, :capacity] *= state.store.values(layer).float().norm(dim=-1)
        state.factor.masked_fill_(state.position < 0, 1.0).clamp_min_(LEAST)

    def observe(self, state: DecodeState, rule: LowestWeightedScore) -> None:
        state.score += state.attention
        weight = state.fresh
        if rule.value_norms:
            weight = weight * state.store.read_values(state.store.base + state.slot).float().norm(dim=-1)
        state.factor.scatter_(2, state.slot[..., None], weight[..., None].clamp_min(LEAST))

    def victims(self, state: DecodeState, rule: LowestWeightedScore) -> Tensor:
        score = state.score * state.factor
        if rule.normalised:
            score /= state.now[None, :, None] - state.position + 1
        spare_sinks(score, state, rule.sinks)
        return lowest(state, score, rule.recent[..., None])

    def known(self, state: DecodeState, rule: LowestWeightedScore) -> Stats:
        return {"sum": state.score}


class RingSteps(Steps):
    """The slot behind the one that the last token took."""

    def victims(self, state: DecodeState, rule: Ring) -> Tensor:
        after = state.slot + 1
        return torch.where(after > state.usable - 1, rule.first, after)[..., None]


class LatestAttentionSteps(Steps):
    """``state.score`` is infinite for sinks, empty and closed slots."""

    def begin(self, state: DecodeState, rule: LatestAttention, scores: list[Stats]) -> None:
        spare_sinks(state.score, state, rule.sinks)

    def victims(self, state: DecodeState, rule: LatestAttention) -> Tensor:
        layers, rows, width = state.attention.shape
        row = state.attention.view(layers, -1, state.heads, width).mean(2, keepdim=True)
        row = row.expand(-1, -1, state.heads, -1).reshape(layers, rows, width)
        return lowest(state, torch.where(state.score.isinf(), state.score, row), 0)


class MeanOfLowDeviationSteps(Steps):
    """``state.score`` is the sum of attention, ``state.square`` that of its squares."""

    accumulates = True

    def begin(self, state: DecodeState, rule: MeanOfLowDeviation, scores: list[Stats]) -> None:
        fill(state.score, scores, "sum")
        state.square = torch.zeros_like(state.score)
        fill(state.square, scores, "square")

    def observe(self, state: DecodeState, rule: MeanOfLowDeviation) -> None:
        state.score += state.attention
        state.square.addcmul_(state.attention, state.attention)

    def victims(self, state: DecodeState, rule: MeanOfLowDeviation) -> Tensor:
        now = state.now[None, :, None]
        # 1. deviations: infinite for the newest tokens and closed slots, −1 for empty slots
        mean, deviation = moments(state.score, state.square, (now - state.position + 1).clamp_min(1))
        deviation.masked_fill_(state.position > now - rule.newest[..., None], torch.inf)
        deviation.masked_fill_(state.score == -NEVER, -1.0).masked_fill_(state.score == NEVER, torch.inf)
        # 2. the ``safe`` entries of highest deviation are no candidates; ``usable`` is one more than the budget,
        # because of the newest token's slot
        candidates = (state.usable - rule.safe)[..., None]
        mean.masked_fill_(places(deviation, descending=False) >= candidates, torch.inf)
        slots = lowest(state, mean, 0)
        state.square.scatter_(2, slots, 0.0)
        return slots

    def known(self, state: DecodeState, rule: MeanOfLowDeviation) -> Stats:
        return {"sum": state.score, "square": state.square}


class LowestDrawSteps(Steps):
    """``state.score`` is the number that an entry drew; that of sinks is NEVER."""

    def begin(self, state: DecodeState, rule: LowestDraw, scores: list[Stats]) -> None:
        state.score = spare_sinks(drawn(state.stream, state.position), state, rule.sinks)

    def observe(self, state: DecodeState, rule: LowestDraw) -> None:
        at = state.slot[..., None]
        state.score.scatter_(2, at, drawn(state.stream, state.now[None, :, None].expand(at.shape)))

    def victims(self, state: DecodeState, rule: LowestDraw) -> Tensor:
        return lowest(state, state.score, 0)


class CustomSteps(Steps):
    """The policy's own methods; the state's fields are those of the inherited rule."""

    accumulates = True  # the inherited rule's part does

    def begin(self, state: DecodeState, rule: Custom, scores: list[Stats]) -> None:
        begin(state, rule.inherited, scores)

    def observe(self, state: DecodeState, rule: Custom) -> None:
        state.policy.observe(state)

    def victims(self, state: DecodeState, rule: Custom) -> Tensor:
        return state.policy.victims(state)

    def known(self, state: DecodeState, rule: Custom) -> Stats:
        return known(state, rule.inherited)


STEPS: dict[type, Steps] = {
    LowestScore: LowestScoreSteps(),
    LowestWeightedScore: LowestWeightedScoreSteps(),
    Ring: RingSteps(),
    LatestAttention: LatestAttentionSteps(),
    MeanOfLowDeviation: MeanOfLowDeviationSteps(),
    LowestDraw: LowestDrawSteps(),
    Custom: CustomSteps(),
    type(None): Steps(),
}


def begin(state: DecodeState, rule: DecodeRule | None, scores: list[Stats]) -> None:
    """As :meth:`Steps.begin`; a merge by mass also needs the accumulated attention."""
    steps = STEPS[type(rule)]
    steps.begin(state, rule, scores)
    if _sums_for_mass(state, steps):
        fill(state.score, scores, "sum")


def observe(state: DecodeState, rule: DecodeRule | None) -> None:
    """As :meth:`Steps.observe`; a merge by mass also needs the accumulated attention."""
    steps = STEPS[type(rule)]
    steps.observe(state, rule)
    if _sums_for_mass(state, steps):
        state.score += state.attention


def victims(state: DecodeState, rule: DecodeRule | None) -> Tensor:
    """As :meth:`Steps.victims`."""
    return STEPS[type(rule)].victims(state, rule)


def known(state: DecodeState, rule: DecodeRule | None) -> Stats:
    """As :meth:`Steps.known`; a merge by mass also knows the accumulated attention."""
    steps = STEPS[type(rule)]
    return ({"sum": state.score} if _sums_for_mass(state, steps) else {}) | steps.known(state, rule)


def _sums_for_mass(state: DecodeState, steps: Steps) -> bool:
    return isinstance(state.merge_spec, MassSpec) and not steps.accumulates


def lowest(state: DecodeState, score: Tensor, recent: Tensor | int) -> Tensor:
    """Slots of the ``interval`` lowest scores outside the last ``recent`` tokens, ``[layers, rows, interval]``.

    EMPTY slots come first, sinks and CLOSED ones (score NEVER) last; ties go to the lowest slot.
    """
    limit = (state.now[None, :, None] - recent).clamp_min(EMPTY)
    shown = torch.where(state.position > limit, PROTECTED, score)
    if state.policy.interval == 1:
        return shown.min(-1, keepdim=True).indices
    return shown.topk(state.policy.interval, -1, largest=False, sorted=True).indices


def oldest(state: DecodeState, start: Tensor | int) -> Tensor:
    """Slots of the ``interval`` oldest tokens at positions ``start`` and above, ``[layers, rows, interval]``; EMPTY
    slots come first."""
    kept = (state.position < EMPTY) | ((state.position >= 0) & (state.position < start))
    return lowest(state, state.position.float().masked_fill_(kept, NEVER), 0)


def fill(field: Tensor, scores: list[Stats], name: str) -> None:
    """Copies a statistic of the kept entries of every layer that has it, ``[B, H, n]``, to the first n slots of
    ``field``."""
    for layer, stats in enumerate(scores):
        if name in stats:
            kept = stats[name].flatten(0, 1)
            field[layer, :, : kept.shape[1]] = kept


def spare_sinks(score: Tensor, state: DecodeState, sinks: Tensor | int) -> Tensor:
    """Sets the scores of the entries at positions below ``sinks`` to NEVER, in place; returns them."""
    return score.masked_fill_((state.position >= 0) & (state.position < column(sinks)), NEVER)


def column(bound: Tensor | int) -> Tensor | int:
    """A number per row, or one for all rows, so that it broadcasts over slots."""
    return bound[..., None] if isinstance(bound, Tensor) else bound
