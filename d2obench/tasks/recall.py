"""Recall: a fact that a generated document states once, and a question about it at the end.

The model is given the question and the beginning of the answer sentence (``Otto Fenwick kept a tame fox called``) and
must continue with one word or number. Every item has its own document, and the facts are spread over the depth of the
documents. Beside exact match, the gold answer's bits per byte show how much of a fact is left after a wrong answer.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar

from d2obench.errors import UsageError
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, Count, Item, Quality, Work, at_most, shape_of
from d2obench.tasks.generate import Questions
from d2obench.tasks.prompts import Example, Limits, fitted, token_counter
from d2obench.tasks.scoring import begins_with
from d2obench.texts.writer import document, document_seed

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

TEXT = "Read the following chronicle and answer the question at its end.\n\n{text}"
QUESTION = "\n\nQuestion: {question}\nAnswer:"


class Recall(Questions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A fact asked for at the end of a long document: exact match and the gold answer's bits per byte."""

    shaped: ClassVar[bool] = True

    items: Count = 8

    def limits(self) -> Limits:
        """A word or a number."""
        return Limits(max_new=10, stop=("\n", "."))

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """Prompts of at most, and nearly, the shape's ``prompt`` tokens; the shape's ``gen`` is not used."""
        shape = shape_of(cell)
        if shape.prompt + self.limits().max_new > loaded.context:
            raise UsageError(
                f"the prompt of {shape} does not fit the context of {loaded.name}",
                why=f"it has {loaded.context} tokens",
                remedy="use a shorter shape",
            )
        count = at_most(self.items, quality)
        return [self._example(loaded, shape.prompt, cell.axes.seed, i, (i + 0.5) / count) for i in range(count)]

    def _example(self, loaded: LoadedModel, prompt: int, seed: int, index: int, depth: float) -> Example:
        def build(tokens: int) -> Example | None:
            written = document(document_seed(seed, index), tokens, token_counter(loaded), "recall")
            if not written.facts:
                return None
            # One of the two facts nearest to the depth, drawn, so that neither its kind nor its place is fixed.
            near = sorted(written.facts, key=lambda fact: abs(fact.at / len(written.text) - depth))[:2]
            fact = random.Random(f"d2obench/recall/{seed}/{index}").choice(near)
            question = QUESTION.format(question=fact.question)
            return Example(
                str(index),
                str(index),
                TEXT.format(text=written.text) + question,
                " " + fact.stub,
                (" " + fact.answer,),
                {"depth": round(fact.at / len(written.text), 4), "gold": fact.answer, "question": fact.question},
                question,
            )

        return fitted(loaded, self.limits(), prompt, build)

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`Task.work`; the gold answer is scored beside the generated one."""
        return None if shape is None else Work(at_most(self.items, quality), shape.prompt, 2 * self.limits().max_new)

    def scores(self, item: Item) -> dict[str, float]:
        """1 where the answer begins with the gold word or number, else 0."""
        return {"score": float(begins_with(item["text"], item["gold"]))}
