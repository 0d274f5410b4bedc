"""Tasks with long answers, in which a cache is compressed while the model decodes.

A policy that decides only about the prompt says little here; with ``protect=prompt``
(:mod:`d2obench.policies.protect`) a policy keeps the prompt and applies its budget to what is generated. Beside its
score, a row shows how an answer goes wrong when a cache forgets what it has written: it repeats itself, grows longer
than with the full cache, or runs into the limit.
"""

from __future__ import annotations

from d2obench.tasks.base import Item
from d2obench.tasks.generate import Generative

NGRAM = 4
"""Number of words in the sequences of which repetitions are counted."""


class LongAnswers(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of tasks with long answers: a subclass says whether an answer is right."""

    def right(self, item: Item) -> float:
        """The score of one item."""
        raise TypeError(f"{type(self).__name__} has no right")

    def scores(self, item: Item) -> dict[str, float]:
        """The score, whether the answer was cut at the limit, and how much of it is repetition."""
        cut = float(item["ended"] == "length")
        return {"score": self.right(item), "cut": cut, "repeated": repeated(item["text"])}


def repeated(text: str) -> float:
    """The share of the sequences of NGRAM words in a text that have occurred before in it; 0 if it is shorter."""
    words = text.split()
    every = [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]
    return 1 - len(set(every)) / len(every) if every else 0.0
