"""Needle in a haystack: sentences put into a generated text at a chosen depth, asked for at its end.

A grid of context lengths and depths (Kamradt 2023). ``needles`` above 1 spreads that many evenly from the depth to the
end of the text and asks for all. Three kinds: a seven-digit ``number``, a ``word``, or a ``sentence`` whose words count
one by one. Contexts beyond what the model's positions reach are left out and named in the details, never run.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from d2obench.errors import UsageError
from d2obench.tasks import words
from d2obench.tasks.answers import normalized
from d2obench.tasks.base import Count, Item
from d2obench.tasks.generate import Generative
from d2obench.tasks.prompts import Example, Limits, fitted, size_by
from d2obench.tasks.text import document

if TYPE_CHECKING:
    from d2obench.models import LoadedModel
    from d2obench.suite.definition import Cell, Quality

Depth = Annotated[float, msgspec.Meta(ge=0, le=1)]
Contexts = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
Depths = Annotated[tuple[Depth, ...], msgspec.Meta(min_length=1)]

ASK = "Read the following text and answer the question at its end.\n\n{text}\n\nQuestion: {question}\nAnswer:"
DEEDS = ("read", "paint", "repair", "bury", "photograph", "polish", "sketch", "weigh")
_BOUNDARY = re.compile(r'(?<=[.!?"]) ')


class Pin(NamedTuple):
    """One needle: ``stub`` and ``gold`` make its sentence."""

    town: str
    stub: str
    gold: str


class Needle(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Needles in a generated haystack, over context × depth: share of them found."""

    contexts: Contexts = (512, 1024, 2048, 4096)
    depths: Depths = (0.1, 0.3, 0.5, 0.7, 0.9)
    needles: Annotated[int, msgspec.Meta(ge=1, le=32)] = 1
    kind: Literal["number", "word", "sentence"] = "number"
    items: Count = 1

    def limits(self) -> Limits:
        """A line that can hold every needle."""
        return Limits(max_new=(32 if self.kind == "sentence" else 16) * self.needles, stop=("\n",))

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The grid, shortest contexts first; ``quality.limit`` counts grid points."""
        fit = self._fitting(loaded)
        grid = [(context, depth, item) for context in fit for depth in self.depths for item in range(self.items)]
        seed = cell.axes.seed
        return [self._example(loaded, *point, seed) for point in (grid[: quality.limit] if quality.limit else grid)]

    def _fitting(self, loaded: LoadedModel) -> list[int]:
        room = loaded.context - self.limits().max_new
        fit = [context for context in self.contexts if context <= room]
        if not fit:
            raise UsageError(
                f"no context of the task needle fits {loaded.name}",
                why=f"it reaches {loaded.context} tokens and the answer takes {self.limits().max_new}",
                remedy=f"use contexts up to {room}, for example needle(contexts=[{room}])",
            )
        return fit

    def _example(self, loaded: LoadedModel, context: int, depth: float, item: int, seed: int) -> Example:
        draw = random.Random(f"d2obench/needle/{seed}/{context}/{depth}/{item}")
        pins = _pins(draw, self.kind, self.needles)
        what = {"number": "secret number", "word": "secret word", "sentence": "best thing to do"}[self.kind]
        places = " and ".join(pin.town for pin in pins)
        question = f"What is the {what} {'in' if self.kind == 'sentence' else 'of'} {places}?"
        stub = f" {pins[0].stub}" if len(pins) == 1 else ""
        gold = f" {pins[0].gold}" if len(pins) == 1 else "".join(f" {pin.stub} {pin.gold}." for pin in pins)
        keep = {"context": context, "depth": depth, "gold": [pin.gold for pin in pins], "kind": self.kind}

        def build(room: int) -> Example | None:
            body = document(draw_seed, room, size_by(loaded), "needle").text
            if not body:
                return None
            text = _planted(body, depth, [f"{pin.stub} {pin.gold}." for pin in pins])
            return Example(f"{context}@{depth:g}#{item}", f"{context}@{depth:g}#{item}",
                           ASK.format(text=text, question=question), stub, (gold,), keep)  # fmt: skip

        draw_seed = draw.randrange(2**31)
        return fitted(loaded, self.limits(), context, build)

    def marks(self, item: Item) -> dict[str, float]:
        """Share of the needles in the answer; of the words of a sentence."""
        shares = [_share(item["text"], gold, item["kind"]) for gold in item["gold"]]
        return {"score": sum(shares) / len(shares)}

    def details(self, items: Sequence[Item]) -> dict[str, Any]:
        """The heatmap: mean score by context and depth, and contexts that were left out."""
        cells: dict[tuple[int, float], list[float]] = {}
        for item in items:
            cells.setdefault((item["context"], item["depth"]), []).append(item["score"])
        grid = [
            {"context": context, "depth": depth, "score": sum(scores) / len(scores), "n": len(scores)}
            for (context, depth), scores in cells.items()
        ]
        run = {context for context, _ in cells}
        return {**super().details(items), "grid": grid, "left_out": [c for c in self.contexts if c not in run]}


def _pins(draw: random.Random, kind: str, count: int) -> list[Pin]:
    towns = draw.sample([head + tail for head in words.TOWN_HEADS for tail in words.TOWN_TAILS], count)
    secrets = draw.sample(words.PETS, count)
    pins = []
    for town, secret in zip(towns, secrets, strict=True):
        if kind == "number":
            pins.append(Pin(town, f"The secret number of {town} is", str(draw.randint(1_000_000, 9_999_999))))
        elif kind == "word":
            pins.append(Pin(town, f"The secret word of {town} is", secret.lower()))
        else:
            thing = f"{draw.choice(words.ADJECTIVES)} {draw.choice(words.THINGS)}"
            deed = f"{draw.choice(DEEDS)} the {thing} behind the {draw.choice(words.PLACES)} on a {draw.choice(DAYS)}"
            pins.append(Pin(town, f"The best thing to do in {town} is to", deed))
    return pins


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _planted(text: str, depth: float, sentences: Sequence[str]) -> str:
    """``sentences`` between those of ``text``: the first at ``depth``, the others evenly from there to the end."""
    gaps = [match.start() for match in _BOUNDARY.finditer(text)] or [len(text)]
    wanted = [depth + (1 - depth) * i / len(sentences) for i in range(len(sentences))]
    places = [min(gaps, key=lambda gap, at=at: abs(gap - at * len(text))) for at in wanted]  # type: ignore[misc]
    for place, sentence in reversed([*zip(places, sentences, strict=True)]):
        text = f"{text[:place]} {sentence}{text[place:]}"
    return text


def _share(text: str, gold: str, kind: str) -> float:
    """1 where the number or word stands whole in ``text``; for a sentence the share of its own words that do."""
    if kind == "number":
        text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    if kind != "sentence":
        return float(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text, re.IGNORECASE) is not None)
    said = set(normalized(text).split())
    wanted = [word for word in normalized(gold).split() if word not in ("behind", "on")]
    return sum(word in said for word in wanted) / len(wanted)
