"""The loop of every task in which the model answers: score given answers, then generate one.

1. The session reads and compresses a batch of prompts, all but their last tokens. The last token is fed after
   compression, so that the first token of the answer, on which a short answer often depends, already comes from the
   compressed cache. With the full cache this changes nothing.
2. The state is saved. Each candidate (the gold answer first) is fed from it, and its log-probabilities are summed.
3. The state is restored, and the model answers greedily. Each sequence ends by itself: at an end-of-text token, at a
   stop string, or after ``max_new`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from d2obench.record import Value
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, Evaluation, Item, Quality, Report, Task, Work, at_most, kept_of
from d2obench.tasks.prompts import Example, Limits, Prompt, encode, prompt_digest

if TYPE_CHECKING:
    import torch

    from d2obench.cache import Session
    from d2obench.models import LoadedModel
    from d2obench.policies.base import Policy
    from d2obench.policies.yardsticks import Yardstick
    from d2obench.suite.grammar import Budget


class Generative(Task, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of tasks in which the model answers: a subclass gives the examples and scores the answers."""

    typical: ClassVar[tuple[int, int] | None] = None
    """Number of records of the data set and tokens of a prompt, in round figures, for :meth:`work`."""

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The prompts of this cell."""
        raise TypeError(f"{type(self).__name__} has no examples")

    def scores(self, item: Item) -> dict[str, float]:
        """The figures of one item, from its ``text`` and the fields in ``Example.keep``, by metric."""
        raise TypeError(f"{type(self).__name__} has no scores")

    def limits(self) -> Limits:
        """How long an answer may be and where it ends."""
        return Limits()

    def evaluate(self, loaded: LoadedModel, cell: Cell, quality: Quality, report: Report) -> Evaluation:
        """See :meth:`Task.evaluate`."""
        items = generate(loaded, cell, self.examples(loaded, cell, quality), self.limits(), quality.batch, report)
        for item in items:
            item |= self.scores(item)
        return Evaluation(super().rescore(items), items, self.details(items))

    def details(self, items: Sequence[Item]) -> dict[str, Any]:
        """Details of the row, for some views."""
        truncated = sum(item["truncated"] for item in items)
        return {"items": len(items), **({"truncated": truncated} if truncated else {})}

    def rescore(self, items: list[Item]) -> dict[str, Value]:
        """See :meth:`Task.rescore`; the recorded answers are scored again."""
        return super().rescore([item | self.scores(item) for item in items])

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`Task.work`; every answer is assumed to be as long as allowed."""
        if self.typical is None:
            return None
        records, prompt = self.typical
        new = self.limits().max_new
        return Work(at_most(records, quality), min(prompt, context - new), new)


def generate(
    loaded: LoadedModel, cell: Cell, examples: Sequence[Example], limits: Limits, batch: int, report: Report
) -> list[Item]:
    """Answers every example and returns one item for each, in the order of the examples.

    Raises:
        UsageError: the model's context is too short for a prompt.
    """
    import torch

    prompts = [encode(loaded, example, limits) for example in examples]
    # Batch prompts of similar length, to pad little. The longest come first, so that a lack of memory shows at once.
    order = sorted(range(len(examples)), key=lambda i: -len(prompts[i].ids))
    items: dict[int, Item] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        with torch.inference_mode():
            answers = _answer(loaded, cell, [prompts[i] for i in part], limits)
        for i, answer in zip(part, answers, strict=True):
            items[i] = {
                "id": examples[i].id,
                "document": examples[i].document,
                "prompt_digest": prompt_digest(prompts[i].ids),
                "prompt_tokens": len(prompts[i].ids),
                "truncated": prompts[i].truncated,
                **examples[i].keep,
                **answer,
            }
        report(len(items), len(examples))
    return [items[i] for i in range(len(examples))]


def _answer(loaded: LoadedModel, cell: Cell, prompts: Sequence[Prompt], limits: Limits) -> list[Item]:
    """Runs one batch: the log-probabilities of the candidates, then the answers (see the module's docstring)."""
    tokenizer, asked = loaded.tokenizer, (cell.policy.built, cell.budget)
    longest = max([limits.max_new, *(len(c) for prompt in prompts for c in prompt.candidates)])
    ids = [prompt.ids for prompt in prompts]
    with compressed(loaded, *asked, ids, max_new=longest, seed=cell.axes.seed) as (session, first, known):
        scores: list[list[float]] = [[] for _ in prompts]
        rounds = max(len(prompt.candidates) for prompt in prompts)
        state = session.snapshot() if rounds else None
        for i in range(rounds):
            column = [prompt.candidates[i] if i < len(prompt.candidates) else [] for prompt in prompts]
            for row, (value, _), tokens in zip(scores, forced(session, first, column), column, strict=True):
                row += [value] if tokens else []
            session.restore(state)
        answers = greedy(session, first, limits, tokenizer, end_tokens(loaded))
    for prompt, row, kept, item in zip(prompts, scores, known, answers, strict=True):
        item |= kept
        if row:
            size = len(tokenizer.decode(prompt.candidates[0]).encode())
            item |= {"gold_logprob": row[0], "gold_bytes": size, "gold_bpb": -row[0] / (math.log(2) * max(1, size))}
        if len(row) > 1:
            item["candidate_logprobs"] = row
    return answers


