"""The generator of long texts: the same everywhere, of any length, with facts that can be asked for."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2obench.texts import lexicon
from d2obench.texts.writer import Writer, document, token_ids


def count_words(text: str) -> int:
    return len(text.split())


def encode(text: str) -> list[int]:
    """A tokenizer of five-letter pieces, ids by content."""
    pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
    return [int(hashlib.sha256(piece.encode()).hexdigest()[:6], 16) for piece in pieces]


def test_same_seed_same_text_on_every_platform() -> None:
    text = document(0, 2000, count_words).text
    assert text == document(0, 2000, count_words).text
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d1853fc1686e036d"


def test_seeds_and_themes_give_other_texts() -> None:
    texts = {document(seed, 200, count_words, theme).text for seed in (0, 1) for theme in ("text", "recall")}
    assert len(texts) == 4


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.integers(30, 1500))
def test_length_is_just_below_what_was_asked(seed: int, tokens: int) -> None:
    text = document(seed, tokens, count_words).text
    assert tokens - 60 < count_words(text) <= tokens


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9))
def test_facts_stand_once_and_where_they_say(seed: int) -> None:
    found = document(seed, 1200, count_words)
    assert len(found.facts) >= 3
    for fact in found.facts:
        sentence = f"{fact.stub} {fact.answer}."
        assert found.text.startswith(sentence, fact.at)
        assert found.text.count(fact.stub) == 1
    assert [fact.at for fact in found.facts] == sorted(fact.at for fact in found.facts)


def test_a_shorter_document_is_the_beginning_of_a_longer_one() -> None:
    assert document(3, 900, count_words).text.startswith(document(3, 400, count_words).text)


def test_people_come_back_far_apart() -> None:
    text = document(7, 4000, count_words).text
    paragraphs = text.split("\n\n")
    names = {fact.stub.replace("The debt of ", "") for fact in document(7, 4000, count_words).facts}
    people = {" ".join(name.split()[:2]) for name in names}
    gaps = []
    for person in people:
        places = [i for i, paragraph in enumerate(paragraphs) if person in paragraph]
        gaps += [b - a for a, b in pairwise(places)]
    assert max(gaps) >= 10
    assert sum(gap >= 4 for gap in gaps) >= 10


def test_english_is_well_formed() -> None:
    text = document(11, 20_000, count_words).text
    assert not re.search(r"[{}\[\]|]", text)
    assert not re.search(r"\b[Aa] [aeiou]", text)
    assert not re.search(r"\b[Aa]n [^aeiou]", text)
    assert "  " not in text
    sentences = re.split(r'(?<=[.!?"]) (?=[A-Z"])', text)
    assert len(set(sentences)) > 0.9 * len(sentences)


def test_every_pattern_can_be_filled() -> None:
    writer = Writer(0)
    stream = writer.sentences()
    for _ in range(50):
        next(stream)
    person, other = writer.cast[:2]
    for patterns in (
        lexicon.INTRODUCTIONS,
        lexicon.RETURNS,
        lexicon.OPENINGS,
        lexicon.ACTIONS,
        lexicon.SPEECH,
        lexicon.THOUGHTS,
    ):
        for pattern in patterns:
            assert not re.search(r"[{}\[\]|]", writer._fill(pattern, person, other))


@pytest.mark.parametrize("tokens", [1, 7, 500, 5000])
def test_token_ids_are_exactly_as_many(tokens: int) -> None:
    ids = token_ids(5, tokens, encode)
    assert len(ids) == tokens
    assert ids == token_ids(5, 6000, encode)[:tokens]
