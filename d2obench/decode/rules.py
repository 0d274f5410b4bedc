"""How a policy picks its victims, for the fused paths that pick them by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2obench.policies.base import Policy
from d2obench.policies.d2o import D2O
from d2obench.policies.h2o import H2O
from d2obench.policies.streaming import Streaming

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


def rule_of(state: DecodeState) -> str | None:
    """The rule of a state's policy: "lowest" score, "ring" of slots, or not at all.

    Methods are compared, so that a policy derived from one of these goes its own way as soon as it changes one.
    """
    policy, kind = state.policy, type(state.policy)
    if state.grows or policy.interval > 1:
        return None
    merges = kind.absorb_step is not Policy.absorb_step and state.pending_merge is None
    if merges and not (kind.absorb_step is D2O.absorb_step and getattr(policy, "merge", "") == "none"):
        return None
    if kind.observe is H2O.observe and kind.victims is H2O.victims:
        important = state.pending_merge is not None and state.pending_merge.spec.hosts != "all"
        return None if important or getattr(policy, "normalised", False) else "lowest"
    if kind.observe is Policy.observe and kind.victims is Streaming.victims and state.pending_merge is None:
        return None if "read" in state.extra else "ring"
    return None
