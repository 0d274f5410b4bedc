"""Needle in a haystack: sentences put into a generated text at a chosen depth and asked for at its end.

The grid of context lengths and depths is Kamradt's (2023). With ``needles`` above 1, that many are spread evenly from
the depth to the end of the text, and all are asked for: together in one question, or with ``ask=each`` in a question
for each. There are three kinds of needle: a seven-digit ``number``, a
``word``, or a ``sentence``, whose score is the share of its words in the answer. Contexts that are longer than the
model's positions are not run; the details name them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from d2obench.errors import UsageError
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, Count, Item, Quality, Work, at_most
from d2obench.tasks.generate import Questions
from d2obench.tasks.prompts import Example, Limits, fitted, token_counter
from d2obench.tasks.scoring import normalized
from d2obench.texts import lexicon
from d2obench.texts.writer import document

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

Depth = Annotated[float, msgspec.Meta(ge=0, le=1)]
Contexts = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
Depths = Annotated[tuple[Depth, ...], msgspec.Meta(min_length=1)]

TEXT = "Read the following text and answer the question at its end.\n\n{text}"
QUESTION = "\n\nQuestion: {question}\nAnswer:"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DEEDS = ("read", "paint", "repair", "bury", "photograph", "polish", "sketch", "weigh")
_BOUNDARY = re.compile(r'(?<=[.!?"]) ')


class NeedleFact(NamedTuple):
    """One needle; ``stub`` and ``gold`` make its sentence."""

    town: str
    stub: str
    gold: str


class Needle(Questions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Needles in a generated haystack, over context × depth: the share that is found."""

    contexts: Contexts = (512, 1024, 2048, 4096)
    depths: Depths = (0.1, 0.3, 0.5, 0.7, 0.9)
    needles: Annotated[int, msgspec.Meta(ge=1, le=32)] = 1
    kind: Literal["number", "word", "sentence"] = "number"
    items: Count = 1
    ask: Literal["together", "each"] = "together"

    def limits(self) -> Limits:
        """One line, long enough for every needle that a question asks for."""
        asked = self.needles if self.ask == "together" else 1
        return Limits(max_new=(32 if self.kind == "sentence" else 16) * asked, stop=("\n",))

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The grid, shortest contexts first; ``quality.limit`` counts grid points."""
        fit = self._contexts_that_fit(loaded)
        grid = [(context, depth, item) for context in fit for depth in self.depths for item in range(self.items)]
        seed = cell.axes.seed
        points = grid[: quality.limit] if quality.limit else grid
        return [example for point in points for example in self._examples(loaded, *point, seed)]

    def _contexts_that_fit(self, loaded: LoadedModel) -> list[int]:
        longest = loaded.context - self.limits().max_new
        fit = [context for context in self.contexts if context <= longest]
        if not fit:
            raise UsageError(
                f"no context of the task needle fits {loaded.name}",
                why=f"it reaches {loaded.context} tokens and the answer takes {self.limits().max_new}",
                remedy=f"use contexts up to {longest}, for example needle(contexts=[{longest}])",
            )
        return fit

    def _examples(self, loaded: LoadedModel, context: int, depth: float, item: int, seed: int) -> list[Example]:
        """The questions of one point of the grid, which share a text: one, or one for each needle."""
        draw = random.Random(f"d2obench/needle/{seed}/{context}/{depth}/{item}")
        facts = _facts(draw, self.kind, self.needles)
        sentences = [f"{fact.stub} {fact.gold}." for fact in facts]
        place, draw_seed = f"{context}@{depth:g}#{item}", draw.randrange(2**31)
        rounds = [facts] if self.ask == "together" else [[fact] for fact in facts]
        longest = max(range(len(rounds)), key=lambda number: len(self._question(rounds[number])))

        def asking(text: str, number: int) -> Example:
            asked = rounds[number]
            question = QUESTION.format(question=self._question(asked))
            stub = f" {asked[0].stub}" if len(asked) == 1 else ""
            gold = f" {asked[0].gold}" if len(asked) == 1 else "".join(f" {fact.stub} {fact.gold}." for fact in asked)
            keep = {"context": context, "depth": depth, "gold": [fact.gold for fact in asked], "kind": self.kind}
            name = place if len(rounds) == 1 else f"{place}.{number + 1}"
            return Example(name, place, TEXT.format(text=text) + question, stub, (gold,), keep, question)

        def build(tokens: int) -> Example | None:
            body = document(draw_seed, tokens, token_counter(loaded), "needle").text
            return asking(_planted(body, depth, sentences), longest) if body else None

        text = fitted(loaded, self.limits(), context, build).context.removeprefix(TEXT.format(text=""))
        return [asking(text, number) for number in range(len(rounds))]

    def _question(self, asked: Sequence[NeedleFact]) -> str:
        what = {"number": "secret number", "word": "secret word", "sentence": "best thing to do"}[self.kind]
        places = " and ".join(fact.town for fact in asked)
        return f"What is the {what} {'in' if self.kind == 'sentence' else 'of'} {places}?"

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`Task.work`; the gold answer is scored beside the generated one."""
        new = self.limits().max_new
        fit = [length for length in self.contexts if length + new <= context]
        points = at_most(len(fit) * len(self.depths) * self.items, quality)
        asked = self.needles if self.ask == "each" else 1
        return Work(points * asked, round(fmean(fit)), 2 * new) if fit else None

    def scores(self, item: Item) -> dict[str, float]:
        """The share of the needles in the answer; of a sentence, the share of its words."""
        shares = [_share(item["text"], gold, item["kind"]) for gold in item["gold"]]
        return {"score": sum(shares) / len(shares)}

    def details(self, items: Sequence[Item]) -> dict[str, Any]:
        """The heatmap (mean score by context and depth), and the contexts that were not run."""
        cells: dict[tuple[int, float], list[float]] = {}
        for item in items:
            cells.setdefault((item["context"], item["depth"]), []).append(item["score"])
        grid = [
            {"context": context, "depth": depth, "score": sum(scores) / len(scores), "n": len(scores)}
            for (context, depth), scores in cells.items()
        ]
        done = {context for context, _ in cells}
        return {**super().details(items), "grid": grid, "left_out": [c for c in self.contexts if c not in done]}


