"""How the values of the axes are written: ``name(key=value)+name``, budgets, shapes, batches, lists and ranges.

One grammar for policies and tasks::

    spec   = part ("+" part)*           d2o(merge=values)+quant(bits=4)
    part   = name ["(" key=value, … ")"]
    value  = int | float | true | false | none | word | [value, …]

A budget is a ratio of the prompt when it has a point or an exponent (``0.2``), and a count of tokens per
layer when it is a whole number (``512``). A shape is ``prompt+gen``; each side may be a range,
``512..8192*2`` (geometric), or, for the prompt, ``512..2048+512`` (steps).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from d2obench.errors import UsageError

_NAME = re.compile(r"[A-Za-z][\w./:-]*")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:([*+])(\d+))?")
_BOUND = re.compile(r"(≤|<=|≥|>=)\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(\S*)")
_UNITS = {
    "s": {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "us": 1e-6},
    "bytes": {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "": {"%": 0.01, "points": 0.01, "×": 1.0, "x": 1.0},
}
"""Units in which a bound can be written, by the unit that the metric is recorded in: name → recorded units."""
MAX_LIST = 10_000
LEAST_S = 30.0
"""The shortest time a run can be planned into."""


@dataclass(frozen=True)
class Part:
    """One ``name(key=value, …)``."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.params:
            return self.name
        return f"{self.name}({','.join(f'{k}={show_value(v)}' for k, v in self.params.items())})"


@dataclass(frozen=True)
class Spec:
    """A policy or task as it is written: parts joined by ``+``."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)


@dataclass(frozen=True)
class Budget:
    """What a policy may keep of a prompt: a ``ratio`` of it, or a count of ``tokens`` per layer. Exactly one is set."""

    ratio: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return str(self.tokens) if self.ratio is None else f"{self.ratio:g}" if self.ratio < 1 else f"{self.ratio:.1f}"

    def of(self, prompt: int) -> int:
        """Tokens a layer may hold on average for a prompt of ``prompt`` tokens; at least 1, at most ``prompt``
        for a ratio."""
        if self.tokens is not None:
            return self.tokens
        assert self.ratio is not None
        return max(1, min(prompt, round(self.ratio * prompt)))


@dataclass(frozen=True)
class Shape:
    """``prompt`` tokens read, ``gen`` tokens written, per sequence."""

    prompt: int
    gen: int

    def __str__(self) -> str:
        return f"{self.prompt}+{self.gen}"


def split_list(text: str) -> list[str]:
    """Splits at the commas outside brackets; empty items are an error."""
    items, depth, start = [], 0, 0
    for i, char in enumerate(text + ","):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            items.append(text[start:i].strip())
            start = i + 1
    if depth or not all(items):
        raise UsageError(f"can't read the list '{text}'", remedy="separate the items with single commas")
    return items


def parse_spec(text: str, what: str = "policy") -> Spec:
    """Reads ``name(key=value)+…``; ``what`` names the axis in the error."""
    parts, rest = [], text.strip()
    while True:
        match = _NAME.match(rest)
        if not match:
            raise UsageError(f"can't read the {what} '{text}'", remedy=f"write it as {what}(key=value,…)")
        name, rest, params = match.group(), rest[match.end() :], {}
        if rest.startswith("("):
            body, rest = _bracketed(rest, text, what)
            params = dict(_pair(item, text, what) for item in split_list(body)) if body.strip() else {}
        parts.append(Part(name, params))
        if not rest:
            return Spec(tuple(parts))
        if not rest.startswith("+"):
            raise UsageError(f"can't read the {what} '{text}'", why=f"'{rest}' is left over", remedy="join parts by +")
        rest = rest[1:]


def parse_budget(value: str | float | int) -> Budget:
    """``0.2`` or ``"0.2"`` is a ratio, ``512`` or ``"512"`` a count of tokens."""
    remedy = "use a ratio in (0, 1] such as 0.2, or a whole number of tokens such as 512"
    text = str(value).strip()
    try:
        if isinstance(value, bool):
            raise ValueError
        budget = Budget(tokens=int(text)) if re.fullmatch(r"[+-]?\d+", text) else Budget(ratio=float(text))
    except ValueError:
        raise UsageError(f"can't read the budget '{text}'", remedy=remedy) from None
    if budget.tokens is not None and budget.tokens < 1:
        raise UsageError(f"budget {text} is out of range", remedy=remedy)
    if budget.ratio is not None and not 0 < budget.ratio <= 1:
        raise UsageError(f"budget {text} is out of range", remedy=remedy)
    return budget


def parse_numbers(text: str, what: str = "batch") -> list[int]:
    """``8``, ``1..64*2`` or ``512..2048+512`` as a list of whole numbers."""
    text = text.strip()
    if text.isdecimal() and int(text) > 0:
        return [int(text)]
    match = _RANGE.fullmatch(text)
    if not match or not match[3]:
        raise UsageError(
            f"can't read the {what} '{text}'",
            remedy="use a whole number above 0, or a range as 1..64*2 or 512..2048+512",
        )
    low, high, step = int(match[1]), int(match[2]), int(match[4])
    if low < 1 or high < low or step < (2 if match[3] == "*" else 1) or (high - low) // step > MAX_LIST:
        raise UsageError(f"the range '{text}' is empty or endless", remedy="use low..high*factor or low..high+step")
    numbers = []
    while low <= high:
        numbers.append(low)
        low = low * step if match[3] == "*" else low + step
    return numbers


def parse_batch(text: int | str) -> list[int | Literal["max"]]:
    """``8``, ``max`` or ``1..64*2`` as the batches it stands for."""
    return ["max"] if text == "max" else [*parse_numbers(str(text))]


def parse_shape(text: str) -> list[Shape]:
    """``2048+8192``, ``512..8192*2+64`` or ``512..2048+512+64`` as the shapes it stands for."""
    prompt, plus, gen = text.strip().rpartition("+")
    span = _RANGE.fullmatch(prompt)
    if not plus or (".." in prompt and not (span and span[3])):
        raise UsageError(
            f"can't read the shape '{text}'",
            remedy="write prompt+gen as 2048+8192; ranges as 512..8192*2+64 or 512..2048+512+64",
        )
    return [Shape(p, g) for p in parse_numbers(prompt, "shape") for g in parse_numbers(gen, "shape")]


def parse_memory(text: str, whole: int) -> int:
    """Bytes of ``24GiB``, ``500MB`` or a share of ``whole`` such as ``0.5``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?", text.strip())
    number = float(match[1]) if match else 0.0
    if not match or number <= 0 or (not match[2] and number > 1):
        raise UsageError(
            f"can't read the memory limit '{text}'", remedy="use a size such as 24GiB, or a share such as 0.5"
        )
    if not match[2]:
        return int(number * whole)
    return int(number * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2])))


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``10m`` or ``2h``; at least :data:`LEAST_S`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not match:
        raise UsageError(f"can't read the time '{text}'", remedy="use a number with s, m or h: 90s, 10m or 2h")
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    if seconds < LEAST_S:
        raise UsageError(
            f"the time '{text}' is too short",
            why=f"loading a model and measuring anything takes longer than {seconds:g} s",
            remedy=f"use {LEAST_S:g}s or more",
        )
    return seconds


