r"""Competition problems with long solutions: MATH-500 and AIME.

MATH-500 has 500 problems of Hendrycks et al. 2021 (arXiv 2103.03874), as chosen by Lightman et al. 2023 (arXiv
2305.20050); AIME has 30 problems a year, whose answers are whole numbers. The model is asked to reason and to put its
answer into ``\boxed{}``; :mod:`d2obench.tasks.boxed` compares it with the right one. Local files have the fields
``problem`` and ``answer``, one record a line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from d2obench.tasks.base import Cell, Count, Item, Quality
from d2obench.tasks.boxed import equal_answers, last_boxed
from d2obench.tasks.data import BadField, Row, Source, records
from d2obench.tasks.long_answers import LongAnswers
from d2obench.tasks.prompts import Example, Limits
from d2obench.tasks.scoring import accuracy_package

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

ASK = "Solve the problem below. Reason step by step, and write the final answer as \\boxed{{…}}.\n\n{problem}"
AIME = {
    2024: Source("HuggingFaceH4/aime_2024", "main", "train"),
    2025: Source("math-ai/aime25", "main", "test"),
}


class Problem(msgspec.Struct):
    """One record of either data set."""

    problem: str
    answer: str


class Competition(LongAnswers, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the competitions: a subclass says where its problems come from."""

    max_new: Count = 4096

    def source(self) -> Source:
        """The data set on the hub."""
        raise TypeError(f"{type(self).__name__} has no source")

    def limits(self) -> Limits:
        """A solution with all its steps."""
        return Limits(max_new=self.max_new)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The problems in order, at most ``quality.limit``."""
        accuracy_package("math_verify")  # raises now, and not after the work, where it is missing
        path = quality.data.get(self.name)
        problems = records(
            self.name, self.source(), path, Problem, prepare=answer_as_text, check=unscorable, limit=quality.limit
        )
        return [
            Example(str(i), str(i), ASK.format(problem=one.problem.strip()), keep={"gold": one.answer})
            for i, one in enumerate(problems)
        ]

    def right(self, item: Item) -> float:
        """Whether the answer in the last box equals the right one."""
        answer = last_boxed(item["text"])
        return float(answer is not None and equal_answers(answer, item["gold"]))


class Math500(Competition, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """MATH-500: competition problems with long solutions, the share of right answers in a box."""

    typical: ClassVar[tuple[int, int] | None] = (500, 120)

    def source(self) -> Source:
        """MATH-500 on the hub."""
        return Source("HuggingFaceH4/MATH-500", "main", "test")


class Aime(Competition, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """AIME: 30 hard problems of one year, the share of right answers in a box."""

    typical: ClassVar[tuple[int, int] | None] = (30, 150)

    year: Literal[2024, 2025] = 2024

    def source(self) -> Source:
        """The year's problems on the hub."""
        return AIME[self.year]


def answer_as_text(row: Row) -> Row:
    """A row whose answer is a number, as some files of AIME have it, with the number as text."""
    answer = row.get("answer")
    return {**row, "answer": str(answer)} if isinstance(answer, int) and not isinstance(answer, bool) else row


def unscorable(problem: Problem) -> BadField | None:
    """A record without a problem or an answer."""
    for field in ("problem", "answer"):
        if not getattr(problem, field).strip():
            return BadField(field, "it is empty")
    return None
