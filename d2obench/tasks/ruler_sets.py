"""The generators of RULER's sets: prompts of any length with the project's own words, and what has to be answered.

Hsieh et al. 2024 (arXiv 2404.06654). Numbers, positions and answers are those of the benchmark; its sentences are
worded anew. A generator fills a prompt with ``units`` (sentences, lines or words, whatever the set's text is made of),
so that the caller can find the number that gives a prompt the wanted length.

=================  ==================================================================================================
niah_single_1      one number, between repeated sentences
niah_single_2, 3   one number, or one code, in prose
niah_multikey_1    one of four numbers of different keys, in prose
niah_multikey_2    one number among lines that state numbers of other keys
niah_multikey_3    the same with codes, for keys and for values
niah_multivalue    four numbers of one key, in prose
niah_multiquery    the numbers of four keys, in prose
vt                 a chain of five variables with one value, between repeated sentences, after an example
cwe                the ten words that appear most often in a list, after an example
fwe                the three words that appear most often, of which the counts fall as Zipf's law says (α = 2)
qa_1, qa_2         a question about one of many paragraphs, from a file (:mod:`d2obench.tasks.ruler_data`)
=================  ==================================================================================================
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from math import pi
from typing import Literal, NamedTuple

from d2obench.texts import lexicon
from d2obench.texts.writer import Writer

Kind = Literal["number", "word", "code"]
NOISE = "The kettle is warm. The lamp is lit. The door is shut. We come in. We go out again."
DEPTHS = [round(100 * i / 39) for i in range(40)]
"""Percentages of a prose's sentences after which a needle may stand."""
OFTEN = 10
"""Number of words of ``cwe`` that are common."""
SHORT = 4096
"""Prompts of ``cwe`` that are shorter repeat their words less often."""
CHARS_A_WORD = 50
"""Tokens of a prompt for each coded word of ``fwe``."""


class Sample(NamedTuple):
    """One prompt.

    Args:
        context: what is read first.
        question: what is asked about it; the prompt is both together.
        prefix: the beginning of the answer, which is given.
        answers: strings that the answer should contain.
    """

    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]


Generator = Callable[[random.Random, int, int], Sample]
"""``(draw, units, length)`` → a prompt with so many units, for prompts of ``length`` tokens."""


class RulerSet(NamedTuple):
    """One set.

    Args:
        max_new: the longest answer.
        least: the smallest number of units.
        generate: makes a prompt; None for a set from a file.
        part: whether one of the answers is enough, or the share of them counts.
    """

    max_new: int
    least: int
    generate: Generator | None
    part: bool = False


def needles(
    text: Literal["noise", "prose", "needles"],
    key: Kind = "word",
    value: Kind = "number",
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Generator:
    """A generator of needles in a haystack.

    Args:
        text: the haystack; ``needles`` is one of other needles.
        key: what a needle is asked for by.
        value: what is asked for.
        keys: number of keys.
        values: number of values of each key.
        queries: number of keys that are asked for.
    """

    def generate(draw: random.Random, units: int, length: int) -> Sample:
        # 1. the needles; keys are all different, those of other needles too
        others = units if text == "needles" else 0
        names = _distinct(draw, key, keys + others)
        known = {name: [_value(draw, value) for _ in range(values)] for name in names[:keys]}
        told = [_needle(value, name, each) for name, every in known.items() for each in every]
        draw.shuffle(told)
        # 2. the haystack
        if text == "prose":
            hidden = _in_prose(draw, units, told)
        else:
            lines = [NOISE] * units
            if text == "needles":
                lines = [_needle(value, name, _value(draw, value)) for name in names[keys:]]
            hidden = "\n".join(_between(draw, lines, told))
        # 3. the question
        asked = draw.sample(names[:keys], queries)
        query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if queries > 1 else asked[0]
        answers = tuple(each for name in asked for each in known[name])
        if len(answers) == 1:
            told_of = f"A special {value} is hidden in the text below. Remember it: you will be asked for it."
            question = f"What is the special {value} of {query} in the text above?"
            prefix = f" The special {value} of {query} in the text is"
        else:
            told_of = f"Some special {value}s are hidden in the text below. Remember them: you will be asked for them."
            question = f"What are all the special {value}s of {query} in the text above?"
            prefix = f" The special {value}s of {query} in the text are"
        return Sample(f"{told_of}\n\n{hidden}", f"\n\n{question}", prefix, answers)

    return generate


def variable_tracking(draw: random.Random, units: int, length: int) -> Sample:
    """A chain of five variables; the first one is assigned a number, each other one the variable before it."""
    shown, sample = _chain(draw, 12, 3), _chain(draw, units, 5)
    example = f"{shown.context}{shown.question}{shown.prefix} {' '.join(shown.answers)}\n\n\n"
    return sample._replace(context=example + sample.context)


def common_words(draw: random.Random, units: int, length: int) -> Sample:
    """A numbered list of ``units`` different words, of which ten appear more often than the others: 30 times and 3
    times, or 6 times and once in short prompts."""
    short = length < SHORT
    shown = _word_list(draw, 20, 3, 1) if short else _word_list(draw, 40, 10, 3)
    sample = _word_list(draw, units, 6, 1) if short else _word_list(draw, units, 30, 3)
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(shown.answers, 1))
    example = f"{shown.context}{shown.question}{shown.prefix} {numbered}\n\n\n"
    return sample._replace(context=example + sample.context)


