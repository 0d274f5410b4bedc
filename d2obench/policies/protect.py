"""``protect=prompt``: the whole prompt stays, and the budget is over generated tokens. For long answers.

The budget is a number of generated tokens that a layer may hold beside the prompt; a ratio is one of ``max_new``, the
largest number of tokens to be generated. In a conversation, everything that is held when a turn has been read belongs
to the prompt of the next answer. The last token of a task's prompt is fed after compression
(``d2obench.tasks.generate``), so it counts as generated.

How it composes with the rest of a policy:

* ``h2o``, ``d2o``: accumulated attention decides among generated tokens. ``recent`` is a share of the budget, and thus
  of generated tokens; ``sinks`` have no meaning, since the prompt begins with them.
* ``d2o``: its layer budgets divide the generated tokens among the layers; every layer keeps the prompt. With ``merge``,
  a generated token is merged into the most similar entry, which may be one of the prompt: that entry stays, but takes
  on a part of what is merged into it. With ``hosts=important`` the prompt is left as it was read.
* ``streaming``, ``local``: the prompt takes the place of the sinks, before a window of generated tokens.
* ``tova``: the newest query decides among generated tokens.
* ``random``: a uniform sample of generated tokens.
* ``triattention``: scores of generated tokens, standardised among them.

Other policies do not have the parameter: those that append every generated token, and ``roco``, whose rule compares the
deviations of all entries. A policy of another package has it if it derives from :class:`Protecting` and its rule is one
that :func:`decode_rule` can restrict to generated tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from d2obench.errors import PolicyError
from d2obench.policies.base import Policy
from d2obench.policies.rules import (
    Custom,
    DecodeRule,
    LatestAttention,
    LowestDraw,
    LowestScore,
    LowestWeightedScore,
    Ring,
    RowSizes,
)

if TYPE_CHECKING:
    from d2obench.suite.grammar import Budget


@dataclass(frozen=True)
class Protecting(Policy):
    """A policy that can keep the whole prompt and apply its budget to generated tokens.

    Args:
        protect: ``none``, or ``prompt``: see :mod:`d2obench.policies.protect`.
    """

    protect: Literal["none", "prompt"] = "none"

    @property
    def protects_prompt(self) -> bool:
        return self.protect == "prompt"

    def refuse_protection(self, what: str, why: str) -> None:
        """Raises a PolicyError if the prompt is protected: it does not go together with ``what``."""
        if self.protects_prompt:
            raise PolicyError(
                f"{self.name}: protect=prompt does not go together with {what}", why=why, remedy="leave one of them out"
            )


def decode_rule(policy: Policy, sizes: RowSizes) -> DecodeRule:
    """The rule of a policy's decode steps; if the policy protects the prompt, that for generated tokens alone.

    Raises:
        PolicyError: the rule can't be restricted to generated tokens.
    """
    if not policy.protects_prompt:
        return policy.decode_rule(sizes)
    rule = policy.decode_rule(replace(sizes, budget=sizes.budget - sizes.held))
    before = sizes.length.expand_as(sizes.held)  # positions before this are the prompt's
    match rule:
        case LowestScore() | LowestWeightedScore() | LatestAttention() | LowestDraw():
            return replace(rule, sinks=before)
        case Ring():
            return replace(rule, first=sizes.held)  # the prompt has the first slots
        case Custom() if rule.sinks is not None:
            return replace(rule, sinks=before)
    raise PolicyError(
        f"{policy.name}: protect=prompt is not possible",
        why=f"its rule {type(rule).__name__} can't be restricted to generated tokens",
        remedy="leave it out, or use h2o, d2o, streaming, tova, random or triattention",
    )


def generated(budget: Budget, max_new: int | None, name: str) -> int:
    """Generated tokens that a layer may hold beside a protected prompt.

    Raises:
        PolicyError: the budget is a ratio and ``max_new``, which it is a ratio of, is not known.
    """
    if budget.tokens is None and max_new is None:
        raise PolicyError(
            f"{name}: a ratio as the budget of protect=prompt needs max_new",
            why="it is a share of the tokens to be generated",
            remedy="give max_new, or a whole number of tokens as the budget",
        )
    return budget.of(max_new or 1)
