"""LAMBADA: the last word of a passage, which the last sentence alone does not tell (Paperno et al. 2016,
arXiv 1606.06031).

With ``query=unseen`` the sentences before the last are compressed, and then the last sentence is read; passages of a
single sentence are left out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

import msgspec

from d2obench.errors import DataError
from d2obench.tasks.base import Cell, Item, Quality
from d2obench.tasks.data import BadField, Source, records
from d2obench.tasks.generate import Questions
from d2obench.tasks.prompts import Example, Limits
from d2obench.tasks.scoring import begins_with

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

_LAST_SENTENCE = re.compile(r"""(?s:.*)[.!?]['"’”`]*(?=\s)""")
"""Everything before a passage's last sentence."""
SOURCE = Source("EleutherAI/lambada_openai", "900124bf3b8235c6daf21033af9948b3f07346c4", "test", "default")


class Passage(msgspec.Struct):
    """One record of the data set."""

    text: str


class Lambada(Questions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """LAMBADA, the last word of a passage: accuracy and bits per byte of that word."""

    typical: ClassVar[tuple[int, int] | None] = (5153, 90)

    def limits(self) -> Limits:
        """One word, in plain text."""
        return Limits(max_new=8, stop=("\n",), chat=False)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """Passages without their last word."""
        path = quality.data.get(self.name)
        passages = records(self.name, SOURCE, path, Passage, check=unscorable, limit=quality.limit)
        examples = []
        for i, passage in enumerate(passages):
            context, _, word = passage.text.strip().rpartition(" ")
            before = _LAST_SENTENCE.match(context)
            question = context[before.end() :] if before else ""
            if self.unseen and not question.strip():
                continue
            gold = (" " + word,)
            examples.append(Example(str(i), str(i), context, candidates=gold, keep={"gold": word}, question=question))
        if not examples:
            raise DataError("no passage has two sentences", why="query=unseen compresses all but the last sentence")
        return examples

    def scores(self, item: Item) -> dict[str, float]:
        """Whether the answer begins with the very word."""
        return {"score": float(begins_with(item["text"], item["gold"]))}


def unscorable(passage: Passage) -> BadField | None:
    """A passage that leaves nothing to read when its last word is taken away."""
    return None if len(passage.text.split()) > 1 else BadField("text", "it has fewer than two words")
