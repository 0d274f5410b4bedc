"""CoQA: questions about a story that refer to the questions before (Reddy et al. 2019, arXiv 1808.07042).

The dialogue so far is given with its reference answers, and the last question of each story is asked; with
``turns=all`` every question is asked, and intervals are clustered by story. With ``query=unseen`` the story alone is
compressed, once for all of its questions, and the dialogue so far is read with the question. Exact match and F1 follow
the official script. The references of a turn are those in the record's ``references`` (one list a turn) where it has
them, otherwise the one in ``answers.input_text``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, Count, Item, Quality, Work
from d2obench.tasks.data import BadField, Source, records
from d2obench.tasks.generate import Questions
from d2obench.tasks.prompts import Example, Limits
from d2obench.tasks.scoring import coqa_scores

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

SOURCE = Source("stanfordnlp/coqa", "main", "validation")


class Answers(msgspec.Struct):
    """Reference answers, one for each question."""

    input_text: list[str]


class Story(msgspec.Struct):
    """One record of the data set."""

    story: str
    questions: list[str]
    answers: Answers
    references: list[list[str]] = []


class Coqa(Questions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """CoQA dialogues: official F1 (score) and exact match."""

    typical: ClassVar[tuple[int, int] | None] = (500, 600)

    turns: Literal["last", "all"] = "last"
    max_new: Count = 32

    def limits(self) -> Limits:
        """A short answer in a dialogue of plain text."""
        return Limits(max_new=self.max_new, stop=("\nQ:", "\n"), chat=False)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """One prompt a story, or one a question with ``turns=all``; ``quality.limit`` counts stories."""
        path = quality.data.get(self.name)
        stories = records(self.name, SOURCE, path, Story, check=unscorable, limit=quality.limit)
        examples = []
        for i, story in enumerate(stories):
            answers, count = story.answers.input_text, len(story.questions)
            for turn in range(count) if self.turns == "all" else [count - 1]:
                asked = zip(story.questions[:turn], answers[:turn], strict=True)
                past = "".join(f"\n\nQ: {question}\nA: {answer}" for question, answer in asked)
                references = story.references[turn] if story.references else [answers[turn]]
                question = f"{past}\n\nQ: {story.questions[turn]}\nA:"
                keep = {"references": references, "turn": turn + 1}
                prompt, gold = story.story + question, (" " + answers[turn],)
                examples.append(Example(f"{i}.{turn + 1}", str(i), prompt, "", gold, keep, question))
        return examples

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`Task.work`; a story has about 16 questions."""
        work = super().work(quality, shape, context)
        return work and work._replace(items=work.items * (16 if self.turns == "all" else 1))

    def scores(self, item: Item) -> dict[str, float]:
        """F1 and exact match of the first line."""
        em, f1 = coqa_scores(item["text"].strip(), item["references"])
        return {"score": f1, "em": em}


def unscorable(story: Story) -> BadField | None:
    """A text that is empty, or a question without its answer and references."""
    count = len(story.questions)
    if not story.story.strip():
        return BadField("story", "it is empty")
    if not count or not all(map(str.strip, story.questions)):
        return BadField("questions", "it is empty or holds an empty question")
    if len(story.answers.input_text) != count or not all(map(str.strip, story.answers.input_text)):
        return BadField("answers.input_text", f"it does not hold one answer for each of the {count} questions")
    if story.references and (len(story.references) != count or not all(map(any, story.references))):
        return BadField("references", f"it does not hold a list of answers for each of the {count} questions")
    return None