def show_duration(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bracketed(rest: str, text: str, what: str) -> tuple[str, str]:
    depth = 0
    for i, char in enumerate(rest):
        depth += (char in "([") - (char in ")]")
        if depth == 0:
            return rest[1:i], rest[i + 1 :]
    raise UsageError(f"can't read the {what} '{text}'", remedy="close the bracket")


def _pair(item: str, text: str, what: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip().isidentifier():
        raise UsageError(f"can't read '{item}' in the {what} '{text}'", remedy="write parameters as key=value")
    return key.strip(), _value(value.strip())


def parse_pairs(items: Iterable[str], what: str) -> dict[str, Any]:
    """``key=value`` each, as in the brackets of a policy; ``what`` they belong to is named in the error."""
    return dict(_pair(item, what, "list") for item in items)


def _value(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return [_value(item) for item in split_list(text[1:-1])] if text[1:-1].strip() else []
    constant = {"true": True, "false": False, "none": None}
    if text.lower() in constant:
        return constant[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def show_value(value: Any) -> str:
    """A parameter's value as the grammar reads it."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(show_value(v) for v in value) + "]"
    return (
        {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def parse_bound(text: str, recorded: str, shown: str = "") -> tuple[float | None, float | None]:
    """A bound of a figure: ``≤ 60 ms`` → (None, 0.06), ``≥ 90 %`` → (0.9, None); ``<=`` and ``>=`` are read as well.

    Args:
        text: as it is written.
        recorded: the unit in which the metric is recorded, and which counts if the text names none.
        shown: the unit in which the metric is shown, if one of them is one of the other.

    Raises:
        UsageError: it has another form, or another unit.
    """
    match = _BOUND.fullmatch(text.strip())
    units = {recorded: 1.0, "": 1.0} | _UNITS.get(recorded, {shown: 1.0})
    if match is None or match[3] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise UsageError(
            f"can't read the bound '{text}'",
            remedy=f'write it as "≤ 0.3"{f", or with one of the units {known}" if known else ""}',
        )
    value = float(match[2]) * units[match[3]]
    return (None, value) if match[1] in ("≤", "<=") else (value, None)
