"""The repetition of a prompt, from which KVzip learns what is needed (``d2obench.policies.kvzip``).

A sequence's text is cut into chunks. For each chunk, the model reads "Repeat the previous context exactly." (for later
chunks, with the last tokens of the chunk before, so that it knows where to start), the end of a chat turn where the
tokenizer has a template, and then the chunk itself. This block attends to everything that the cache holds and,
causally, to itself, and leaves nothing behind: its keys and values are used once and dropped.

The statistic "repeated" of an entry is the highest attention from the block that repeats its chunk, where each query's
softmax is over the chunk's entries, the sinks before the chunk, and the block itself; that of a sink is 1. Without a
tokenizer, the block begins with the last tokens of the chunk before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench.attention import interface
from d2obench.attention.prompt import prompt_attention
from d2obench.cache.layer import PolicyLayer
from d2obench.errors import ModelError
from d2obench.policies.base import Needs
from d2obench.policies.rules import Repeat
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.cache.policy_cache import PolicyCache

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
HINT = 8
"""Number of tokens of the chunk before that a later chunk's request ends with."""
QUERIES = 256
"""Number of queries whose attention is computed at once."""


class Repetition:
    """One block that repeats one chunk of one sequence.

    Args:
        spec: what is asked for.
        sequence: index of the sequence.
        first: position of the chunk's first token.
        last: position after its last token.
    """

    def __init__(self, spec: Repeat, sequence: int, first: int, last: int) -> None:
        self.spec, self.sequence, self.first, self.last = spec, sequence, first, last
        self.new: tuple[Tensor, Tensor] | None = None
        self.read: dict[int, Tensor] = {}
        """What the attention block of each layer reads, ``[n, hidden]``, for KVzip+."""

    def receive(self, keys: Tensor, values: Tensor) -> None:
        """The block's keys and values ``[1, H, n, d]`` of the layer that attends next."""
        self.new = keys, values

    def attend(self, layer: PolicyLayer, query: Tensor, scale: float, projection: Tensor | None) -> Tensor:
        """Attention of the block's queries ``[1, Hq, n, d]``, ``[1, n, Hq, d_v]``; updates the layer's scores."""
        assert self.new is not None and layer.keys is not None and layer.values is not None
        own, start = slice(self.sequence, self.sequence + 1), layer.starts[self.sequence]
        keys, values = (held[own, :, start:] for held in (layer.keys, layer.values))
        with span("prefill attention"):
            keys, values = (torch.cat((held, new), 2) for held, new in zip((keys, values), self.new, strict=True))
            out, _ = prompt_attention(query, keys, values, scale, [0], Needs())
        with span("scores"):
            self._score(layer, query, scale, projection)
        return out

    def _score(self, layer: PolicyLayer, query: Tensor, scale: float, projection: Tensor | None) -> None:
        assert self.new is not None and layer.keys is not None and layer.values is not None
        at, heads, new = self.sequence, layer.keys.shape[1], query.shape[2]
        position = layer.positions()[at]
        # 1. the entries of the chunk, and the sinks before it
        chunk = (position >= self.first) & (position < self.last)
        sinks = (position >= 0) & (position < min(self.spec.sinks, self.first))
        columns = (chunk | sinks).any(0).nonzero()[:, 0]
        shown = (chunk | sinks)[:, columns]
        keys = torch.cat((layer.keys[at, :, columns], self.new[0][0]), 1).float()
        weight = torch.ones(heads, 1, 1, len(columns), device=keys.device)
        if self.spec.plus and projection is not None:
            weight = _output_norms(layer.values[at, :, columns], projection)[:, :, None]
        # 2. the highest attention, over blocks of queries
        queries = query[0].float().view(heads, -1, new, query.shape[3]) * scale
        found = torch.zeros(heads, len(columns), device=keys.device)
        for low in range(0, new, QUERIES):
            high = min(new, low + QUERIES)
            logits = queries[:, :, low:high] @ keys.transpose(1, 2)[:, None]
            logits[..., : len(columns)].masked_fill_(~shown[:, None, None], -torch.inf)
            ahead = torch.ones(high - low, new, dtype=torch.bool, device=keys.device).triu(low + 1)
            logits[..., len(columns) :].masked_fill_(ahead, -torch.inf)
            seen = torch.softmax(logits, -1)[..., : len(columns)] * weight
            if self.spec.plus:
                norm = self.read[layer.index][low:high].float().norm(dim=-1)
                seen /= norm.clamp_min(1e-12)[:, None]
            found = torch.maximum(found, seen.amax((1, 2)))
        # 3. the scores of the chunk's own entries
        scores = layer.stats["repeated"]
        scores[at, :, columns] = torch.where(chunk[:, columns], found, scores[at, :, columns])


