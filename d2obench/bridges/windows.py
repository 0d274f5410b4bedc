"""Requests that score text → prompts and continuations that fit the context, in batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from d2obench.errors import UsageError


@dataclass(frozen=True)
class Window:
    """Tokens of one request: ``prompt`` is compressed, its tokens from ``opening`` on are scored before that, those of
    ``rest`` after."""

    prompt: tuple[int, ...]
    opening: int
    rest: tuple[int, ...]


def window(context: Sequence[int], continuation: Sequence[int], limit: int, *, rolling: bool) -> Window:
    """Splits a request; the context loses its beginning where both don't fit ``limit`` tokens (the last is never fed).

    Raises:
        UsageError: the continuation alone doesn't fit.
    """
    if len(continuation) > limit:
        what = f"a continuation of {len(continuation)} tokens is longer than the context of {limit}"
        raise UsageError(what, remedy="use a model with a longer context")
    tokens = tuple([*context, *continuation][-(limit + 1) :])
    known = len(tokens) - len(continuation)
    split = max(2, known, (len(tokens) + 1) // 2) if rolling or known == 1 else known
    return Window(tokens[:split], known, tokens[split:])


def batches(sizes: Sequence[tuple[int, int]], batch: int, limit: int) -> Iterator[list[int]]:
    """Indices of ``(prompt, new tokens)`` pairs, longest prompts first, in batches that fit the context together.

    A prompt of one token is never put with longer ones: of those the last token is held back.
    """
    part: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], -sizes[i][1])):
        prompt, new = sizes[part[0] if part else i][0], max(sizes[j][1] for j in [*part, i])
        if part and (len(part) == batch or prompt - 1 + new > limit or (sizes[i][0] == 1 < prompt)):
            yield part
            part = []
        part.append(i)
    if part:
        yield part
