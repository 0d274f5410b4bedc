"""RULER: 13 sets of synthetic long-context tasks at any length (Hsieh et al. 2024, arXiv 2404.06654).

Prompts are generated with the project's own words (:mod:`d2obench.tasks.ruler_sets`), or read from the benchmark's
files (:mod:`d2obench.tasks.ruler_data`); the two question sets need a file. As in the benchmark, ``length`` counts the
prompt and the longest answer together, answers are generated to their full length unless the model ends them, and the
score is the share of the expected strings that the answer contains; of the question sets, whether it contains one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from d2obench.errors import DataError, UsageError
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, Count, Item, Quality, Work, at_most
from d2obench.tasks.data import BadField
from d2obench.tasks.generate import Questions
from d2obench.tasks.prompts import Example, Limits, prompt_tokens
from d2obench.tasks.ruler_data import Asked, Library, read
from d2obench.tasks.ruler_sets import SETS, RulerSet, Sample, among_documents

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

_CONTROL = re.compile(r"[\x00-\x1f]")


class Ruler(Questions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A set of RULER at one length: the share of the expected strings in the answer.

    ``length`` is the number of tokens of a prompt and the longest answer together; ``items`` is the number of prompts
    (the benchmark has 500). Neither applies to a file of prompts, which is used as it is, up to the suite's limit. With
    ``chat=false`` prompts are continued as plain text, for files in which a chat template is already applied.
    """

    length: Count = 4096
    items: Count = 20
    chat: bool = True

    @property
    def set(self) -> RulerSet:
        """The set that the name ``ruler/…`` stands for."""
        return SETS[self._set]

    @property
    def _set(self) -> str:
        return self.name.rpartition("/")[2]

    def limits(self) -> Limits:
        """The benchmark's answer lengths."""
        return Limits(self.set.max_new, chat=self.chat)

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """Prompts of at most, and nearly, ``length`` tokens less the answer; or those of a file."""
        path = quality.data.get(self.name)
        if path is None and self.set.generate is None:
            raise DataError(
                f"{self.name} needs a file",
                why="its questions come from another data set",
                remedy=f"give SQuAD 2.0, HotpotQA or the benchmark's own file: --data {self.name}=FILE",
            )
        limits = self.limits()
        if path is not None:
            found = read(self.name, self._set, path, self._room(loaded, limits), quality.limit)
            if isinstance(found, list):
                return [_example(str(i), sample) for i, sample in enumerate(found)]
            library: Library | None = found
        else:
            library = None
        if self.length > loaded.context:
            raise UsageError(
                f"the length {self.length} of {self.name} does not fit {loaded.name}",
                why=f"its context is {loaded.context} tokens",
                remedy=f"use a shorter one, for example {self.name}(length={loaded.context})",
            )
        items = at_most(self.items if library is None else min(self.items, len(library.questions)), quality)
        examples, units = [], self.set.least
        for i in range(items):
            example, units = self._fitted(loaded, cell.axes.seed, i, library, units)
            examples.append(example)
        return examples

    def _fitted(
        self, loaded: LoadedModel, seed: int, index: int, library: Library | None, guess: int
    ) -> tuple[Example, int]:
        """The example with as many units as fit ``length``, and their number; ``guess`` is that of another example."""
        limits, most, least = self.limits(), None, self.set.least
        if library is not None:
            most, least = len(library.documents), len(library.questions[index].documents)

        def build(units: int) -> Example:
            draw = random.Random(f"d2obench/{self.name}/{self.length}/{seed}/{index}")
            if library is not None:
                sample = _from_library(draw, library, library.questions[index], units)
            else:
                assert self.set.generate is not None
                sample = self.set.generate(draw, units, self.length)
            return _example(str(index), sample)

        room = self.length - limits.max_new
        units = most_units(lambda count: prompt_tokens(loaded, build(count), limits), room, least, most, guess)
        if units is None:
            raise UsageError(
                f"the length {self.length} is too short for {self.name}",
                why=f"its shortest prompt has {prompt_tokens(loaded, build(least), limits)} tokens, and the answer "
                f"{limits.max_new}",
                remedy="use a longer one",
            )
        return build(units), units

    def _room(self, loaded: LoadedModel, limits: Limits) -> Callable[[str, Sample], BadField | None]:
        """Says of a prompt in a file whether it is too long: without its middle it would have no answer."""

        def check(field: str, sample: Sample) -> BadField | None:
            tokens, room = prompt_tokens(loaded, _example("", sample), limits), loaded.context - limits.max_new
            why = f"its prompt has {tokens} tokens; beside the answer, {max(0, room)} fit {loaded.name}"
            return BadField(field, why) if tokens > room else None

        return check

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`Task.work`; the gold answer is scored beside the generated one."""
        new = self.set.max_new
        return Work(at_most(self.items, quality), min(self.length, context) - new, new + 30)

    def scores(self, item: Item) -> dict[str, float]:
        """The benchmark's string match."""
        return {"score": string_match(item["text"], item["answers"], part=self.set.part)}


def string_match(text: str, answers: list[str], *, part: bool) -> float:
    """The share of the answers that ``text`` contains; with ``part``, 1 if it contains one of them. Case does not
    matter."""
    plain = _CONTROL.sub("\n", text.strip()).strip().lower()
    hits = [answer.lower() in plain for answer in answers]
    return float(any(hits)) if part else sum(hits) / len(hits)


def most_units(tokens: Callable[[int], int], room: int, least: int, most: int | None, guess: int) -> int | None:
    """Nearly the largest number of units, between ``least`` and ``most``, whose prompt has at most ``room`` tokens.

    Args:
        tokens: units → tokens of the prompt, which grow together.
        guess: where to begin the search.

    Returns:
        A number to within half a percent of the largest one; None if even ``least`` units are too many.
    """
    # 1. a number that fits and a larger one that does not, by steps that double
    top = most if most is not None else 2**40
    low = high = min(max(guess, least), top)
    size, step = tokens(low), max(1, low // 16)
    fits, over = (size, 0) if size <= room else (0, size)
    while not fits:
        if low == least:
            return None
        high, over = low, size
        low, step = max(least, low - step), 2 * step
        size = tokens(low)
        fits = size if size <= room else 0
    while not over:
        if low == top:
            return low
        high, step = min(top, low + step), 2 * step
        size = tokens(high)
        if size <= room:
            low, fits = high, size
        else:
            over = size
    # 2. interpolate between the two
    while high - low > max(1, low // 200):
        between = low + (room - fits) * (high - low) // (over - fits)
        between = min(max(between, low + 1), high - 1)
        size = tokens(between)
        if size > room:
            high, over = between, size
        else:
            low, fits = between, size
    return low


def _example(name: str, sample: Sample) -> Example:
    return Example(
        name,
        name,
        sample.context + sample.question,
        sample.prefix,
        (" " + ", ".join(sample.answers),),
        {"answers": list(sample.answers)},
        sample.question,
    )


def _from_library(draw: random.Random, library: Library, asked: Asked, units: int) -> Sample:
    """A question with its documents among others: those of the same article first, then any; shuffled."""
    own, near = asked.documents, asked.related
    more = max(0, units - len(own))
    if more <= len(near):
        chosen = own + draw.sample(near, more)
    else:
        known = {*own, *near}
        others = [number for number in range(len(library.documents)) if number not in known]
        chosen = own + near + draw.sample(others, min(len(others), more - len(near)))
    draw.shuffle(chosen)
    return among_documents([library.documents[number] for number in chosen], asked.question, asked.answers)
