"""The loop of every task in which the model answers: score given answers, then generate one.

1. The session reads and compresses a batch of contexts. With ``query=seen`` a context is the whole prompt but for its
   last token, which is fed after compression, so that the first token of the answer, on which a short answer often
   depends, already comes from the compressed cache. With the full cache this changes nothing. With ``query=unseen`` a
   context ends where the question begins, and the question is read after compression as a new turn, which is then
   compressed together with what was kept. Questions with the same context are asked from copies of its compressed
   cache.
2. The state is saved. Each candidate (the gold answer first) is fed from it, and its log-probabilities are summed.
3. The state is restored, and the model answers greedily. Each sequence ends by itself: at an end-of-text token, at a
   stop string, or after ``max_new`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from d2obench.record import Value
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import (
    Cell,
    Evaluation,
    Item,
    Prefill,
    Quality,
    Report,
    Task,
    TextBatch,
    Work,
    at_most,
    kept_of,
    prefill,
)
from d2obench.tasks.chat_template import switched
from d2obench.tasks.prompts import Example, Limits, Prompt, encode, encode_unseen, prompt_digest

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

    template: tuple[str, ...] = ()
    """Switches of the chat template (:mod:`d2obench.tasks.chat_template`)."""

    def examples(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[Example]:
        """The prompts of this cell."""
        raise TypeError(f"{type(self).__name__} has no examples")

    def scores(self, item: Item) -> dict[str, float]:
        """The figures of one item, from its ``text`` and the fields in ``Example.keep``, by metric."""
        raise TypeError(f"{type(self).__name__} has no scores")

    def limits(self) -> Limits:
        """How long an answer may be and where it ends."""
        return Limits()

    @property
    def unseen(self) -> bool:
        """Whether the question is read after the context has been compressed."""
        return False

    def batches(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[TextBatch]:
        """See :meth:`Task.batches`."""
        limits = self.limits()
        loaded = switched(loaded, self.name, self.template, chat=limits.chat)
        examples = self.examples(loaded, cell, quality)
        return batches_of(loaded, examples, limits, quality.batch, unseen=self.unseen)

    def run(self, loaded: LoadedModel, cell: Cell, batch: TextBatch, prefill: Prefill) -> list[Item]:
        """See :meth:`Task.run`."""
        return [item | self.scores(item) for item in answer(loaded, cell, batch.texts, prefill)]

    def conclude(self, cell: Cell, quality: Quality, items: list[Item]) -> Evaluation:
        """See :meth:`Task.conclude`."""
        return Evaluation(self.rescore(items), items, self.details(items))

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


class Questions(Generative, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of tasks that ask about a context; the examples name their ``question``.

    ``query`` says whether the question is in the prompt when the prompt is compressed (``seen``), or is asked only
    after the context has been compressed (``unseen``), as when many questions are asked about one document. A policy
    that keeps what the last queries attend to can keep what answers the question only if it has seen it.
    """

    query: Literal["seen", "unseen"] = "seen"

    @property
    def unseen(self) -> bool:
        """Whether the question is read after the context has been compressed."""
        return self.query == "unseen"

    def details(self, items: Sequence[Item]) -> dict[str, Any]:
        """Details of the row, with what the question was when the context was compressed."""
        return {**super().details(items), "query": self.query}

    def rescore(self, items: list[Item]) -> dict[str, Value]:
        """See :meth:`Task.rescore`; with ``query=unseen`` also the number of questions asked from one compression."""
        figures = super().rescore(items)
        contexts = {item["context_digest"] for item in items if "context_digest" in item}
        return figures | ({"queries_per_context": Value(len(items) / len(contexts))} if contexts else {})


class Context(NamedTuple):
    """What is read and compressed once, and the places, among the examples, of the questions that are asked then."""

    ids: list[int]
    places: list[int]


class Asked(NamedTuple):
    """A batch of contexts, the example and the prompt of each place, and where all their answers end."""

    contexts: list[Context]
    examples: dict[int, Example]
    prompts: dict[int, Prompt]
    limits: Limits


