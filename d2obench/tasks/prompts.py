"""Makes prompts from examples: chat template, truncation in the middle, given lengths; and prompts for timed cells."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Prompt:
    """An example's tokens, as the model reads them."""

    ids: list[int]
    candidates: list[list[int]]
    truncated: bool


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
        UsageError: the context leaves too little for any prompt.
    """
    tokenizer = loaded.tokenizer
    # 1. The whole prompt, and the candidates as they would follow it. A single candidate, the gold answer, may be as
    #    long as an answer; of several, which are compared with each other, none is cut.
    text, ids = _rendered(tokenizer, example.prompt, example.stub, limits.chat)
    cap = limits.max_new if len(example.candidates) == 1 else None
    candidates = [_continuation(tokenizer, text, candidate)[:cap] for candidate in example.candidates]
    # 2. What the context leaves for the prompt.
    available = loaded.context - max([limits.max_new, *map(len, candidates)])
    available = min(available, limits.max_prompt or available)
    if available < _SHORTEST:
        raise UsageError(
            f"the context of {loaded.name} is too short for this task",
            why=f"of its {loaded.context} tokens the answer leaves {max(0, available)} for the prompt",
            remedy="use a model with a longer context, or a smaller max_new",
        )
    # 3. Take tokens out of the middle of the prompt alone, never out of the template around it. The shortened text
    #    can tokenize to more than it was cut to, so repeat until it fits.
    truncated = len(ids) > available
    body = tokenizer(example.prompt, add_special_tokens=False, verbose=False)["input_ids"] if truncated else []
    keep = len(body)
    while len(ids) > available:
        keep -= len(ids) - available
        if keep < 2:
            raise UsageError(
                f"no prompt fits into {available} tokens",
                why="the text around it (chat template, beginning of the answer) is longer than that",
                remedy="use a model with a longer context",
            )
        short = tokenizer.decode(body[: keep // 2]) + tokenizer.decode(body[len(body) - (keep - keep // 2) :])
        _, ids = _rendered(tokenizer, short, example.stub, limits.chat)
    return Prompt(ids, candidates, truncated)


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


def token_counter(loaded: LoadedModel) -> Callable[[str], int]:
    """A function from a text to its number of tokens, without special ones."""

    def count(text: str) -> int:
        return len(loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

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
    from d2obench.tasks.text import token_ids

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
