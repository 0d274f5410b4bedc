"""Policies by name. ``parse_policy`` turns the words of an axis into a checked policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from d2obench.errors import PolicyError
from d2obench.plugin import Registry
from d2obench.suite.grammar import Part, Spec, parse_spec

if TYPE_CHECKING:
    from d2obench.policies.base import Policy
    from d2obench.policies.others import Other

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
        "hf-dynamic": "d2obench.policies.others:HfDynamic",
        "hf-static": "d2obench.policies.others:HfStatic",
        "sdpa-static": "d2obench.policies.others:SdpaStatic",
        "hf-quantized": "d2obench.policies.others:HfQuantized",
        "kvpress": "d2obench.policies.others:Kvpress",
        "llama.cpp": "d2obench.policies.others:LlamaCpp",
    },
    PolicyError,
)
YARDSTICKS = ("hf-dynamic", "hf-static", "sdpa-static")
"""Full caches that are not ours, on the same loop and model."""


def rules() -> list[str]:
    """The policies with a rule for our own cache: all but what stands in for one (:mod:`d2obench.policies.others`)."""
    return [name for name in REGISTRY.names() if not _is_other(REGISTRY.get(name))]


def takes_budget(text: str) -> bool:
    """Whether a policy, as written on an axis, is multiplied by the budgets."""
    return any(_kind(part).takes_budget for part in parse_spec(text).parts)


@lru_cache(maxsize=256)
def other(text: str) -> Other | None:
    """What ``text`` names where it is no policy of ours, with its parameters set and checked; None for a policy."""
    spec = parse_spec(text)
    part = spec.parts[0]
    kind = _kind(part)
    if not _is_other(kind):
        return None
    if len(spec.parts) > 1:
        raise _alone(part)
    method = part.name.partition(":")[2]
    if kind.methods:
        found: Other = kind(method=method, params=part.params)
    else:
        found = _convert(kind, part, spec, part.params)
    found.check()
    return found


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
    kind = _kind(part)
    if _is_other(kind):
        raise _alone(part)
    params = {**kind.presets.get(str(part.params.get("preset")), {}), **part.params}
    policy: Policy = _convert(kind, part, spec, params)
    policy.check()
    return policy.resolved()


def _convert(kind: Any, part: Part, spec: Spec, params: Mapping[str, Any]) -> Any:
    """An instance of a dataclass of parameters, with its types checked."""
    fields = {field.name: field.type for field in dataclasses.fields(kind) if not field.kw_only}
    for key in part.params:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise PolicyError(f"policy '{part.name}' has no parameter '{key}'", remedy=f"it has: {known}")
    given = {key: "none" if value is None and "'none'" in str(fields[key]) else value for key, value in params.items()}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as problem:
        raise PolicyError(f"policy '{spec}': {str(problem).replace('`', chr(39))}") from None


def _kind(part: Part) -> Any:
    """The class of a name, or of what stands before its colon."""
    name, colon, _ = part.name.partition(":")
    if colon and name in REGISTRY.names() and getattr(REGISTRY.get(name), "methods", False):
        return REGISTRY.get(name)
    return REGISTRY.get(part.name)


def _is_other(kind: Any) -> bool:
    from d2obench.policies.others import Other

    return isinstance(kind, type) and issubclass(kind, Other)


def _alone(part: Part) -> PolicyError:
    return PolicyError(f"{part.name} has no policy cache", remedy=f"run it alone, as --policy {part.name}")
