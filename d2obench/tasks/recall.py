"""Recall: a fact stated once in a generated document, asked for at its end.

The model is given the question and the beginning of the answer sentence (``Otto Fenwick kept a tame fox called``) and
must go on with one word or number. Facts are spread over the depth of the documents, one document an item. The gold
answer's bits per byte tell apart what exact match can't: an answer nearly found from one wholly lost.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, ClassVar

from d2obench.errors import UsageError
from d2obench.suite.grammar import parse_shape
from d2obench.tasks.base import Count, Item
from d2obench.tasks.generate import Generative
from d2obench.tasks.prompts import Example, Limits, fitted, size_by
from d2obench.tasks.text import document

if TYPE_CHECKING:
    from d2obench.models import LoadedModel
    from d2obench.suite.definition import Cell, Quality

ASK = "Read the following chronicle and answer the question at its end.\n\n{text}\n\nQuestion: {question}\nAnswer:"


class Recall(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A fact asked at the end of a long document: exact match beside gold bits per byte."""

    shaped: ClassVar[bool] = True

    items: Count = 8

    def limits(self) -> Limits:
        """A word or a number."""
        return Limits(max_new=10, stop=("\n", "."))

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """Prompts of at most, and nearly, the shape's ``prompt`` tokens; the shape's ``gen`` is not used."""
        assert cell.axes.shape
        (shape,) = parse_shape(cell.axes.shape)
        if shape.prompt + self.limits().max_new > loaded.context:
            why = f"it has {loaded.context} tokens"
            raise UsageError(f"the prompt of {shape} does not fit the context of {loaded.name}", why=why)
        count = min(self.items, quality.limit or self.items)
        return [self._example(loaded, shape.prompt, cell.axes.seed, i, (i + 0.5) / count) for i in range(count)]

    def _example(self, loaded: LoadedModel, prompt: int, seed: int, index: int, depth: float) -> Example:
        def build(room: int) -> Example | None:
            found = document(seed * 1_000_003 + index, room, size_by(loaded), "recall")
            if not found.facts:
                return None
            # One of the two facts nearest to the depth, so that neither kind nor place is fixed.
            near = sorted(found.facts, key=lambda fact: abs(fact.at / len(found.text) - depth))[:2]
            fact = random.Random(f"d2obench/recall/{seed}/{index}").choice(near)
            return Example(
                str(index),
                str(index),
                ASK.format(text=found.text, question=fact.question),
                " " + fact.stub,
                (" " + fact.answer,),
                {"depth": round(fact.at / len(found.text), 4), "gold": fact.answer, "question": fact.question},
            )

        return fitted(loaded, self.limits(), prompt, build)

    def marks(self, item: Item) -> dict[str, float]:
        """1 where the answer begins with the gold word or number, else 0."""
        return {"score": float(begins_with(item["text"], item["gold"]))}


def begins_with(text: str, gold: str) -> bool:
    """Whether ``text`` begins with the whole word or number ``gold``, whatever its case and thousands separators."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text).lstrip(" \t\n\"'“‘*")
    return re.match(re.escape(gold) + r"(?!\w)", plain, re.IGNORECASE) is not None
