"""A policy cache for a model: what ``Session`` and transformers' ``generate`` are handed."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from d2obench.attention import families
from d2obench.attention.interface import BridgedKeys
from d2obench.cache.devices import runs_of
from d2obench.cache.policy_cache import PolicyCache
from d2obench.cache.ranks import check_apart, shard_of
from d2obench.policies import parse_policy
from d2obench.policies.base import Policy
from d2obench.suite.grammar import Budget, parse_budget


def cache(
    policy: Policy | str,
    budget: Budget | float | int | str | None = None,
    *,
    model: PreTrainedModel,
    max_new: int | None = None,
    seed: int = 0,
    mark: Callable[[str], None] | None = None,
    whole: bool = False,
) -> PolicyCache:
    """A cache for ``model.generate(past_key_values=…)``; hand the same one in again to go on with a conversation.

    The model's attention is switched to the engine's.

    Args:
        policy: as written, ``d2o(merge=values)``, or built.
        budget: a ratio of the prompt or a count of tokens per layer; None for a policy without one.
        model: a transformers model of a supported family.
        max_new: tokens that will be generated at most; if not known, a growing cache is extended now and then.
        seed: for policies that draw.
        mark: told "prefill", "compress" and "decode" when a phase begins.
        whole: every prompt, and every later turn, comes in one block: a layer is then compressed before the next one
            reads the prompt, where the policy allows it. A second block is taken for a second turn.

    Raises:
        PolicyError: an unknown policy, or one that needs a budget.
        ModelError: a model of another family.
    """
    families.prepare(model)
    built = parse_policy(policy) if isinstance(policy, str) else policy
    given = budget if budget is None or isinstance(budget, Budget) else parse_budget(budget)
    _, group = families.kv_heads(model)
    wrap = BridgedKeys if model.config.model_type in families.BRIDGED else None
    kinds, rotary = families.layer_kinds(model), families.rotary(model)
    if shard := shard_of(model):
        check_apart(built)
    return PolicyCache(
        built, given, kinds, group, max_new, mark, wrap, seed, rotary, whole, shard, runs_of(model, kinds)
    )
