"""RULER from files: prompts that the benchmark wrote, and the paragraphs of its two question sets.

``--data ruler/vt=FILE`` takes a file that the benchmark's scripts wrote (``input``, ``outputs`` and maybe
``answer_prefix``), or one in the form of the public leaderboard (``context``, ``question``, ``answer_prefix``,
``answer``). Their prompts are used byte for byte. For ``ruler/qa_1`` and ``ruler/qa_2`` it may also be a file of the
sets that the benchmark takes its questions from, SQuAD 2.0 or HotpotQA in their original form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import msgspec

from d2obench.errors import DataError
from d2obench.tasks.data import BadField, Source, first_record, records
from d2obench.tasks.ruler_sets import Sample

Fits = Callable[[str, Sample], BadField | None]
NOWHERE = Source("", "", "")
Answers = Annotated[list[str], msgspec.Meta(min_length=1)]
QUESTIONS = (
    "\n\nAnswer the question based on the given documents.", "\nWhat is the special magic",
    "\nWhat are all the special magic", "\nQuestion:",
)  # fmt: skip
"""Where the question begins in prompts of the benchmark: at the last occurrence of the first of these that occurs."""
PREFIXES = (" The special magic", " Answer:")
"""Where the beginning of the answer stands after the question, in files that have no field for it."""


class Written(msgspec.Struct):
    """A prompt that the benchmark's scripts wrote."""

    input: str
    outputs: Answers
    answer_prefix: str = ""

    def sample(self) -> Sample:
        """The prompt in its parts; joined, they are ``input`` and ``answer_prefix``."""
        start = next((at for mark in QUESTIONS if (at := self.input.rfind(mark)) > 0), 0)
        context, rest = (self.input[:start], self.input[start:]) if start > 0 else (self.input, "")
        prefix = self.answer_prefix
        if not prefix and (begins := [at for mark in PREFIXES if (at := rest.rfind(mark)) > 0]):
            rest, prefix = rest[: max(begins)], rest[max(begins) :]
        return Sample(context, rest, prefix, tuple(self.outputs))


class Separate(msgspec.Struct):
    """A prompt in the form of the public leaderboard; ``task`` is the name of its set."""

    context: str
    question: str
    answer: Answers
    answer_prefix: str = ""
    task: str = ""

    def sample(self) -> Sample:
        """The prompt in its parts; a context that does not end with white space is followed by a line break."""
        gap = "" if not self.context or self.context[-1].isspace() else "\n"
        return Sample(self.context + gap, self.question, self.answer_prefix, tuple(self.answer))


class SquadAnswer(msgspec.Struct):
    """One answer of SQuAD."""

    text: str


class SquadQuestion(msgspec.Struct):
    """One question of SQuAD."""

    question: str
    answers: list[SquadAnswer]
    is_impossible: bool = False


class SquadParagraph(msgspec.Struct):
    """One paragraph of SQuAD with its questions."""

    context: str
    qas: list[SquadQuestion]


class Article(msgspec.Struct):
    """One article of SQuAD."""

    paragraphs: list[SquadParagraph]


class Hop(msgspec.Struct):
    """One question of HotpotQA, with the title and the sentences of each of its paragraphs."""

    question: str
    answer: str
    context: list[tuple[str, list[str]]]


class Asked(NamedTuple):
    """A question about documents.

    Args:
        documents: those that the answer needs, as indices.
        related: others from the same article, which are taken before unrelated ones.
    """

    question: str
    answers: list[str]
    documents: list[int]
    related: list[int]


class Library(NamedTuple):
    """All different documents of a set in order, and the questions about them."""

    documents: list[str]
    questions: list[Asked]