def generate(
    loaded: LoadedModel,
    cell: Cell,
    examples: Sequence[Example],
    limits: Limits,
    batch: int,
    report: Report,
    *,
    unseen: bool = False,
) -> list[Item]:
    """Answers every example and returns one item for each, in the order of the examples.

    Raises:
        UsageError: the model's context is too short for a prompt.
    """
    items: dict[int, Item] = {}
    for part in batches_of(loaded, examples, limits, batch, unseen=unseen):
        items |= zip(part.places, answer(loaded, cell, part.texts, prefill), strict=True)
        report(len(items), len(examples))
    return [items[i] for i in range(len(examples))]


def batches_of(
    loaded: LoadedModel, examples: Sequence[Example], limits: Limits, batch: int, *, unseen: bool
) -> list[TextBatch]:
    """The contexts of the examples, ``batch`` at a time, with the questions that are asked about each."""
    prompts = encode_all(loaded, examples, limits, unseen=unseen)
    contexts = contexts_of(prompts, shared=unseen)
    found = []
    for start in range(0, len(contexts), batch):
        part = contexts[start : start + batch]
        places = [i for context in part for i in context.places]
        asked = Asked(part, {i: examples[i] for i in places}, {i: prompts[i] for i in places}, limits)
        found.append(TextBatch(places, asked))
    return found


def encode_all(loaded: LoadedModel, examples: Sequence[Example], limits: Limits, *, unseen: bool) -> list[Prompt]:
    """The tokens of all examples; with ``unseen``, examples with the same context get the same tokens for it."""
    if not unseen:
        return [encode(loaded, example, limits) for example in examples]
    alike: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        alike.setdefault(example.context, []).append(i)
    found: dict[int, Prompt] = {}
    for places in alike.values():
        found |= zip(places, encode_unseen(loaded, [examples[i] for i in places], limits), strict=True)
    return [found[i] for i in range(len(examples))]


def contexts_of(prompts: Sequence[Prompt], *, shared: bool) -> list[Context]:
    """What has to be compressed: a context for each prompt, or for all prompts that begin with it.

    Contexts of similar length stand together, so that a batch of them is padded little. The longest come first, so that
    a lack of memory shows at once.
    """
    found: dict[Any, Context] = {}
    for i, prompt in enumerate(prompts):
        key = tuple(prompt.context) if shared else i
        found.setdefault(key, Context(prompt.context or prompt.ids, [])).places.append(i)
    return sorted(found.values(), key=lambda context: -len(context.ids))


def rounds_of(contexts: Sequence[Context], prompts: Mapping[int, Prompt]) -> list[list[tuple[int, int]]]:
    """In which order a batch of contexts is asked: lists of pairs of a row of the batch and the place of a question.

    Questions of one round are equally long, because a turn of a batch can't be padded between a context and its
    question. A round has at most as many questions as there are contexts.
    """
    alike: dict[int, list[tuple[int, int]]] = {}
    for row, context in enumerate(contexts):
        for i in context.places:
            alike.setdefault(prompts[i].asked, []).append((row, i))
    most = len(contexts)
    return [pairs[start : start + most] for pairs in alike.values() for start in range(0, len(pairs), most)]


