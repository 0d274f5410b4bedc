"""Makes prompts from examples: chat template, truncation in the middle, given lengths; and prompts for timed cells."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

_TAIL = 64
"""Characters of a prompt's end that are tokenized together with an answer; see :func:`_continuation`."""
_SHORTEST = 16
"""Tokens that the context must leave for a prompt."""


@dataclass(frozen=True)
class Example:
    """One prompt and what is scored after it.

    Args:
        id: unique within the task.
        document: what intervals are clustered by.
        prompt: what the user says; the part that is truncated.
        question: the end of ``prompt`` that asks, where a context comes before it: with ``query=unseen`` it is read
            after the context has been compressed.
        stub: the beginning of the answer, given to the model.
        candidates: continuations whose log-probabilities are computed, the gold answer first.
        keep: fields that scoring needs; they are copied into the item.
    """

    id: str
    document: str
    prompt: str
    stub: str = ""
    candidates: tuple[str, ...] = ()
    keep: Mapping[str, Any] = field(default_factory=dict)
    question: str = ""

    @property
    def context(self) -> str:
        """The part of ``prompt`` before the question."""
        return self.prompt[: len(self.prompt) - len(self.question)]


@dataclass(frozen=True)
class Prompt:
    """An example's tokens, as the model reads them.

    Args:
        ids: the whole prompt.
        candidates: the continuations to score.
        truncated: whether a part of its middle was left out.
        asked: how many of ``ids`` are read after compression; the last one alone, unless the question is to be unseen.
    """

    ids: list[int]
    candidates: list[list[int]]
    truncated: bool
    asked: int = 1

    @property
    def context(self) -> list[int]:
        """The tokens that are read before compression."""
        return self.ids[: len(self.ids) - self.asked]

    @property
    def question(self) -> list[int]:
        """The tokens that are read after compression."""
        return self.ids[len(self.ids) - self.asked :]


@dataclass(frozen=True)
class Limits:
    """Where an answer ends.

    Args:
        max_new: the largest number of generated tokens.
        stop: strings that end an answer; the answer is cut before them.
        strip: whether white space at the beginning of the answer is removed before stop strings are looked for.
        chat: whether to use the model's chat template where it has one.
        max_prompt: the largest number of tokens of a prompt; None: what the context leaves.
    """

    max_new: int = 64
    stop: tuple[str, ...] = ()
    strip: bool = True
    chat: bool = True
    max_prompt: int | None = None


def encode(loaded: LoadedModel, example: Example, limits: Limits) -> Prompt:
    """The tokens of an example; its middle is left out as far as the context requires (LongBench's rule, section 4.1
    of arXiv 2308.14508).

    Raises:
        UsageError: the context leaves too little for any prompt, or for the question.
    """
    # 1. the whole prompt, and the candidates as they would follow it
    text, ids = _rendered(loaded.tokenizer, example.prompt, example.stub, limits.chat)
    candidates = _candidates(loaded.tokenizer, text, example, limits)
    available = _available(loaded, [candidates], limits)
    if len(ids) <= available:
        return Prompt(ids, candidates, False, min(1, len(ids) - 1))
    # 2. Take tokens out of the middle of the prompt alone, never out of the template around it. The shortened text
    #    can tokenize to more than it was cut to, so repeat until it fits.
    body = _tokens(loaded.tokenizer, example.prompt)
    keep = len(body)
    while len(ids) > available:
        keep -= len(ids) - available
        short = _without_middle(loaded.tokenizer, body, keep)
        if short is None or keep - keep // 2 < len(_tokens(loaded.tokenizer, example.question)):
            raise _no_room(example, available)
        _, ids = _rendered(loaded.tokenizer, short, example.stub, limits.chat)
    return Prompt(ids, candidates, True, min(1, len(ids) - 1))


def encode_unseen(loaded: LoadedModel, examples: Sequence[Example], limits: Limits) -> list[Prompt]:
    """The tokens of examples that share one context, in two parts: the context, which is the same for all of them and
    is read before compression, and each question with all that follows it.

    Where nothing has to be left out, the whole prompt has the same tokens as :func:`encode` gives. Otherwise only the
    context loses its middle, as much as the longest of the questions requires.

    Raises:
        UsageError: an example has no question or no context, or no room is left for it beside the answer.
    """
    tokenizer = loaded.tokenizer
    for example in examples:
        for part, text in (("question", example.question), ("context", example.context)):
            if not text.strip():
                raise UsageError(
                    f"item {example.id} has no {part}",
                    why="query=unseen compresses the context before the question is read",
                    remedy="use query=seen, or data in which both are there",
                )
    # 1. the whole prompts, and what the context of the model leaves for the longest of them
    rendered = [_rendered(tokenizer, example.prompt, example.stub, limits.chat) for example in examples]
    candidates = [
        _candidates(tokenizer, text, example, limits) for (text, _), example in zip(rendered, examples, strict=True)
    ]
    available = _available(loaded, candidates, limits)
    longest = max(range(len(examples)), key=lambda i: len(rendered[i][1]))
    # 2. take tokens out of the middle of the context until all of them fit
    body = _tokens(tokenizer, examples[0].context)
    keep, truncated = len(body), False
    while (over := max(len(ids) for _, ids in rendered) - available) > 0:
        keep, truncated = keep - over, True
        short = _without_middle(tokenizer, body, keep)
        if short is None:
            raise _no_room(examples[longest], available)
        rendered = [_rendered(tokenizer, short + one.question, one.stub, limits.chat) for one in examples]
    # 3. Split where the question begins. A token may reach from the context into the question: then it belongs to the
    #    question, so that nothing of the question is seen early.
    context = min(
        _context_tokens(tokenizer, text, ids, example.question, limits.chat)
        for (text, ids), example in zip(rendered, examples, strict=True)
    )
    return [
        Prompt(ids, given, truncated, len(ids) - context) for (_, ids), given in zip(rendered, candidates, strict=True)
    ]


