"""LongBench v2: questions with four choices about contexts of 8,000 to two million words.

Bai et al. 2024 (arXiv 2412.15204). The letter is taken from the answer by the benchmark's rule; its prompt is worded
anew, so that scores compare policies with each other, not with published results. Details of a row have the score by
difficulty and by length, as the benchmark's table has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from d2obench.tasks.base import Cell, Count, Item, Quality
from d2obench.tasks.data import BadField, Source, records
from d2obench.tasks.generate import Generative
from d2obench.tasks.prompts import Example, Limits

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

SOURCE = Source("THUDM/LongBench-v2", "main", "train")
LETTERS = ("A", "B", "C", "D")
ASK = (
    "Read the text below and answer the question about it.\n\n{context}\n\nQuestion: {question}\n\n{choices}\n\n"
    'Name one choice, in these words: "The correct answer is (letter)".'
)
_RULES = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


class Choice(msgspec.Struct):
    """One record of the data set."""

    context: str
    question: str
    a: str = msgspec.field(name="choice_A")
    b: str = msgspec.field(name="choice_B")
    c: str = msgspec.field(name="choice_C")
    d: str = msgspec.field(name="choice_D")
    answer: str
    difficulty: str = ""
    length: str = ""
    key: str = msgspec.field(name="_id", default="")

    @property
    def choices(self) -> dict[str, str]:
        """The four choices by letter."""
        return dict(zip(LETTERS, (self.a, self.b, self.c, self.d), strict=True))


class LongBenchV2(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """LongBench v2: four choices about a very long text, the share of right ones.

    ``max_prompt`` is the largest number of tokens of a prompt (0: what the model's context leaves). Longer prompts lose
    their middle.
    """

    typical: ClassVar[tuple[int, int] | None] = (503, 100_000)

    max_prompt: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_new: Count = 128

    def limits(self) -> Limits:
        """A sentence, of at most the benchmark's length."""
        return Limits(self.max_new, max_prompt=self.max_prompt or None)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The questions in order, at most ``quality.limit``."""
        path = quality.data.get(self.name)
        found = records(self.name, SOURCE, path, Choice, check=unscorable, limit=quality.limit)
        return [_example(str(i), record) for i, record in enumerate(found)]

    def scores(self, item: Item) -> dict[str, float]:
        """Whether the letter in the answer is the gold one."""
        return {"score": float(chosen_letter(item["text"]) == item["gold"])}

    def details(self, items: Sequence[Item]) -> dict[str, Any]:
        """Details of the row; the score by difficulty and by length, where the records have them."""
        found = super().details(items)
        for key in ("difficulty", "length"):
            classes: dict[str, list[float]] = {}
            for item in items:
                classes.setdefault(item[key], []).append(item["score"])
            if any(classes):
                found[f"by_{key}"] = {name: fmean(scores) for name, scores in classes.items()}
        return found


def chosen_letter(text: str) -> str:
    """The letter that an answer names, by the benchmark's rule; empty where it names none."""
    plain = text.replace("*", "")
    for rule in _RULES:
        if match := rule.search(plain):
            return match[1]
    return ""


def unscorable(record: Choice) -> BadField | None:
    """A record without a text, a question or a choice, or whose answer is none of the choices."""
    for field in ("context", "question"):
        if not getattr(record, field).strip():
            return BadField(field, "it is empty")
    for letter, choice in record.choices.items():
        if not choice.strip():
            return BadField(f"choice_{letter}", "it is empty")
    return None if record.answer in LETTERS else BadField("answer", "it is none of A, B, C and D")


def _example(name: str, record: Choice) -> Example:
    choices = "\n".join(f"({letter}) {choice.strip()}" for letter, choice in record.choices.items())
    prompt = ASK.format(context=record.context.strip(), question=record.question.strip(), choices=choices)
    gold = f"The correct answer is ({record.answer})"
    keep = {"gold": record.answer, "difficulty": record.difficulty, "length": record.length}
    return Example(name, record.key or name, prompt, candidates=(gold,), keep=keep)
