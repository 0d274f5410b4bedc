"""Examples → tokens: chat template, truncation in the middle, and prompts of a wanted length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from d2obench.errors import UsageError

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

_TAIL = 64


@dataclass(frozen=True)
class Example:
    """One prompt and what is scored after it.

    Args:
        id: unique within the task.
        document: what intervals are clustered by.
        prompt: what the user says; the part that is truncated.
        stub: the beginning of the answer, given to the model.
        candidates: continuations whose log-probability is wanted, the gold answer first.
        keep: what scoring needs again later; copied into the item.
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
        max_new: tokens generated at most.
        stop: strings that end an answer; the answer is cut before them.
        strip: whether stop strings are looked for after leading white space only, which the answer then loses.
        chat: whether to use the model's chat template where it has one.
        max_prompt: tokens a prompt may have; None: what the context leaves.
    """

    max_new: int = 64
    stop: tuple[str, ...] = ()
    strip: bool = True
    chat: bool = True
    max_prompt: int | None = None


def encode(loaded: LoadedModel, example: Example, limits: Limits) -> Prompt:
    """Tokens of an example, its middle left out as far as the context asks."""
    tokenizer = loaded.tokenizer
    text, ids = _rendered(tokenizer, example.prompt, example.stub, limits.chat)
    cap = limits.max_new if len(example.candidates) == 1 else None
    candidates = [_continuation(tokenizer, text, candidate)[:cap] for candidate in example.candidates]
    room = loaded.context - max([limits.max_new, *map(len, candidates)])
    room = min(room, limits.max_prompt or room)
    if room < 16:
        why = f"it has {loaded.context} tokens"
        raise UsageError(f"the context of {loaded.name} leaves no room for a prompt", why=why)
    body = tokenizer(example.prompt, add_special_tokens=False, verbose=False)["input_ids"] if len(ids) > room else []
    keep, truncated = len(body), bool(body)
    while len(ids) > room:
        keep -= len(ids) - room
        if keep < 2:
            what = f"what surrounds a prompt alone is longer than {room} tokens"
            raise UsageError(what, remedy="use a model with a longer context")
        short = tokenizer.decode(body[: keep // 2]) + tokenizer.decode(body[len(body) - (keep - keep // 2) :])
        _, ids = _rendered(tokenizer, short, example.stub, limits.chat)
    return Prompt(ids, candidates, truncated)


def fitted(loaded: LoadedModel, limits: Limits, tokens: int, build: Callable[[int], Example | None]) -> Example:
    """The example whose prompt has at most, and nearly, ``tokens`` tokens.

    Args:
        build: tokens its document may have → the example, or None where that is too little for one.

    Raises:
        UsageError: ``tokens`` is too little for any.
    """
    room = tokens
    while room > 0:
        example = build(room)
        if example is None:
            break
        over = len(encode(loaded, example, limits).ids) - tokens
        if over <= 0:
            return example
        room -= over
    raise UsageError(f"a prompt of {tokens} tokens is too short for this task", remedy="use at least 256 tokens")


def size_by(loaded: LoadedModel) -> Callable[[str], int]:
    """Text → its number of tokens, special ones not counted."""

    def size(text: str) -> int:
        return len(loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return size


def has_chat(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _rendered(tokenizer: Any, prompt: str, stub: str, chat: bool) -> tuple[str, list[int]]:
    templated = chat and has_chat(tokenizer)
    text = prompt
    if templated:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    text += stub.lstrip() if templated else stub
    return text, tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"]


def _continuation(tokenizer: Any, text: str, answer: str) -> list[int]:
    """Tokens of ``answer`` as they would follow ``text``: a tokenizer may join them otherwise than alone."""
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