@contextmanager
def compressed(
    loaded: LoadedModel,
    policy: Policy | Yardstick | str,
    budget: Budget | str | None,
    prompts: Sequence[list[int]],
    *,
    max_new: int,
    seed: int,
) -> Iterator[tuple[Session, torch.Tensor, list[Item]]]:
    """A session that has read and compressed the prompts.

    The last token of each prompt is fed after compression (see the module's docstring), unless a prompt has only one.

    Yields:
        The session, the logits ``[B, V]`` of the next tokens in float32, and for each prompt the fields of
        :func:`d2obench.tasks.base.kept_of`.
    """
    import torch

    from d2obench.external import open_session
    from d2obench.measure.finite import require_finite

    longer_than_one = min(map(len, prompts)) > 1
    session = open_session(loaded, policy, budget, max_new=max_new, seed=seed)
    try:
        first = session.prefill([ids[:-1] for ids in prompts] if longer_than_one else list(prompts))
        session.compress()
        known = kept_of(session)
        if longer_than_one:
            first = session.step(torch.tensor([ids[-1] for ids in prompts], device=loaded.device))
        require_finite(first, "after the prompt", session, prompts)
        yield session, first, known
    finally:
        session.close()


def forced(session: Session, first: torch.Tensor, column: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Feeds one continuation per sequence, from the session's present state.

    Args:
        session: at the end of the prompts.
        first: logits ``[B, V]`` of the next tokens.
        column: the tokens of each sequence's continuation; lengths may differ.

    Returns:
        For each sequence the sum of the log-probabilities in nats, and whether greedy decoding would have produced it.
    """
    import torch

    from d2obench.measure.finite import require_finite

    total = torch.zeros(len(column), dtype=torch.float64)
    best = torch.ones(len(column), dtype=torch.bool)
    logits, longest = first, max(map(len, column))
    for i in range(longest):
        present = torch.tensor([i < len(tokens) for tokens in column])
        target = torch.tensor([tokens[i] if i < len(tokens) else 0 for tokens in column], device=logits.device)
        logprobs = logits.float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
        total += torch.where(present, logprobs.cpu().double(), 0.0)
        best &= ~present | (logits.argmax(-1) == target).cpu()
        if i + 1 < longest:
            logits = session.step(target)
            require_finite(logits, "while candidates are scored", session)
    return list(zip(total.tolist(), best.tolist(), strict=True))


def greedy(session: Session, first: torch.Tensor, limits: Limits, tokenizer: Any, ends: frozenset[int]) -> list[Item]:
    """Continues each sequence greedily from the session's present state.

    Returns:
        For each sequence its ``text``, the number of ``generated`` tokens, and how it ``ended``: by an ``end`` token,
        at a ``stop`` string, or by its ``length``.
    """
    from d2obench.measure.finite import require_finite

    # written: the tokens of each answer; a sequence that has ended goes on in the batch, and its tokens are ignored.
    tokens = first.argmax(-1)
    written: list[list[int]] = [[] for _ in range(len(tokens))]
    items: list[Item] = [{"text": "", "generated": 0, "ended": "length"} for _ in written]
    unfinished = set(range(len(written)))
    strip = bool(limits.stop) and limits.strip

    def answer_of(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text.lstrip() if strip else text

    for step in range(limits.max_new):
        for i, token in enumerate(tokens.tolist()):
            if i not in unfinished:
                continue
            if token in ends:
                items[i]["ended"] = "end"
                unfinished.discard(i)
                continue
            written[i].append(token)
            items[i]["generated"] += 1
            text = answer_of(written[i]) if limits.stop else ""
            if any(stop in text for stop in limits.stop):
                items[i]["ended"] = "stop"
                unfinished.discard(i)
        if not unfinished or step + 1 == limits.max_new:
            break
        logits = session.step(tokens)
        require_finite(logits, "while the answer is generated", session)
        tokens = logits.argmax(-1)
    for item, ids in zip(items, written, strict=True):
        text = answer_of(ids)
        item["text"] = text[: min([len(text), *(text.find(stop) for stop in limits.stop if stop in text)])]
    return items


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end a text, of the model's generation configuration and of the tokenizer."""
    configured = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    of_model = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(int(token) for token in [*of_model, loaded.tokenizer.eos_token_id] if token is not None)
