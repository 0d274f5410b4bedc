"""Long generated texts: seeded English prose with recurring people, and facts that can be asked for.

Fidelity, recall and needle need long readable documents and no network. A :class:`Writer` tells of a growing cast in a
small country. Everyone has a town, a trade and a year of birth. These facts are repeated when the person returns after
a long absence, so predicting the text needs the far past. Everyone also has one fact (a pet's name, a house number, a
debt) that is stated once and never again: the recall task asks for it. Sentences are made from the patterns of
:mod:`d2obench.texts.lexicon`; a pattern is not used again before many others were.

The same seed gives the same text on every platform: Python specifies ``random.Random`` seeded by a string.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from d2obench.texts import lexicon

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")


@dataclass(frozen=True)
class Fact:
    """Something stated once in a text.

    Args:
        question: a question whose answer it is.
        stub: the beginning of a sentence that ``answer`` completes.
        answer: one word or number.
        at: the position in the text where its sentence begins, in characters.
    """

    question: str
    stub: str
    answer: str
    at: int = 0


@dataclass(frozen=True)
class Document:
    """A text of whole sentences, and the facts that it states once, in order."""

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
    """A sentence, the white space before it (``gap``), and the fact in it that is stated only once, if any."""

    text: str
    gap: str = " "
    fact: Fact | None = None


@dataclass
class Writer:
    """Writes an endless text. Every task passes a ``theme`` of its own, so that the same seed gives it another text."""

    seed: int
    theme: str = "text"
    paragraphs: int = 0
    cast: list[Person] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"d2obench/{self.theme}/{self.seed}")
        self._used: deque[str] = deque(maxlen=24)
        self._names: set[str] = set()
        self._mentioned: dict[str, list[str]] = {}
        self._towns = [self._town() for _ in range(12)]

    def sentences(self) -> Iterator[Sentence]:
        """Sentences without end."""
        while True:
            yield from self._paragraph()

    def _paragraph(self) -> Iterator[Sentence]:
        draw = self.random
        # 1. The two people, and a heading before every ninth paragraph.
        person, new = self._lead()
        other = draw.choice([p for p in self.cast if p is not person])
        gap = "\n\n" if self.paragraphs else ""
        if self.paragraphs % 9 == 8:
            heading = self._fill(draw.choice(lexicon.HEADINGS), person, other)
            yield Sentence(heading[0].upper() + heading[1:], gap)
        # 2. Since when the person was absent: it decides whether the paragraph tells of a return.
        absent, person.seen = self.paragraphs - person.seen, self.paragraphs
        other.seen = max(other.seen, self.paragraphs - 2)
        self.paragraphs += 1
        # 3. An opening sentence, then three to six others; after an introduction, the fact that is stated once.
        returns = not new and (absent > 3 or draw.random() < 0.2)
        opening = lexicon.INTRODUCTIONS if new else lexicon.RETURNS if returns else lexicon.OPENINGS
        kinds = draw.choices((lexicon.ACTIONS, lexicon.SPEECH, lexicon.THOUGHTS), (14, 3, 2), k=draw.randint(3, 6))
        for i, patterns in enumerate([opening, *kinds]):
            yield Sentence(self._sentence(patterns, person, other), " " if i else gap)
            if new and i == 0:
                yield self._once_stated(person)

    def _lead(self) -> tuple[Person, bool]:
        """The person that a paragraph is about, and whether that person is new.

        New people become rarer as the cast grows. Half of the other paragraphs are about someone who was absent for
        long.
        """
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
            first, last = draw.choice(lexicon.WOMEN if woman else lexicon.MEN), draw.choice(lexicon.SURNAMES)
            name = f"{first} {last}"
            if len(self._names) >= 3000:
                name += f" the {len(self._names)}th"
        self._names.add(name)
        self._towns.append(self._town())
        trade, born = draw.choice(lexicon.TRADES), draw.randint(1841, 1889)
        return Person(first, name[len(first) + 1 :], woman, self._towns[-1], trade, born)

    def _once_stated(self, person: Person) -> Sentence:
        draw, name = self.random, person.name
        kind = draw.randrange(3)
        if kind == 0:
            beast, answer = draw.choice(lexicon.BEASTS), draw.choice(lexicon.PETS)
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
            pattern = _CHOICE.sub(lambda match: draw.choice(match[1].split("|")), pattern)
        known = {
            "p": person.name, "n": person.first, "home": person.home, "job": person.job, "born": str(person.born),
            "q": other.name, "m": other.first, "home2": other.home, "job2": other.job,
            "he": "she" if person.woman else "he", "his": "her" if person.woman else "his",
            "him": "her" if person.woman else "him",
        }  # fmt: skip
        text = _SLOT.sub(lambda match: known.get(match[1]) or self._draw(match[1]), pattern)
        return _ARTICLE.sub(r"\1n ", text)

    def _draw(self, slot: str) -> str:
        """A value for a slot. Places, towns and things are mostly ones that were mentioned, lately or long ago."""
        draw, mentioned = self.random, self._mentioned.setdefault(slot, [])
        if slot in ("place", "town", "thing", "goods") and mentioned:
            chance = draw.random()
            if chance < 0.7:
                return draw.choice(mentioned[-2:] if chance < 0.5 else mentioned)
        value = self._new(slot)
        mentioned.append(value)
        return value

    def _new(self, slot: str) -> str:
        draw = self.random
        match slot:
            case "town":
                return draw.choice(self._towns)
            case "thing":
                quality = draw.choice(lexicon.ADJECTIVES) + " " if draw.random() < 0.6 else ""
                return quality + draw.choice(lexicon.THINGS)
            case "day":
                return str(draw.randint(1, 28))
            case "year":
                return str(draw.randint(1862, 1931))
            case "many":
                return str(draw.randint(13, 96))
            case "sum":
                return str(draw.choice((5, 10, 25)) * draw.randint(3, 48))
            case _:
                lists = {"place": lexicon.PLACES, "goods": lexicon.GOODS, "food": lexicon.FOOD, "when": lexicon.WHEN,
                         "month": lexicon.MONTHS, "few": lexicon.FEW}  # fmt: skip
                return draw.choice(lists[slot])

    def _town(self) -> str:
        return self.random.choice(lexicon.TOWN_HEADS) + self.random.choice(lexicon.TOWN_TAILS)


def document(seed: int, tokens: int, count: Callable[[str], int], theme: str = "text") -> Document:
    """The longest beginning of a writer's text, in whole sentences, that has at most ``tokens`` tokens.

    Args:
        seed: which text.
        tokens: the largest number of tokens.
        count: a function from a text to its number of tokens.
        theme: see :class:`Writer`.
    """
    parts: list[Sentence] = []
    size, stream = 0, Writer(seed, theme).sentences()
    while size <= tokens:
        parts.append(next(stream))
        size += count(parts[-1].gap + parts[-1].text)
    # A tokenizer can need more tokens for the whole than for its sentences one by one, so trim against the whole.
    while parts and count(_joined(parts)) > tokens:
        parts.pop()
    facts, at = [], 0
    for part in parts:
        if part.fact:
            facts.append(Fact(part.fact.question, part.fact.stub, part.fact.answer, at + len(part.gap)))
        at += len(part.gap) + len(part.text)
    return Document(_joined(parts), tuple(facts))


def document_seed(seed: int, index: int) -> int:
    """The seed of a task's document ``index`` in a cell with ``seed``; no two cells share one."""
    return seed * 1_000_003 + index


def token_ids(seed: int, tokens: int, encode: Callable[[str], list[int]], theme: str = "text") -> list[int]:
    """The first ``tokens`` token ids of a writer's text; the end may fall within a sentence."""
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
