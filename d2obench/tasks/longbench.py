"""LongBench: 21 sets of long-context questions, summaries, few-shot, counting and code (arXiv 2308.14508)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from d2obench.errors import UsageError
from d2obench.tasks.base import Item
from d2obench.tasks.data import Source, records
from d2obench.tasks.extra import accuracy_package
from d2obench.tasks.generate import Generative
from d2obench.tasks.longbench_rules import PACKAGES, RULES
from d2obench.tasks.longbench_sets import SETS, LongSet
from d2obench.tasks.prompts import Example, Limits

if TYPE_CHECKING:
    from d2obench.models import LoadedModel
    from d2obench.suite.definition import Cell, Quality

HUB, REVISION = "THUDM/LongBench", "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"


class Sample(msgspec.Struct):
    """One record."""

    input: str
    context: str
    answers: Annotated[list[str], msgspec.Meta(min_length=1)]
    all_classes: list[str] | None = None
    key: str = msgspec.field(name="_id", default="")


class LongBench(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A LongBench set, with its official metric.

    ``max_prompt`` (tokens, 0: the model's context) cuts prompts in the middle, as the benchmark does.
    """

    max_prompt: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def set(self) -> LongSet:
        """The set the name ``longbench/…`` stands for."""
        name = self.name.rpartition("/")[2]
        if name not in SETS:
            raise UsageError(f"unknown LongBench set '{name}'", remedy=f"the known ones are {', '.join(SETS)}")
        return SETS[name]

    def limits(self) -> Limits:
        """The benchmark's answer lengths."""
        chosen = self.set
        stop = ("\n",) if chosen.line else ()
        return Limits(chosen.max_new, stop, chat=not chosen.plain, max_prompt=self.max_prompt or None)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The set's samples in order, at most ``quality.limit``."""
        if self.set.rule in PACKAGES:  # a missing one is told before the work, not after
            accuracy_package(PACKAGES[self.set.rule])
        member = f"data/{self.name.rpartition('/')[2]}.jsonl"
        source = Source(HUB, REVISION, "test", archive="data.zip", member=member)
        found = records(self.name, source, quality.data.get(self.name), Sample)[: quality.limit or None]
        return [
            Example(
                str(i),
                sample.key or str(i),
                self.set.template.format(context=sample.context, input=sample.input),
                candidates=(" " + sample.answers[0],),
                keep={"references": sample.answers, "classes": sample.all_classes or []},
            )
            for i, sample in enumerate(found)
        ]

    def marks(self, item: Item) -> dict[str, float]:
        """The best score over the references."""
        text = item["text"]
        if self.set.line:
            text = text.lstrip("\n").split("\n")[0]
        rule = RULES[self.set.rule]
        return {"score": max(rule(text, reference, item["classes"]) for reference in item["references"])}
