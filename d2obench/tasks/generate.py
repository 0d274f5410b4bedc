"""The one loop of every task that lets the model answer: score the gold answer, then generate.

A batch is left-padded by the session. The last prompt token is held back: it is fed after compression, so that the
first answer token, often all that a short answer hangs on, already comes from the compressed cache; with the full
cache this changes nothing. From the state after it the cache is forked: candidates (the gold answer first) are fed to
sum their log-probabilities, then the state is restored and the model answers greedily until its end-of-text token, a
stop string, or ``max_new`` tokens, each sequence for itself.

A prompt that does not fit the context loses tokens from its middle, as in LongBench (arXiv 2308.14508, section 4.1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from d2obench.record import Value
from d2obench.tasks.base import Evaluation, Item, Report, Task
from d2obench.tasks.prompts import Example, Limits, Prompt, encode
from d2obench.tasks.values import kept_shares

if TYPE_CHECKING:
    import torch

    from d2obench.cache import Session
    from d2obench.models import LoadedModel
    from d2obench.suite.definition import Cell, Quality


class Generative(Task, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of tasks that generate: a subclass gives the examples and marks the items."""

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The prompts of this cell."""
        raise TypeError(f"{type(self).__name__} has no examples")

    def marks(self, item: Item) -> dict[str, float]:
        """Figures of one item from its ``text`` and what its example kept; pure."""
        raise TypeError(f"{type(self).__name__} has no marks")

    def limits(self) -> Limits:
        """How long answers are and where they stop."""
        return Limits()

    def evaluate(self, loaded: LoadedModel, cell: Cell, quality: Quality, report: Report) -> Evaluation:
        """See :meth:`Task.evaluate`."""
        items = generate(loaded, cell, self.examples(loaded, cell, quality), self.limits(), quality.batch, report)
        for item in items:
            item |= self.marks(item)
        return Evaluation(super().rescore(items), items, self.details(items))

    def details(self, items: Sequence[Item]) -> dict[str, Any]:
        """What only some views use."""
        truncated = sum(item["truncated"] for item in items)
        return {"items": len(items), **({"truncated": truncated} if truncated else {})}

    def rescore(self, items: list[Item]) -> dict[str, Value]:
        """See :meth:`Task.rescore`; predictions are marked anew."""
        return super().rescore([item | self.marks(item) for item in items])


def generate(
    loaded: LoadedModel, cell: Cell, examples: Sequence[Example], limits: Limits, batch: int, report: Report
) -> list[Item]:
    """Answers every example; items come in the order of the examples, whatever the order they ran in.

    Raises:
        UsageError: the model's context leaves no room for a prompt.
    """
    import torch

    prompts = [encode(loaded, example, limits) for example in examples]
    # Prompts of like length together: little padding, and the batch most likely not to fit comes first.
    order = sorted(range(len(examples)), key=lambda i: -len(prompts[i].ids))
    items: dict[int, Item] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        with torch.inference_mode():
            answers = _answer(loaded, cell, [prompts[i] for i in part], limits)
        for i, found in zip(part, answers, strict=True):
            items[i] = {
                "id": examples[i].id,
                "document": examples[i].document,
                "prompt_digest": hashlib.sha256(",".join(map(str, prompts[i].ids)).encode()).hexdigest()[:16],
                "prompt_tokens": len(prompts[i].ids),
                "truncated": prompts[i].truncated,
                **examples[i].keep,
                **found,
            }
        report(len(items), len(examples))
    return [items[i] for i in range(len(examples))]


def _answer(loaded: LoadedModel, cell: Cell, prompts: Sequence[Prompt], limits: Limits) -> list[Item]:
    """One batch: log-probabilities of the candidates, then the answers."""
    axes, tokenizer = cell.axes, loaded.tokenizer
    longest = max([limits.max_new, *(len(c) for prompt in prompts for c in prompt.candidates)])
    ids = [prompt.ids for prompt in prompts]
    with compressed(loaded, axes.policy, axes.budget, ids, max_new=longest, seed=axes.seed) as (session, first, shares):
        scores: list[list[float]] = [[] for _ in prompts]
        rounds = max(len(prompt.candidates) for prompt in prompts)
        state = session.snapshot() if rounds else None
        for i in range(rounds):
            column = [prompt.candidates[i] if i < len(prompt.candidates) else [] for prompt in prompts]
            for row, (value, _), tokens in zip(scores, forced(session, first, column), column, strict=True):
                row += [value] if tokens else []
            session.restore(state)
        answers = greedy(session, first, limits, tokenizer, end_tokens(loaded))
    for prompt, row, share, item in zip(prompts, scores, shares, answers, strict=True):
        item["kept"] = share
        if row:
            size = len(tokenizer.decode(prompt.candidates[0]).encode())
            item |= {"gold_logprob": row[0], "gold_bytes": size, "gold_bpb": -row[0] / (math.log(2) * max(1, size))}
        if len(row) > 1:
            item["candidate_logprobs"] = row
    return answers


@contextmanager
def compressed(
    loaded: LoadedModel, policy: str, budget: str | None, prompts: Sequence[list[int]], *, max_new: int, seed: int
) -> Iterator[tuple[Session, torch.Tensor, list[float]]]:
    """A session that has read and compressed the prompts, float32 logits ``[B, V]`` of their next tokens, and the share
    of each prompt that was kept.

    The last token of each is held back and fed after compression (see the module's head), unless a prompt has no other.
    """
    import torch

    from d2obench.cache import Session

    held = min(map(len, prompts)) > 1
    session = Session(loaded, policy, budget, max_new=max_new, seed=seed)
    try:
        first = session.prefill([ids[:-1] for ids in prompts] if held else list(prompts))
        session.compress()
        shares = kept_shares(session)
        if held:
            first = session.step(torch.tensor([ids[-1] for ids in prompts], device=loaded.device))
        yield session, first, shares
    finally:
        session.close()


def forced(session: Session, first: torch.Tensor, column: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """One continuation a sequence, fed from the session's present state: the sum of its log-probabilities in nats, and
    whether greedy decoding would have written it."""
    import torch

    total = torch.zeros(len(column), dtype=torch.float64)
    best = torch.ones(len(column), dtype=torch.bool)
    logits, longest = first, max(map(len, column))
    for i in range(longest):
        there = torch.tensor([i < len(tokens) for tokens in column])
        target = torch.tensor([tokens[i] if i < len(tokens) else 0 for tokens in column], device=logits.device)
        found = logits.float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
        total += torch.where(there, found.cpu().double(), 0.0)
        best &= ~there | (logits.argmax(-1) == target).cpu()
        if i + 1 < longest:
            logits = session.step(target)
    return list(zip(total.tolist(), best.tolist(), strict=True))


def greedy(session: Session, first: torch.Tensor, limits: Limits, tokenizer: Any, ends: frozenset[int]) -> list[Item]:
    """Each sequence's most likely answer from the session's present state: ``text``, ``generated`` tokens, and whether
    it ``ended`` by an end token, a stop string or its length."""
    tokens = first.argmax(-1)
    written: list[list[int]] = [[] for _ in range(len(tokens))]
    items: list[Item] = [{"text": "", "generated": 0, "ended": "length"} for _ in written]
    going = set(range(len(written)))
    strip = bool(limits.stop) and limits.strip

    def shown(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text.lstrip() if strip else text

    for step in range(limits.max_new):
        for i, token in enumerate(tokens.tolist()):
            if i not in going:
                continue
            if token in ends:
                items[i]["ended"] = "end"
                going.discard(i)
                continue
            written[i].append(token)
            items[i]["generated"] += 1
            text = shown(written[i]) if limits.stop else ""
            if any(word in text for word in limits.stop):
                items[i]["ended"] = "stop"
                going.discard(i)
        if not going or step + 1 == limits.max_new:
            break
        tokens = session.step(tokens).argmax(-1)
    for item, ids in zip(items, written, strict=True):
        text = shown(ids)
        item["text"] = text[: min([len(text), *(text.find(word) for word in limits.stop if word in text)])]
    return items


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end a text, as model and tokenizer name them."""
    configured = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    found = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(int(token) for token in [*found, loaded.tokenizer.eos_token_id] if token is not None)
