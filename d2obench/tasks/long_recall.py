"""Long recall: a fact that is stated while the model decodes, and asked for at the end.

A chronicle is fed token by token, as if the model had written it, whatever it would have written itself (teacher
forcing). So every token is decoded, and what a policy keeps of a long generation decides whether a fact stated once in
it can be repeated. A small model can do this, which could not write a thousand coherent tokens of its own. Use policies
with ``protect=prompt``, or budgets in tokens: a ratio is one of the prompt otherwise, which is short here.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from d2obench.errors import UsageError
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, Count, Item, Prefill, Quality, TextBatch, Work, at_most
from d2obench.tasks.generate import Generative, about, after_prompt, compressed_contexts
from d2obench.tasks.prompts import Example, Limits, Prompt, encode, prompt_tokens, token_counter
from d2obench.tasks.scoring import begins_with
from d2obench.texts.writer import document, document_seed

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

ASK = "Write a chronicle of a small country. At its end, repeat one thing that you have told."
REPEAT = "\n\nTo repeat one thing that was told above: "
MARGIN = 16
"""Tokens by which a chronicle is made longer until it has enough."""


class LongRecall(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A fact stated while a long text is decoded, asked for at its end: exact match and bits per byte.

    ``steps`` is the number of tokens that are decoded between the prompt and the answer.
    """

    items: Count = 8
    steps: Count = 1024

    def limits(self) -> Limits:
        """A word or a number."""
        return Limits(max_new=10, stop=("\n", "."))

    def batches(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[TextBatch]:
        """See :meth:`Task.batches`; every item has a chronicle of its own, and facts at depths spread evenly."""
        ask = prompt_tokens(loaded, Example("", "", ASK), self.limits())
        needed = ask + self.steps + 4 * MARGIN + self.limits().max_new
        fit = max(1, loaded.context - needed + self.steps)
        if needed > loaded.context:
            raise UsageError(
                f"{self.steps} steps of {self.name} do not fit {loaded.name}",
                why=f"its context is {loaded.context} tokens, and {needed} are needed",
                remedy=f"use fewer steps, for example {self.name}(steps={fit})",
            )
        count, seed = at_most(self.items, quality), cell.axes.seed
        examples = [self._example(loaded, ask, seed, i, (i + 0.5) / count) for i in range(count)]
        pairs = [(example, encode(loaded, example, self.limits())) for example in examples]
        starts = range(0, count, quality.batch)
        parts = [pairs[start : start + quality.batch] for start in starts]
        return [TextBatch(range(start, start + len(part)), part) for start, part in zip(starts, parts, strict=True)]

    def run(self, loaded: LoadedModel, cell: Cell, batch: TextBatch, prefill: Prefill) -> list[Item]:
        """See :meth:`Task.run`."""
        import torch

        pairs: list[tuple[Example, Prompt]] = batch.texts
        limits, prompts = self.limits(), [prompt for _, prompt in pairs]
        read = [prompt.ids[: len(prompt.ids) - self.steps] for prompt in prompts]
        told = torch.tensor([prompt.ids[len(prompt.ids) - self.steps :] for prompt in prompts], device=loaded.device)
        longest = self.steps + max([limits.max_new, *(len(one) for prompt in prompts for one in prompt.candidates)])
        policy, seed = cell.policy.built, cell.axes.seed
        with (
            torch.inference_mode(),
            compressed_contexts(loaded, policy, cell.budget, read, max_new=longest, seed=seed, prefill=prefill) as made,
        ):
            session, first, known = made
            for tokens in told.unbind(1):
                first = session.step(tokens)
            answers = after_prompt(loaded, session, first, prompts, limits)
        items = []
        for (example, prompt), ids, found, kept in zip(pairs, read, answers, known, strict=True):
            item = {**about(example, prompt), "prompt_tokens": len(ids), "decoded": self.steps, **found, **kept}
            items.append(item | self.scores(item))
        return items

    def _example(self, loaded: LoadedModel, ask: int, seed: int, index: int, depth: float) -> Example:
        """A chronicle with which the prompt, all that comes before the answer, has at least ``steps`` tokens more than
        the request for it."""
        size = self.steps
        while True:
            written = document(document_seed(seed, index), size, token_counter(loaded), "long-recall")
            near = sorted(written.facts, key=lambda fact: abs(fact.at / len(written.text) - depth))[:2]
            if near:
                fact = random.Random(f"d2obench/long-recall/{seed}/{index}").choice(near)
                keep = {"depth": round(fact.at / len(written.text), 4), "gold": fact.answer}
                stub = f" {written.text}{REPEAT}{fact.stub}"
                example = Example(str(index), str(index), ASK, stub, (" " + fact.answer,), keep)
                if prompt_tokens(loaded, example, self.limits()) >= ask + self.steps:
                    return example
            size += MARGIN

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`Task.work`; the gold answer is scored beside the generated one."""
        return Work(at_most(self.items, quality), 2 * MARGIN, self.steps + 2 * self.limits().max_new)

    def scores(self, item: Item) -> dict[str, float]:
        """1 where the answer begins with the gold word or number, else 0."""
        return {"score": float(begins_with(item["text"], item["gold"]))}