def _facts(draw: random.Random, kind: str, count: int) -> list[NeedleFact]:
    towns = draw.sample([head + tail for head in lexicon.TOWN_HEADS for tail in lexicon.TOWN_TAILS], count)
    secrets = draw.sample(lexicon.PETS, count)
    facts = []
    for town, secret in zip(towns, secrets, strict=True):
        if kind == "number":
            facts.append(NeedleFact(town, f"The secret number of {town} is", str(draw.randint(1_000_000, 9_999_999))))
        elif kind == "word":
            facts.append(NeedleFact(town, f"The secret word of {town} is", secret.lower()))
        else:
            thing = f"{draw.choice(lexicon.ADJECTIVES)} {draw.choice(lexicon.THINGS)}"
            deed = f"{draw.choice(DEEDS)} the {thing} behind the {draw.choice(lexicon.PLACES)} on a {draw.choice(DAYS)}"
            facts.append(NeedleFact(town, f"The best thing to do in {town} is to", deed))
    return facts


def _planted(text: str, depth: float, sentences: Sequence[str]) -> str:
    """``text`` with ``sentences`` between its own: the first at ``depth``, the others evenly from there to the end."""
    # 1. The gaps between sentences, by position in the text. 2. The depths that are wanted, from 0 to 1.
    # 3. For each the nearest gap. 4. Insert from the back, so that earlier positions stay valid.
    gaps = [match.start() for match in _BOUNDARY.finditer(text)] or [len(text)]
    wanted = [depth + (1 - depth) * i / len(sentences) for i in range(len(sentences))]
    places = [min(gaps, key=lambda gap, at=at: abs(gap - at * len(text))) for at in wanted]  # type: ignore[misc]
    for place, sentence in reversed([*zip(places, sentences, strict=True)]):
        text = f"{text[:place]} {sentence}{text[place:]}"
    return text


def _share(text: str, gold: str, kind: str) -> float:
    """1 where ``text`` contains the whole number or word; for a sentence the share of its words that it contains."""
    if kind == "number":
        text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    if kind != "sentence":
        return float(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text, re.IGNORECASE) is not None)
    answered = set(normalized(text).split())
    wanted = [word for word in normalized(gold).split() if word not in ("behind", "on")]
    return sum(word in answered for word in wanted) / len(wanted)