def _context_tokens(tokenizer: Any, text: str, ids: Sequence[int], question: str, chat: bool) -> int:
    """How many of the first tokens of a rendered prompt hold nothing of the question."""
    start = text.rfind(question.rstrip())
    if start < 0:
        raise UsageError("the chat template changes the question", remedy="use query=seen with this model")
    alone = tokenizer(text[:start], add_special_tokens=not (chat and has_chat(tokenizer)), verbose=False)["input_ids"]
    pairs = zip(alone, ids, strict=False)
    return max(1, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _candidates(tokenizer: Any, text: str, example: Example, limits: Limits) -> list[list[int]]:
    """The tokens of the candidates. A single candidate, the gold answer, may be as long as an answer; of several, which
    are compared with each other, none is cut."""
    cap = limits.max_new if len(example.candidates) == 1 else None
    return [_continuation(tokenizer, text, candidate)[:cap] for candidate in example.candidates]


def _available(loaded: LoadedModel, candidates: Sequence[list[list[int]]], limits: Limits) -> int:
    """What the model's context leaves for a prompt."""
    available = loaded.context - max([limits.max_new, *(len(one) for given in candidates for one in given)])
    available = min(available, limits.max_prompt or available)
    if available < _SHORTEST:
        raise UsageError(
            f"the context of {loaded.name} is too short for this task",
            why=f"of its {loaded.context} tokens the answer leaves {max(0, available)} for the prompt",
            remedy="use a model with a longer context, or a smaller max_new",
        )
    return available


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _without_middle(tokenizer: Any, body: Sequence[int], keep: int) -> str | None:
    """A text of the first and the last of ``keep`` tokens of ``body``; None where hardly any would be left."""
    if keep < 2:
        return None
    first: str = tokenizer.decode(body[: keep // 2])
    return first + str(tokenizer.decode(body[len(body) - (keep - keep // 2) :]))


def _no_room(example: Example, available: int) -> UsageError:
    """The error for a prompt of which too little would be left."""
    if example.question:
        return UsageError(
            f"no room is left for the question of item {example.id}",
            why=f"beside the answer there are {available} tokens for the context and the question",
            remedy="use a smaller max_new, or a model with a longer context",
        )
    return UsageError(
        f"no prompt fits into {available} tokens",
        why="the text around it (chat template, beginning of the answer) is longer than that",
        remedy="use a model with a longer context",
    )


def fitted(loaded: LoadedModel, limits: Limits, tokens: int, build: Callable[[int], Example | None]) -> Example:
    """The example whose prompt has at most, and nearly, ``tokens`` tokens.

    Args:
        build: tokens that its document may have → the example, or None where they are too few for one.

    Raises:
        UsageError: ``tokens`` are too few for any example.
    """
    document = tokens
    while document > 0:
        example = build(document)
        if example is None:
            break
        over = len(encode(loaded, example, limits).ids) - tokens
        if over <= 0:
            return example
        document -= over
    raise UsageError(f"a prompt of {tokens} tokens is too short for this task", remedy="use at least 256 tokens")


def prompt_tokens(loaded: LoadedModel, example: Example, limits: Limits) -> int:
    """How many tokens an example's whole prompt has, with the template around it."""
    return len(_rendered(loaded.tokenizer, example.prompt, example.stub, limits.chat)[1])


def token_counter(loaded: LoadedModel) -> Callable[[str], int]:
    """A function from a text to its number of tokens, without special ones."""

    def count(text: str) -> int:
        return len(_tokens(loaded.tokenizer, text))

    return count


def has_chat(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_digest(ids: Sequence[int]) -> str:
    """Sixteen hex digits that identify a prompt, so that rows on the same prompts can be paired."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def timing_prompts(loaded: LoadedModel, prompt: int, batch: int, seed: int) -> list[list[int]]:
    """``batch`` different prompts of ``prompt`` tokens for timed cells; the same ones for every policy.

    Readable text where the model has a tokenizer, seeded random tokens where it has none.
    """
    if loaded.tokenizer is None:
        vocab = loaded.model.config.get_text_config().vocab_size
        return [random.Random(f"{seed}/{i}").choices(range(vocab), k=prompt) for i in range(batch)]
    from d2obench.texts.writer import token_ids

    start = loaded.tokenizer("")["input_ids"][:1]  # the token that begins a text, where the model has one

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return [[*start, *token_ids(1000 * seed + i, prompt, encode, theme="speed")][:prompt] for i in range(batch)]


def _rendered(tokenizer: Any, prompt: str, stub: str, chat: bool) -> tuple[str, list[int]]:
    templated = chat and has_chat(tokenizer)
    text = prompt
    if templated:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text += stub.lstrip() if templated else stub
    return text, tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"]


def _continuation(tokenizer: Any, text: str, answer: str) -> list[int]:
    """The tokens of ``answer`` as they follow ``text``.

    A tokenizer may join the first word of an answer with what stands before it, so the answer is tokenized together
    with the end of the text and that end's tokens are taken off again. Where they don't come out the same, the answer
    is tokenized alone.
    """
    tail = text[-_TAIL:]
    if tail[-1:].isspace():
        answer = answer.lstrip(" ")
    before = tokenizer(tail, add_special_tokens=False)["input_ids"]
    both = tokenizer(tail + answer, add_special_tokens=False)["input_ids"]
    if both[: len(before)] == before:
        ids: list[int] = both[len(before) :]
    else:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids
