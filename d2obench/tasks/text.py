"""The project's own long texts: English prose, seeded, with a cast that comes back and facts one can ask for.

Fidelity, recall and needle need long readable documents and no network. A :class:`Writer` tells of a growing cast in
a small country: everyone has a town, a trade and a year of birth (loud facts, restated when the person returns after
a long absence, so that predicting the text needs the far past) and one quiet fact (a pet's name, a house number, a
debt) that is stated once and never again: the recall task asks for it. Sentences come from the patterns of
:mod:`d2obench.tasks.words`; a pattern is not used again before many others were.

The same seed gives the same text on every platform: ``random.Random`` seeded by a string is specified.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from d2obench.tasks import words

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")


@dataclass(frozen=True)
class Fact:
    """Something stated once in a text.

    Args:
        question: asks for it.
        stub: the beginning of a sentence that ``answer`` ends; the question in the form of a cloze.
        answer: one word or number.
        at: where in the text its sentence begins, in characters.
    """

    question: str
    stub: str
    answer: str
    at: int = 0


@dataclass(frozen=True)
class Document:
    """A text of whole sentences and the quiet facts in it, in order."""

    text: str
    facts: tuple[Fact, ...]


@dataclass
class Person:
    """One of the cast."""

    first: str
    last: str
    woman: bool
    home: str
    job: str
    born: int
    seen: int = 0

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"


@dataclass
class Sentence:
    """``text``, with what separates it from the sentence before, and the fact it states, if any."""

    text: str
    gap: str = " "
    fact: Fact | None = None


@dataclass
class Writer:
    """An endless text. ``theme`` keeps apart what different tasks draw from one seed."""

    seed: int
    theme: str = "text"
    paragraphs: int = 0
    cast: list[Person] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"d2obench/{self.theme}/{self.seed}")
        self._used: deque[str] = deque(maxlen=24)
        self._names: set[str] = set()
        self._said: dict[str, list[str]] = {}
        self._towns = [self._town() for _ in range(12)]

    def sentences(self) -> Iterator[Sentence]:
        """Sentences without end."""
        while True:
            yield from self._paragraph()

    def _paragraph(self) -> Iterator[Sentence]:
        draw = self.random
        person, new = self._lead()
        other = draw.choice([p for p in self.cast if p is not person])
        gap = "\n\n" if self.paragraphs else ""
        if self.paragraphs % 9 == 8:
            heading = self._fill(draw.choice(words.HEADINGS), person, other)
            yield Sentence(heading[0].upper() + heading[1:], gap)
        absent, person.seen = self.paragraphs - person.seen, self.paragraphs
        other.seen = max(other.seen, self.paragraphs - 2)
        self.paragraphs += 1
        plan = [words.INTRODUCTIONS if new else words.RETURNS if absent > 3 or draw.random() < 0.2 else words.OPENINGS]
        kinds = draw.choices((words.ACTIONS, words.SPEECH, words.THOUGHTS), (14, 3, 2), k=draw.randint(3, 6))
        for i, patterns in enumerate([*plan, *kinds]):
            yield Sentence(self._sentence(patterns, person, other), " " if i else gap)
            if new and i == 0:
                yield self._quiet(person)

    def _lead(self) -> tuple[Person, bool]:
        """Whom the paragraph is about: a newcomer, ever more rarely, or mostly who was away longest."""
        draw = self.random
        while len(self.cast) < 2 or draw.random() < 3 / (3 + len(self.cast)):
            self.cast.append(self._person())
            if len(self.cast) > 1:
                return self.cast[-1], True
        if draw.random() < 0.5:
            return min(draw.sample(self.cast, min(4, len(self.cast))), key=lambda p: p.seen), False
        return draw.choice(self.cast), False

    def _person(self) -> Person:
        draw, name = self.random, ""
        while not name or name in self._names:
            woman = draw.random() < 0.5
            first, last = draw.choice(words.WOMEN if woman else words.MEN), draw.choice(words.SURNAMES)
            name = f"{first} {last}"
            if len(self._names) >= 3000:
                name += f" the {len(self._names)}th"
        self._names.add(name)
        self._towns.append(self._town())
        trade, born = draw.choice(words.TRADES), draw.randint(1841, 1889)
        return Person(first, name[len(first) + 1 :], woman, self._towns[-1], trade, born)

    def _quiet(self, person: Person) -> Sentence:
        draw, name = self.random, person.name
        kind = draw.randrange(3)
        if kind == 0:
            beast, answer = draw.choice(words.BEASTS), draw.choice(words.PETS)
            stub, question = f"{name} kept a {beast} called", f"What was the name of the {beast} that {name} kept?"
        elif kind == 1:
            answer = str(draw.randint(102, 989))
            stub, question = f"{name} lived in house number", f"What was the number of the house in which {name} lived?"
        else:
            answer = str(draw.randint(1021, 9879))
            stub, question = f"The debt of {name} in crowns was", f"How many crowns was the debt of {name}?"
        return Sentence(f"{stub} {answer}.", " ", Fact(question, stub, answer))

    def _sentence(self, patterns: tuple[str, ...], person: Person, other: Person) -> str:
        fresh = [pattern for pattern in patterns if pattern not in self._used]
        pattern = self.random.choice(fresh or patterns)
        self._used.append(pattern)
        text = self._fill(pattern, person, other)
        return text if text[0] == '"' else text[0].upper() + text[1:]

    def _fill(self, pattern: str, person: Person, other: Person) -> str:
        draw = self.random
        while _CHOICE.search(pattern):
            pattern = _CHOICE.sub(lambda found: draw.choice(found[1].split("|")), pattern)
        known = {
            "p": person.name, "n": person.first, "home": person.home, "job": person.job, "born": str(person.born),
            "q": other.name, "m": other.first, "home2": other.home, "job2": other.job,
            "he": "she" if person.woman else "he", "his": "her" if person.woman else "his",
            "him": "her" if person.woman else "him",
        }  # fmt: skip
        text = _SLOT.sub(lambda found: known.get(found[1]) or self._draw(found[1]), pattern)
        return _ARTICLE.sub(r"\1n ", text)

    def _draw(self, slot: str) -> str:
        """A value for a slot; places, towns and things are mostly ones that were spoken of, lately or long ago."""
        draw, said = self.random, self._said.setdefault(slot, [])
        if slot in ("place", "town", "thing", "goods") and said:
            chance = draw.random()
            if chance < 0.7:
                return draw.choice(said[-2:] if chance < 0.5 else said)
        value = self._new(slot)
        said.append(value)
        return value

    def _new(self, slot: str) -> str:
        draw = self.random
        match slot:
            case "town":
                return draw.choice(self._towns)
            case "thing":
                quality = draw.choice(words.ADJECTIVES) + " " if draw.random() < 0.6 else ""
                return quality + draw.choice(words.THINGS)
            case "day":
                return str(draw.randint(1, 28))
            case "year":
                return str(draw.randint(1862, 1931))
            case "many":
                return str(draw.randint(13, 96))
            case "sum":
                return str(draw.choice((5, 10, 25)) * draw.randint(3, 48))
            case _:
                lists = {"place": words.PLACES, "goods": words.GOODS, "food": words.FOOD, "when": words.WHEN,
                         "month": words.MONTHS, "few": words.FEW}  # fmt: skip
                return draw.choice(lists[slot])

    def _town(self) -> str:
        return self.random.choice(words.TOWN_HEADS) + self.random.choice(words.TOWN_TAILS)


def document(seed: int, tokens: int, count: Callable[[str], int], theme: str = "text") -> Document:
    """The longest beginning of a writer's text, in whole sentences, that ``count`` holds to be at most ``tokens`` long.

    Args:
        seed: which text.
        tokens: upper bound of its length.
        count: text → its number of tokens.
        theme: see :class:`Writer`.
    """
    parts: list[Sentence] = []
    size, stream = 0, Writer(seed, theme).sentences()
    while size <= tokens:
        parts.append(next(stream))
        size += count(parts[-1].gap + parts[-1].text)
    # Sentence by sentence a tokenizer can count otherwise than over the whole: trim against the whole.
    while parts and count(_joined(parts)) > tokens:
        parts.pop()
    facts, at = [], 0
    for part in parts:
        if part.fact:
            facts.append(Fact(part.fact.question, part.fact.stub, part.fact.answer, at + len(part.gap)))
        at += len(part.gap) + len(part.text)
    return Document(_joined(parts), tuple(facts))


def token_ids(seed: int, tokens: int, encode: Callable[[str], list[int]], theme: str = "text") -> list[int]:
    """Exactly ``tokens`` token ids of a writer's text, cut wherever that falls."""
    stream, parts, size = Writer(seed, theme).sentences(), [], 0
    while True:
        while size <= tokens * 8:
            part = next(stream)
            parts.append(part)
            size += len(part.gap) + len(part.text)
        ids = encode(_joined(parts))
        if len(ids) >= tokens:
            return ids[:tokens]
        size -= tokens * 4


def _joined(parts: list[Sentence]) -> str:
    return "".join(part.gap + part.text for part in parts)