def answer(loaded: LoadedModel, cell: Cell, asked: Asked, prefill: Prefill) -> list[Item]:
    """Runs one batch of contexts: compresses them, asks the questions of each (see the module's docstring), and returns
    the items of all questions in the order of the contexts."""
    import torch

    contexts, examples, prompts, limits = asked
    places = [i for context in contexts for i in context.places]
    longest = max([limits.max_new, *(len(given) for i in places for given in prompts[i].candidates)])
    rounds = rounds_of(contexts, prompts)
    ids = [context.ids for context in contexts]
    if any(prompts[i].asked == 0 for i in places):  # nothing is asked after a prompt of a single token
        rounds, ids = [[*enumerate(places)]], [prompts[i].ids for i in places]
    items: dict[int, Item] = {}
    policy, seed = cell.policy.built, cell.axes.seed
    with (
        torch.inference_mode(),
        compressed_contexts(loaded, policy, cell.budget, ids, max_new=longest, seed=seed, prefill=prefill) as opened,
    ):
        session, first, known = opened
        for pairs in rounds:
            rows = [row for row, _ in pairs]
            whole = len(rounds) == 1 and rows == [*range(len(ids))]
            asking = session if whole else session.fork(rows)
            try:
                chosen = [prompts[i] for _, i in pairs]
                if all(len(prompt.ids) > len(ids[row]) for row, prompt in zip(rows, chosen, strict=True)):
                    first = asking.turn([prompt.question for prompt in chosen])
                answers = after_prompt(loaded, asking, first, chosen, limits)
            finally:
                if not whole:
                    asking.close()
            for (row, i), found in zip(pairs, answers, strict=True):
                items[i] = {**about(examples[i], prompts[i]), **found, **known[row]}
    return [items[i] for i in places]


def about(example: Example, prompt: Prompt) -> Item:
    """What an item says of its prompt."""
    unseen = {"context_digest": prompt_digest(prompt.context)} if prompt.asked > 1 else {}
    return {
        "id": example.id,
        "document": example.document,
        "prompt_digest": prompt_digest(prompt.ids),
        "prompt_tokens": len(prompt.ids),
        "truncated": prompt.truncated,
        **unseen,
        **example.keep,
    }


def after_prompt(
    loaded: LoadedModel, session: Session, first: torch.Tensor, prompts: Sequence[Prompt], limits: Limits
) -> list[Item]:
    """The log-probabilities of the candidates, then the answers, of a session that has read these prompts; ``first``
    are the logits ``[B, V]`` of the next tokens."""
    from d2obench.measure.finite import require_finite

    require_finite(first, "after the prompt", session, [prompt.ids for prompt in prompts])
    scores: list[list[float]] = [[] for _ in prompts]
    rounds = max(len(prompt.candidates) for prompt in prompts)
    state = session.snapshot() if rounds else None
    for i in range(rounds):
        column = [prompt.candidates[i] if i < len(prompt.candidates) else [] for prompt in prompts]
        for row, (value, _), tokens in zip(scores, forced(session, first, column), column, strict=True):
            row += [value] if tokens else []
        session.restore(state)
    answers = greedy(session, first, limits, loaded.tokenizer, end_tokens(loaded))
    for prompt, row, item in zip(prompts, scores, answers, strict=True):
        if row:
            size = len(loaded.tokenizer.decode(prompt.candidates[0]).encode())
            item |= {"gold_logprob": row[0], "gold_bytes": size, "gold_bpb": -row[0] / (math.log(2) * max(1, size))}
        if len(row) > 1:
            item["candidate_logprobs"] = row
    return answers


@contextmanager
def compressed_contexts(
    loaded: LoadedModel,
    policy: Policy | Yardstick | str,
    budget: Budget | str | None,
    contexts: Sequence[list[int]],
    *,
    max_new: int,
    seed: int,
    prefill: Prefill = prefill,
) -> Iterator[tuple[Session, torch.Tensor, list[Item]]]:
    """A session that has read and compressed the contexts, all of their tokens; ``prefill`` reads them.

    Yields:
        The session, the logits ``[B, V]`` after the contexts in float32, and for each context the fields of
        :func:`d2obench.tasks.base.kept_of`.
    """
    from d2obench.external import open_session

    session = open_session(loaded, policy, budget, max_new=max_new, seed=seed)
    try:
        first = prefill(session, contexts)
        session.compress()
        yield session, first, kept_of(session)
    finally:
        session.close()


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
    from d2obench.measure.finite import require_finite

    longer_than_one = min(map(len, prompts)) > 1
    read = [ids[:-1] for ids in prompts] if longer_than_one else list(prompts)
    with compressed_contexts(loaded, policy, budget, read, max_new=max_new, seed=seed) as (session, first, known):
        if longer_than_one:
            first = session.turn([ids[-1:] for ids in prompts])
        require_finite(first, "after the prompt", session, prompts)
        yield session, first, known


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