def frequent_words(draw: random.Random, units: int, length: int) -> Sample:
    """A shuffled text of about ``units`` coded words. The k-th of them appears ``units · k^−2 ÷ ζ(2)`` times; the first
    one is a row of dots, which does not count."""
    coded = _letters(draw, max(10, length // CHARS_A_WORD), 6, string.ascii_lowercase)
    coded[0] = "...."
    counts = [int(units * k**-2 / (pi**2 / 6)) for k in range(1, len(coded) + 1)]
    text = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
    draw.shuffle(text)
    return Sample(
        f"The text below consists of coded words. Keep count of how often each of them appears.\n\n{' '.join(text)}",
        "\n\nQuestion: Which three coded words appear most often in the text above? The dots '....' do not count. Give "
        "no explanation.",
        " Answer: The three coded words that appear most often in the text are:",
        tuple(coded[1:4]),
    )


def among_documents(documents: Sequence[str], question: str, answers: Sequence[str]) -> Sample:
    """A question about one or two of many documents."""
    told = "Answer the question from the documents {}. Give the answer alone, without any other words."
    text = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
    asked = f"\n\n{told.format('above')}\n\nQuestion: {question}"
    return Sample(f"{told.format('below')}\n\n{text}", asked, " Answer:", tuple(answers))


def _chain(draw: random.Random, units: int, letters: int) -> Sample:
    variables = _letters(draw, 5, letters, string.ascii_uppercase)
    value = draw.randrange(10_000, 100_000)
    told = [f"VAR {variables[0]} = {value}"]
    told += [f"VAR {name} = VAR {before}" for before, name in pairwise(variables)]
    places = sorted(draw.sample(range(units), len(told)))
    lines = [NOISE] * units
    for number, (place, assignment) in enumerate(zip(places, told, strict=True)):
        lines.insert(place + number, assignment)
    text = "\n".join(lines)
    return Sample(
        f"Between the sentences below, variables are assigned values. Keep track of them.\n\n{text}",
        f"\n\nQuestion: Which variables in the text above have the value {value}?",
        f" Answer: In the text above, these {len(variables)} variables have the value {value}:",
        tuple(variables),
    )


def _word_list(draw: random.Random, different: int, often: int, seldom: int) -> Sample:
    words = draw.sample(WORDS, min(different, len(WORDS)))
    words += joined_words(draw, different - len(words))
    draw.shuffle(words)
    text = words[:OFTEN] * often + words[OFTEN:] * seldom
    draw.shuffle(text)
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(text, 1))
    told_of = "Below is a numbered list of words. Some of them appear more often than the others. Remember those."
    return Sample(
        f"{told_of}\n\n{numbered}",
        f"\n\nQuestion: Which {OFTEN} words appear most often in the list above?",
        f" Answer: The {OFTEN} words that appear most often in the list are:",
        tuple(words[:OFTEN]),
    )


def joined_words(draw: random.Random, count: int) -> list[str]:
    """``count`` different words such as ``brass-kettle``; they have three parts if two give too few."""
    nouns, adjectives = len(NOUNS), len(lexicon.ADJECTIVES)
    three = count > nouns * adjectives
    found = []
    for number in draw.sample(range(nouns * adjectives * (nouns if three else 1)), count):
        rest, noun = divmod(number, nouns)
        rest, more = divmod(rest, nouns) if three else (rest, None)
        parts = (lexicon.ADJECTIVES[rest], *([] if more is None else [NOUNS[more]]), NOUNS[noun])
        found.append("-".join(parts))
    return found


def _distinct(draw: random.Random, kind: Kind, count: int) -> list[str]:
    """``count`` different keys."""
    if kind == "word":
        return joined_words(draw, count)
    found: dict[str, None] = {}
    while len(found) < count:
        found[_value(draw, kind)] = None
    return list(found)


def _value(draw: random.Random, kind: Kind) -> str:
    if kind == "number":
        return str(draw.randrange(1_000_000, 10_000_000))
    if kind == "code":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return joined_words(draw, 1)[0]


def _needle(kind: Kind, key: str, value: str) -> str:
    return f"One of the special {kind}s of {key} is {value}."


def _in_prose(draw: random.Random, units: int, told: Sequence[str]) -> str:
    """``units`` sentences of a text with the needles between them."""
    written = islice(Writer(draw.randrange(2**31), "ruler").sentences(), units)
    places = sorted(units * depth // 100 for depth in draw.sample(DEPTHS, len(told)))
    waiting = [*zip(places, told, strict=True)]
    parts: list[str] = []
    for at, sentence in enumerate(written):
        while waiting and waiting[0][0] == at:
            parts.append(f" {waiting.pop(0)[1]}")
        parts.append(sentence.gap + sentence.text)
    return "".join([*parts, *(f" {needle}" for _, needle in waiting)]).strip()


def _between(draw: random.Random, lines: list[str], told: Sequence[str]) -> list[str]:
    """The lines with the needles between them, each before a line drawn at random."""
    places = sorted(draw.sample(range(len(lines)), len(told)), reverse=True)
    for place, needle in zip(places, told, strict=True):
        lines.insert(place, needle)
    return lines


def _letters(draw: random.Random, count: int, length: int, alphabet: str) -> list[str]:
    """``count`` different words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choices(alphabet, k=length))] = None
    return list(found)


NOUNS = sorted(
    {
        word.lower()
        for word in (*lexicon.THINGS, *lexicon.GOODS, *lexicon.PLACES, *lexicon.TRADES, *lexicon.BEASTS, *lexicon.PETS)
        if word.isalpha()
    }.difference(lexicon.ADJECTIVES)
)

WORDS = sorted({*NOUNS, *lexicon.ADJECTIVES})

SETS: dict[str, RulerSet] = {
    "niah_single_1": RulerSet(128, 4, needles("noise")),
    "niah_single_2": RulerSet(128, 4, needles("prose")),
    "niah_single_3": RulerSet(128, 4, needles("prose", value="code")),
    "niah_multikey_1": RulerSet(128, 4, needles("prose", keys=4)),
    "niah_multikey_2": RulerSet(128, 4, needles("needles")),
    "niah_multikey_3": RulerSet(128, 4, needles("needles", key="code", value="code")),
    "niah_multivalue": RulerSet(128, 4, needles("prose", values=4)),
    "niah_multiquery": RulerSet(128, 4, needles("prose", keys=4, queries=4)),
    "vt": RulerSet(30, 6, variable_tracking),
    "cwe": RulerSet(120, 2 * OFTEN, common_words),
    "fwe": RulerSet(50, 100, frequent_words),
    "qa_1": RulerSet(32, 2, None, part=True),
    "qa_2": RulerSet(32, 2, None, part=True),
}