@torch.inference_mode()
def repeat(cache: PolicyCache, spec: Repeat) -> None:
    """Lets the model repeat the text of every sequence, and stores the scores in each layer's statistics.

    Raises:
        ModelError: the text is not known.
    """
    module, lengths = cache.module, cache.lengths
    assert lengths is not None
    if module is None or sum(block.shape[1] for block in cache.tokens) < cache.seen:
        raise ModelError(
            f"policy '{cache.policy.name}' doesn't know the text that it should repeat",
            why="it was given as embeddings, or decoded on a GPU, or fed to the layers without a model",
            remedy="give the model input_ids, and decode after the last turn only",
        )
    for layer in cache.own:
        layer.stats = {**layer.stats, "repeated": torch.zeros_like(layer.positions(), dtype=torch.float32)}
    text = torch.cat(cache.tokens, 1)[:, : cache.seen]  # without the token that is being decoded
    for sequence, length in enumerate(lengths.tolist()):
        own = text[sequence, -length:]
        for first in range(0, length, spec.chunk):
            last = min(length, first + spec.chunk)
            request = _request(cache.tokenizer, own[max(0, first - HINT) : first].tolist())
            block = torch.cat((torch.tensor(request, dtype=own.dtype, device=own.device), own[first:last]))
            with _repeating(cache, Repetition(spec, sequence, first, last)):
                _read(cache, module, block, length)
    for layer in cache.own:
        position = layer.positions()
        layer.stats["repeated"].masked_fill_((position >= 0) & (position < spec.sinks), 1.0)


def _read(cache: PolicyCache, module: Any, block: Tensor, length: int) -> None:
    """One forward pass of the model over a block ``[n]`` that follows a text of ``length`` tokens."""
    new, at = block.shape[0], cache.repetition
    assert at is not None
    mask = torch.ones(1, cache.seen + new, dtype=torch.long, device=block.device)
    mask[:, : cache.seen - length] = 0
    positions = torch.arange(length, length + new, device=block.device)[None]
    hooks = []
    if at.spec.plus:
        for layer, decoder in zip(cache.layers, interface.decoder_layers(module), strict=True):
            if isinstance(layer, PolicyLayer):
                watch = _watch(at.read, layer.index)
                hooks.append(interface.attention_of(decoder).register_forward_pre_hook(watch, with_kwargs=True))
    try:
        module(
            input_ids=block[None], attention_mask=mask, position_ids=positions, use_cache=True,
            **{interface.keyword(module): cache},
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _repeating(cache: PolicyCache, block: Repetition) -> Iterator[None]:
    """Makes a forward pass one over ``block``, and keeps what it must not change: layers with a sliding window, which
    show it the sequence's own entries; and, because a cache may be compressed in the middle of a forward pass, what
    that pass restores at its end."""
    others = [layer for layer in cache.layers if not isinstance(layer, PolicyLayer)]
    saved, before = [dict(vars(layer)) for layer in others], cache.before_forward
    for layer in others:
        own = slice(block.sequence, block.sequence + 1)
        layer.keys, layer.values = layer.keys[own], layer.values[own]
    cache.repetition = block
    try:
        yield
    finally:
        cache.before_forward, cache.repetition = before, None
        for layer, fields in zip(others, saved, strict=True):
            layer.__dict__.update(fields)


def _watch(read: dict[int, Tensor], index: int) -> Any:
    def hook(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        read[index] = given[0]

    return hook


def _request(tokenizer: Any, before: list[int]) -> list[int]:
    """The tokens that ask for a repetition; ``before`` are the last ones of the chunk before."""
    if tokenizer is None:
        return before
    asked = _tokens(tokenizer, LATER if before else FIRST) + before
    return asked + _tokens(tokenizer, _turn_end(tokenizer))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _turn_end(tokenizer: Any) -> str:
    """What stands between a user's words and the model's answer."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n"
    mark = "context"
    message = [{"role": "user", "content": mark}]
    whole: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return whole.rpartition(mark)[2]


def _output_norms(values: Tensor, projection: Tensor) -> Tensor:
    """``‖W_O v‖₂`` of values ``[H, n, d_v]`` for each query head, float32 ``[H, G, n]``."""
    heads, count, width = values.shape
    parts = projection.float().view(projection.shape[0], heads, -1, width)
    norms = torch.empty(heads, parts.shape[2], count, device=values.device)
    for head in range(heads):
        for member in range(parts.shape[2]):
            norms[head, member] = (values[head].float() @ parts[:, head, member].T).norm(dim=-1)
    return norms
