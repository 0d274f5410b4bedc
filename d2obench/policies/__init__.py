"""Policies by name, and the parser of a policy as it is written on the command line or in a suite.

:func:`parse_choice` parses ``d2o(merge=values)``, ``d2o+quant(bits=4)`` or ``kvpress:SnapKVPress`` into a
:class:`PolicyChoice`: one of our policies, or a yardstick, that is another library's cache or engine
(:mod:`d2obench.policies.yardsticks`). Parsing does not import torch; ``choice.policy`` does, because it builds the
policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from d2obench.errors import PolicyError
from d2obench.plugin import Registry
from d2obench.policies.yardsticks import Yardstick
from d2obench.suite.grammar import Part, Spec, parse_spec

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
        "adakv": "d2obench.policies.adakv:AdaKV",
        "pyramidkv": "d2obench.policies.snapkv:PyramidKV",
        "tova": "d2obench.policies.tova:TOVA",
        "cam": "d2obench.policies.cam:CaM",
        "cake": "d2obench.policies.cake:CAKE",
        "criticalkv": "d2obench.policies.criticalkv:CriticalKV",
        "duo": "d2obench.policies.duo:Duo",
        "expected": "d2obench.policies.expected:ExpectedAttention",
        "keepkv": "d2obench.policies.keepkv:KeepKV",
        "keydiff": "d2obench.policies.keydiff:KeyDiff",
        "knorm": "d2obench.policies.knorm:Knorm",
        "kvzip": "d2obench.policies.kvzip:KVzip",
        "lagkv": "d2obench.policies.lagkv:LagKV",
        "quest": "d2obench.policies.quest:Quest",
        "rkv": "d2obench.policies.rkv:RKV",
        "triattention": "d2obench.policies.triattention:TriAttention",
        "random": "d2obench.policies.random:Random",
        "quant": "d2obench.policies.full:Quant",
        "hf-dynamic": "d2obench.policies.yardsticks:HfDynamic",
        "hf-static": "d2obench.policies.yardsticks:HfStatic",
        "sdpa-static": "d2obench.policies.yardsticks:SdpaStatic",
        "hf-quantized": "d2obench.policies.yardsticks:HfQuantized",
        "kvpress": "d2obench.policies.yardsticks:Kvpress",
        "llama.cpp": "d2obench.policies.yardsticks:LlamaCpp",
    },
    PolicyError,
)
LIBRARY_CACHES = ("hf-dynamic", "hf-static", "sdpa-static")
"""Other full caches, measured with the same loop and the same model, for comparison with ``full``."""
KEEPS_EVERYTHING = ("full", "quant")
"""Our policies without a budget, listed here so that a run can be planned without importing them; a test compares this
with ``takes_budget`` of every class."""


@dataclass(frozen=True)
class PolicyChoice:
    """The policy of a cell.

    Args:
        spec: the parsed text.
        yardstick: the other library's cache or engine, with its parameters; None for our own policies.
    """

    spec: Spec
    yardstick: Yardstick | None = None

    def __str__(self) -> str:
        return str(self.spec)

    @property
    def takes_budget(self) -> bool:
        """Whether the policy is run once for each budget of a suite."""
        return any(_takes_budget(part) for part in self.spec.parts)

    @property
    def protects_prompt(self) -> bool:
        """Whether the whole prompt stays and the budget is over generated tokens
        (:mod:`d2obench.policies.protect`)."""
        return any(part.params.get("protect") == "prompt" for part in self.spec.parts)

    @cached_property
    def policy(self) -> Policy:
        """Our policy with its parameters set and checked.

        Raises:
            PolicyError: the choice is a yardstick, or a parameter is unknown or out of its range.
        """
        if self.yardstick is not None:
            raise _stands_alone(self.spec.parts[0])
        policies = [_build(part, self.spec) for part in self.spec.parts]
        if len(policies) == 1:
            return policies[0]
        return dataclasses.replace(policies[0], bits=policies[1].bits)

    @property
    def carries_over(self) -> bool:
        """Whether one prompt changes the next one; only a parameter can make a policy do so."""
        return self.yardstick is None and any(part.params for part in self.spec.parts) and self.policy.carries_over

    @property
    def files(self) -> tuple[str, ...]:
        """Files that its parameters name, whose content the results depend on."""
        ours = self.yardstick is None and any(part.params for part in self.spec.parts)
        return self.policy.files if ours else ()

    @property
    def built(self) -> Policy | Yardstick:
        """The policy or the yardstick, whichever it is."""
        return self.policy if self.yardstick is None else self.yardstick

    def check(self) -> None:
        """Checks all parameters. A built-in policy without parameters needs no check and is not imported.

        Raises:
            PolicyError: as :attr:`policy`.
        """
        if self.yardstick is None and any(part.params or part.name not in REGISTRY.builtin for part in self.spec.parts):
            self.policy  # noqa: B018 - building is the check


@lru_cache(maxsize=256)
def parse_choice(text: str) -> PolicyChoice:
    """Parses a policy or a yardstick as it is written on the command line or in a suite.

    Raises:
        UsageError: the text does not follow the grammar.
        PolicyError: an unknown name, parts that can't be joined with ``+``, or an invalid parameter of a yardstick.
            Invalid parameters of our own policies are found later, by :meth:`PolicyChoice.check`.
    """
    spec = parse_spec(text)
    kinds = [_external(part) for part in spec.parts]
    first = spec.parts[0]
    if len(kinds) == 1 and (kind := kinds[0]) is not None:
        return PolicyChoice(spec, _yardstick(kind, first, spec))
    for part, kind in zip(spec.parts, kinds, strict=True):
        if kind is not None:
            raise _stands_alone(part)
    names = [part.name for part in spec.parts]
    for name in names:
        REGISTRY.check(name)
    if len(names) > 2 or (len(names) == 2 and (names[1] != "quant" or names[0] == "quant")):
        raise PolicyError(f"'{text}' combines policies that don't go together", remedy="write POLICY+quant(bits=4)")
    return PolicyChoice(spec)


def parse_policy(text: str) -> Policy:
    """Our policy that ``text`` names, with its parameters set and checked.

    Raises:
        UsageError, PolicyError: as :func:`parse_choice` and :attr:`PolicyChoice.policy`.
    """
    return parse_choice(text).policy


def own_policies() -> list[str]:
    """Names of the policies that run on our own cache, that is, all except yardsticks."""
    return [name for name in REGISTRY.names() if _external(Part(name)) is None]


def _takes_budget(part: Part) -> bool:
    kind = _external(part)
    if kind is not None:
        return kind.takes_budget
    if part.name in REGISTRY.builtin:
        return part.name not in KEEPS_EVERYTHING
    return bool(REGISTRY.get(part.name).takes_budget)


def _external(part: Part) -> type[Yardstick] | None:
    """The class of a yardstick; None if the name is one of our policies or unknown."""
    name, colon, _ = part.name.partition(":")
    if REGISTRY.builtin.get(name, "").startswith(Yardstick.__module__):
        kind = REGISTRY.get(name)
        return kind if kind.methods or not colon else None
    if part.name in REGISTRY.builtin or part.name not in REGISTRY.plugins():
        return None
    kind = REGISTRY.get(part.name)
    return kind if isinstance(kind, type) and issubclass(kind, Yardstick) else None


def _yardstick(kind: type[Yardstick], part: Part, spec: Spec) -> Yardstick:
    if kind.methods:
        found: Yardstick = kind(method=part.name.partition(":")[2], params=part.params)  # type: ignore[call-arg]
    else:
        found = _convert(kind, part, spec, part.params)
    found.check()
    return found


def _build(part: Part, spec: Spec) -> Policy:
    kind = REGISTRY.get(part.name)
    params = {**kind.presets.get(str(part.params.get("preset")), {}), **part.params}
    policy: Policy = _convert(kind, part, spec, params)
    policy.check()
    return policy.resolved()


def _convert(kind: Any, part: Part, spec: Spec, params: Mapping[str, Any]) -> Any:
    """Builds an instance of a dataclass of parameters, and checks their types."""
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


def _stands_alone(part: Part) -> PolicyError:
    return PolicyError(f"{part.name} has no policy cache", remedy=f"run it alone, as --policy {part.name}")
