"""Policies by name. ``parse_policy`` turns the words of an axis into a checked policy."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec

from d2obench.errors import PolicyError
from d2obench.plugin import Registry
from d2obench.spec import Part, Spec, parse_spec

if TYPE_CHECKING:
    from d2obench.policies.base import Policy

REGISTRY = Registry(
    "policy",
    "d2obench.policies",
    {
        "full": "d2obench.policies.full:Full",
        "local": "d2obench.policies.streaming:Local",
        "streaming": "d2obench.policies.streaming:Streaming",
        "h2o": "d2obench.policies.h2o:H2O",
        "d2o": "d2obench.policies.d2o:D2O",
        "roco": "d2obench.policies.roco:RoCo",
        "snapkv": "d2obench.policies.snapkv:SnapKV",
        "pyramidkv": "d2obench.policies.pyramidkv:PyramidKV",
        "tova": "d2obench.policies.tova:TOVA",
        "cam": "d2obench.policies.cam:CaM",
        "random": "d2obench.policies.random:Random",
        "quant": "d2obench.policies.quant:Quant",
    },
    PolicyError,
)
YARDSTICKS = ("hf-dynamic", "hf-static")
"""The library's own caches: not policies of ours, but measured like them."""


def takes_budget(text: str) -> bool:
    """Whether a policy, as written on an axis, is multiplied by the budgets."""
    spec = parse_spec(text)
    if spec.parts[0].name in YARDSTICKS:
        return False
    return any(REGISTRY.get(part.name).takes_budget for part in spec.parts)


@lru_cache(maxsize=256)
def parse_policy(text: str) -> Policy:
    """The policy that ``text`` names, with its parameters set and checked; ``+quant(…)`` goes behind any other."""
    spec = parse_spec(text)
    policies = [_build(part, spec) for part in spec.parts]
    if len(policies) == 1:
        return policies[0]
    first, last = policies[0], policies[-1]
    if len(policies) > 2 or last.name != "quant" or first.name == "quant":
        raise PolicyError(f"'{text}' combines policies that don't go together", remedy="write POLICY+quant(bits=4)")
    return dataclasses.replace(first, bits=last.bits)


def _build(part: Part, spec: Spec) -> Policy:
    if part.name in YARDSTICKS:
        raise PolicyError(f"{part.name} has no policy cache", remedy=f"run it alone, as --policy {part.name}")
    kind = REGISTRY.get(part.name)
    fields = {field.name: field.type for field in dataclasses.fields(kind) if not field.kw_only}
    for key in part.params:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise PolicyError(f"policy '{part.name}' has no parameter '{key}'", remedy=f"it has: {known}")
    params = {
        key: "none" if value is None and "'none'" in str(fields[key]) else value for key, value in part.params.items()
    }
    params = {**kind.presets.get(str(params.get("preset")), {}), **params}
    try:
        policy: Policy = msgspec.convert(params, kind)
    except msgspec.ValidationError as problem:
        raise PolicyError(f"policy '{spec}': {str(problem).replace('`', chr(39))}") from None
    policy.check()
    return policy.resolved()