def read(task: str, name: str, path: str, room: Fits, limit: int) -> list[Sample] | Library:
    """The prompts or the question set of a file.

    Args:
        task: for messages, ``ruler/vt``.
        name: of the set, ``vt``.
        room: a function from a field and the prompt in it to what is wrong with its length, if anything.
        limit: the largest number of prompts; 0: all.

    Raises:
        DataError: the file can't be read or has another form.
    """
    found = first_record(path)
    form = set(found) if isinstance(found, dict) else set()
    library: Library | None = None
    if name.startswith("qa_") and "paragraphs" in form:
        library = _squad(records(task, NOWHERE, path, Article, check=_empty_in_article))
    elif name.startswith("qa_") and "question" in form and isinstance(found.get("context"), list):
        library = _hotpot(records(task, NOWHERE, path, Hop, check=_empty_question))
    if library is not None and not library.questions:
        raise DataError(f"{path} has no question with an answer")
    if library is not None:
        return library
    if "input" in form or "context" in form:
        return _prompts(task, name, path, room, limit, Written if "input" in form else Separate)
    raise DataError(
        f"{path} is in no form that {task} knows",
        why=f"its first record has the fields {', '.join(sorted(form)) or 'of no object'}",
        remedy="give fields input and outputs, or context, question, answer_prefix and answer"
        + ("; or a file of SQuAD 2.0 or HotpotQA" if name.startswith("qa_") else ""),
    )


def _prompts(
    task: str, name: str, path: str, room: Fits, limit: int, kind: type[Written] | type[Separate]
) -> list[Sample]:
    """The prompts of a file, of which only those that are used need to fit the model."""
    used: list[Sample] = []

    def check(row: Written | Separate) -> BadField | None:
        if isinstance(row, Separate) and row.task not in ("", name):
            return None
        sample = row.sample()
        if isinstance(row, Separate) and not row.question.strip():
            return BadField("question", "it is empty")
        field, answers = ("input", "outputs") if isinstance(row, Written) else ("context", "answer")
        if limit and len(used) >= limit:
            return _unscorable(field, sample, answers)
        used.append(sample)
        return _unscorable(field, sample, answers) or room(field, sample)

    records(task, NOWHERE, path, kind, check=check)
    if not used:
        raise DataError(f"{path} has no records of the task '{name}'", remedy="name a file of this task")
    return used


def _unscorable(field: str, sample: Sample, answers: str) -> BadField | None:
    if not sample.context.strip():
        return BadField(field, "it is empty")
    return None if all(map(str.strip, sample.answers)) else BadField(answers, "it holds an empty answer")


def _empty_in_article(article: Article) -> BadField | None:
    for paragraph in article.paragraphs:
        if not paragraph.context.strip():
            return BadField("paragraphs.context", "it is empty")
        if not all(one.question.strip() for one in paragraph.qas):
            return BadField("paragraphs.qas.question", "it is empty")
    return None


def _empty_question(row: Hop) -> BadField | None:
    if not row.question.strip():
        return BadField("question", "it is empty")
    return None if row.answer.strip() else BadField("answer", "it is empty")


def _squad(articles: list[Article]) -> Library:
    """Every answerable question; documents are paragraphs, related ones those of the same article."""
    documents = sorted({paragraph.context for article in articles for paragraph in article.paragraphs})
    place = {document: number for number, document in enumerate(documents)}
    questions = []
    for article in articles:
        near = [place[paragraph.context] for paragraph in article.paragraphs]
        for paragraph in article.paragraphs:
            own = place[paragraph.context]
            questions += [
                Asked(one.question, [answer.text for answer in one.answers], [own], [i for i in near if i != own])
                for one in paragraph.qas
                if not one.is_impossible and one.answers
            ]
    return Library(documents, questions)


def _hotpot(rows: list[Hop]) -> Library:
    """Every question; documents are a title and a paragraph, and all ten of a question are kept."""
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row.context] for row in rows]
    documents = sorted({text for row in texts for text in row})
    place = {document: number for number, document in enumerate(documents)}
    questions = [
        Asked(row.question, [row.answer], [place[text] for text in own], [])
        for row, own in zip(rows, texts, strict=True)
    ]
    return Library(documents, questions)
