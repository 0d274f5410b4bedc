"""CoQA: questions about a story that lean on the questions before (Reddy et al. 2019, arXiv 1808.07042).

The dialogue so far is given with its reference answers, and the last turn of each story is asked; ``turns=all`` asks
every one, clustered by story. Exact match and F1 as in the official script, over all references a record has: those of
``references`` (one list a turn), else the one of ``answers.input_text``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from d2obench.errors import DataError
from d2obench.tasks.answers import against_others
from d2obench.tasks.base import Count, Item
from d2obench.tasks.data import Source, records
from d2obench.tasks.generate import Generative
from d2obench.tasks.prompts import Example, Limits

if TYPE_CHECKING:
    from d2obench.models import LoadedModel
    from d2obench.suite.definition import Cell, Quality

SOURCE = Source("stanfordnlp/coqa", "main", "validation")


class Answers(msgspec.Struct):
    """Reference answers, one a turn."""

    input_text: list[str]


class Story(msgspec.Struct):
    """One record."""

    story: str
    questions: list[str]
    answers: Answers
    references: list[list[str]] = []


class Coqa(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """CoQA dialogues: official F1 (score) and exact match."""

    turns: Literal["last", "all"] = "last"
    max_new: Count = 32

    def limits(self) -> Limits:
        """A short answer; the dialogue goes on as plain text."""
        return Limits(max_new=self.max_new, stop=("\nQ:", "\n"), chat=False)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """``quality.limit`` counts stories."""
        found = records(self.name, SOURCE, quality.data.get(self.name), Story)[: quality.limit or None]
        examples = []
        for i, story in enumerate(found):
            answers, count = story.answers.input_text, len(story.questions)
            if not count or len(answers) != count or len(story.references) not in (0, count):
                raise DataError(f"story {i + 1} is malformed", why="it has not one answer for each question")
            for turn in range(count) if self.turns == "all" else [count - 1]:
                said = zip(story.questions[:turn], answers[:turn], strict=True)
                past = "".join(f"\n\nQ: {question}\nA: {answer}" for question, answer in said)
                references = story.references[turn] if story.references else [answers[turn]]
                prompt = f"{story.story}{past}\n\nQ: {story.questions[turn]}\nA:"
                keep = {"references": references, "turn": turn + 1}
                examples.append(Example(f"{i}.{turn + 1}", str(i), prompt, "", (" " + answers[turn],), keep))
        return examples

    def marks(self, item: Item) -> dict[str, float]:
        """F1 and exact match of the first line."""
        em, f1 = against_others(item["text"].strip(), item["references"])
        return {"score": f1, "em": em}
