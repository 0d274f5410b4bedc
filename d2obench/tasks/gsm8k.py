"""GSM8K: grade-school word problems, five worked examples before each (Cobbe et al. 2021, arXiv 2110.14168).

The five examples were written for this project in the data set's format, so only the test split is needed. The prompt
is plain text, as is common for this task. The answer is the number after ``####`` (strict) or the last number
(flexible), by the rules of lm-evaluation-harness; ``score`` is the flexible one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

import msgspec

from d2obench.tasks.base import Cell, Count, Item, Quality
from d2obench.tasks.data import BadField, Source, records
from d2obench.tasks.generate import Generative
from d2obench.tasks.prompts import Example, Limits

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

SOURCE = Source("openai/gsm8k", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c", "test", "main")

SHOTS = (
    ("A ferry makes 6 crossings a day and carries 14 cars on each. How many cars does it carry in a week of 7 days?",
     "In a day the ferry carries 6 * 14 = 84 cars.\nIn a week it carries 84 * 7 = 588 cars.\n#### 588"),
    ("Lena buys 3 notebooks for $4 each and a pen for $2.50. She pays with a $20 bill. How much change does she get?",
     "The notebooks cost 3 * 4 = 12 dollars.\nTogether with the pen that is 12 + 2.5 = 14.5 dollars.\n"
     "Her change is 20 - 14.5 = 5.5 dollars.\n#### 5.5"),
    ("Two thirds of the 36 trees in an orchard bear apples and half of the rest bear pears. How many bear pears?",
     "36 * 2 / 3 = 24 trees bear apples.\nThe rest are 36 - 24 = 12 trees.\nOf these 12 / 2 = 6 bear pears.\n#### 6"),
    ("Omar is 4 years older than twice his sister's age. Together they are 31 years old. How old is Omar?",
     "Let the sister be s years old. Then Omar is 2s + 4.\nTogether they are 3s + 4 = 31, so s = 27 / 3 = 9.\n"
     "Omar is 2 * 9 + 4 = 22 years old.\n#### 22"),
    ("A tank holds 480 liters. A pump empties 30 liters a minute while a hose fills 18 liters a minute. "
     "After how many minutes is the full tank empty?",
     "Every minute the tank loses 30 - 18 = 12 liters.\nIt is empty after 480 / 12 = 40 minutes.\n#### 40"),
)  # fmt: skip

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


class Problem(msgspec.Struct):
    """One record of the data set."""

    question: str
    answer: str


class Gsm8k(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """GSM8K word problems, 5-shot, strict and flexible extraction."""

    typical: ClassVar[tuple[int, int] | None] = (1319, 700)

    max_new: Count = 256

    def limits(self) -> Limits:
        """A worked solution in plain text."""
        return Limits(max_new=self.max_new, stop=("Question:",), chat=False)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The set's problems in order, at most ``quality.limit``."""
        shots = "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in SHOTS)
        path = quality.data.get(self.name)
        problems = records(self.name, SOURCE, path, Problem, check=unscorable, limit=quality.limit)
        return [
            Example(
                str(i),
                str(i),
                f"{shots}\n\nQuestion: {problem.question}\nAnswer:",
                candidates=(" " + problem.answer,),
                keep={"gold": strict_number(problem.answer) or problem.answer},
            )
            for i, problem in enumerate(problems)
        ]

    def scores(self, item: Item) -> dict[str, float]:
        """Whether the extracted number is the gold one."""
        gold, text = plain_number(item["gold"]), item["text"]
        return {
            "score": float(plain_number(flexible_number(text)) == gold),
            "score_strict": float(plain_number(strict_number(text)) == gold),
        }


def unscorable(problem: Problem) -> BadField | None:
    """What would make every answer wrong, or the question empty."""
    if not problem.question.strip():
        return BadField("question", "it is empty")
    if not strict_number(problem.answer) and not re.fullmatch(r"-?[\d.]+", plain_number(problem.answer)):
        return BadField("answer", "it is neither a number nor a solution that ends in '#### ' and a number")
    return None


def strict_number(text: str) -> str:
    """The number after the first ``####``; empty where there is none."""
    match = _STRICT.search(text)
    return match[1] if match else ""


def flexible_number(text: str) -> str:
    """The last number; empty where there is none."""
    numbers = _FLEXIBLE.findall(text)
    return numbers[-1] if numbers else ""


def plain_number(number: str) -> str:
    """A number without thousands separators, dollar signs and a final point."""
    return re.sub(r"[,$]|(?s:.*)#### |\.$", "", number).strip()
