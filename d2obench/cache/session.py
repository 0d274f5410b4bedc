"""One batch of sequences through prefill, compression and decoding under one policy.

Every measurement uses this loop. All policies go through the same model code and the same calls. Other libraries'
caches and other engines (``d2obench.external``) have sessions derived from this class;
``d2obench.external.open_session`` opens the right one for a policy's name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from d2obench import cpu
from d2obench.attention import interface
from d2obench.cache import policy_cache
from d2obench.cache.cuda_graph import Steps
from d2obench.cache.devices import shard_of
from d2obench.cache.policy_cache import PolicyCache
from d2obench.decode.cpu.backend import compile_loops
from d2obench.errors import ModelError, UsageError
from d2obench.models import LoadedModel, joined, kernels
from d2obench.models.base import bound_of
from d2obench.policies import merging, parse_policy
from d2obench.policies.base import Policy
from d2obench.suite.grammar import Budget, parse_budget

Mark = Callable[[str], None]
TOGETHER = 2**16
"""Tokens of prompts that a GPU reads at once, where all layers are compressed together. It is as fast with these as
with more; their full keys and values take memory until they are compressed."""


@dataclass(frozen=True)
class Footprint:
    """The size of a session's cache, counted from its tensors.

    Args:
        kv_bytes: present bytes of keys and values.
        prompt_kv_bytes: bytes of keys and values right after compression.
        state_bytes: bytes of scores, positions, thresholds and work buffers.
        prompt_tokens: tokens of each sequence's prompt.
        requested: entries per layer that the budget allows, mean over sequences; None without a budget.
        kept: entries per layer and sequence right after compression (mean over KV heads).
        held: the same at present.
        effective: kept ÷ prompt, over all layers and sequences.
        merged_layers: for each layer, evicted entries that were merged, from the prompt and during decoding, summed
            over sequences and KV heads.
        evicted_layers: the same for all evicted entries.
        read_bytes: bytes of keys and values that the last decode step has read; None if that is all that was held.
    """

    kv_bytes: int
    prompt_kv_bytes: int
    state_bytes: int
    prompt_tokens: list[int]
    requested: float | None
    kept: list[list[float]]
    held: list[list[float]]
    effective: float
    merged_layers: list[int]
    evicted_layers: list[int]
    read_bytes: int | None = None

    @property
    def merged(self) -> int:
        """Merged entries of all layers."""
        return sum(self.merged_layers)

    @property
    def evicted(self) -> int:
        """Evicted entries of all layers."""
        return sum(self.evicted_layers)

    @property
    def over(self) -> bool:
        """Whether more is held, or was kept, than the budget allows, beyond rounding to whole tokens."""
        if self.requested is None:
            return False
        most = max(sum(map(sum, rows)) / max(1, sum(map(len, rows))) for rows in (self.kept, self.held))
        return most > self.requested + 1


@dataclass(frozen=True)
class Reading:
    """Prompts that a session has read for other sessions, see :meth:`Session.read`.

    Args:
        cache: full keys and values, and statistics.
        logits: float32 ``[B, V]`` of the last token of each prompt.
        positions: of the next tokens, ``[B, 1]``.
        mask: the padding mask; None without padding.
        lengths: tokens of each prompt.
    """

    cache: PolicyCache
    logits: Tensor
    positions: Tensor
    mask: Tensor | None
    lengths: list[int]


class Session:
    """Runs a batch: :meth:`prefill`, :meth:`compress`, then :meth:`step` for each token.

    Args:
        loaded: the model.
        policy: a policy as text (``d2o(merge=values)``) or as an object; None in a subclass with another cache.
        budget: as text (``0.2``, ``512``) or as an object; None for a policy without one. The ratio 1.0 keeps
            everything, including decoded tokens.
        max_new: largest number of decode steps.
        seed: seed for policies that draw random numbers.
        mark: called with "prefill", "compress" or "decode" when a phase begins.
        beyond: allow more tokens than the model's context if its positions can be extended; for measurements of time
            and memory only, since the output is meaningless.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        policy: Policy | str | None,
        budget: Budget | str | None,
        *,
        max_new: int,
        seed: int = 0,
        mark: Mark | None = None,
        beyond: bool = False,
    ) -> None:
        self.loaded, self.max_new, self.seed, self.beyond = loaded, max_new, seed, beyond
        self.mark: Mark = mark or (lambda phase: None)
        self.budget = parse_budget(budget) if isinstance(budget, str) else budget
        self.policy = parse_policy(policy) if isinstance(policy, str) else policy
        if self.policy is not None and self.policy.calibration:
            from d2obench.cache.calibration import calibrated  # it reads texts by a cache of this package

            self.policy = calibrated(self.policy, loaded.model, loaded.tokenizer, loaded)
        self._device = loaded.device
        if cpu.suits(loaded.dtype, loaded.device):
            compile_loops()
        self._positions = torch.zeros(0, dtype=torch.long)
        self._lengths: list[int] = []
        self._mask: Tensor | None = None
        self._steps = Steps()
        self._in_groups = True
        self.cache: Any = None

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Reads the prompts; returns float32 logits ``[B, V]`` of the last token of each.

        Raises:
            UsageError: a prompt is empty, or it does not fit the model's context together with the tokens to generate.
        """
        self._lengths = [len(prompt) for prompt in prompts]
        longest = max(self._lengths, default=0)
        if not prompts or min(self._lengths) == 0:
            raise UsageError("an empty prompt can't be run", remedy="give at least one token")
        self._check_fits(longest)
        # 1. pad the prompts on the left; a mask is needed only if lengths differ
        self._check_tokens(prompts)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        padded = bool((mask == 0).any())
        positions = (mask.cumsum(1) - 1).clamp_min(0).to(self._device)
        self._mask = mask.to(self._device) if padded else None
        # 2. a new cache, and one forward pass over all prompts, or one for each block
        self.cache = self._new_cache(longest)
        groups = self._groups(longest)
        if len(groups) > 1:
            out = self._prefill_groups(groups, tokens, positions)
        else:
            self.mark("prefill")
            for part in self._blocks(longest):
                seen = None if self._mask is None else self._mask[:, : part.stop]
                out = self._forward(tokens[:, part].to(self._device), positions[:, part], seen).float()
        # 3. the next token's positions; its step may be captured in a CUDA graph
        self._positions = positions[:, -1:] + 1
        self._steps = Steps()
        return out

    def read(self, prompts: list[list[int]]) -> Reading:
        """Reads the prompts for other sessions of the same model; see :mod:`d2obench.cache.reading`."""
        self._in_groups = False  # other sessions need the full entries of all sequences
        logits = self.prefill(prompts)
        return Reading(self.cache, logits, self._positions, self._mask, self._lengths)

    @torch.inference_mode()
    def begin(self, reading: Reading) -> Tensor:
        """Goes on from prompts that another session has read, in place of :meth:`prefill`, with the same result."""
        self._lengths = list(reading.lengths)
        self._check_fits(max(self._lengths))
        self.cache = self._new_cache(max(self._lengths))
        self.mark("prefill")
        self.cache.begin_from(reading.cache)
        self._positions, self._mask, self._steps = reading.positions.clone(), reading.mask, Steps()
        return reading.logits

    @torch.inference_mode()
    def compress(self) -> None:
        """Reduces the cache to the budget."""
        self._check_begun("compress")
        self.cache.compress()

    @torch.inference_mode()
    def turn(self, texts: list[list[int]]) -> Tensor:
        """Reads a further text of each sequence, such as a question about a context that was compressed before, and
        compresses it together with what the cache holds. A text of a single token is a decode step.

        Args:
            texts: one for each sequence, all of the same length.

        Returns:
            Float32 logits ``[B, V]`` of the last token of each.

        Raises:
            UsageError: no prompt was read; texts are empty or differ in length; or they don't fit the model's context
                together with the tokens to generate.
        """
        self._check_begun("turn")
        count = len(texts[0]) if texts else 0
        if len(texts) != len(self._lengths) or not count or any(len(text) != count for text in texts):
            raise UsageError(
                f"a turn was given texts of {', '.join(str(len(text)) for text in texts) or 'no'} tokens",
                why=f"its prompt had {len(self._lengths)} sequences, and each needs a text of the same length",
                remedy="give one text for each sequence, and ask questions of other lengths in a fork of the session",
            )
        tokens = torch.tensor(texts, device=self._device)
        if count == 1:
            return self.step(tokens[:, 0])
        self._check_tokens(texts)
        self._check_fits(max(self._lengths) + count)
        if self.policy is not None and self.policy.compresses_after_first_step and not self.cache.ready:
            self.step(tokens[:, 0])  # this step compresses the prompt
            tokens = tokens[:, 1:]
            if count == 2:
                return self.step(tokens[:, 0])
        out = self._read(tokens)
        self._lengths = [length + count for length in self._lengths]
        self._steps = Steps()
        self.compress()
        return out

    @torch.inference_mode()
    def fork(self, sequences: Sequence[int]) -> Self:
        """An independent session that goes on from here with a selection of the sequences, or with copies of them.

        Args:
            sequences: the sequence that each of the new ones continues, ascending.
        """
        self._check_begun("fork")
        found = copy.copy(self)
        chosen = torch.tensor(sequences)
        found.cache = self._forked(chosen)
        found._lengths = [self._lengths[i] for i in sequences]
        found._positions = self._positions[chosen.to(self._positions.device)]
        found._mask = None if self._mask is None else self._mask[chosen.to(self._mask.device)]
        found._steps = Steps()
        return found

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Decodes one token of each sequence: ``tokens`` int64 ``[B]`` in, float32 logits ``[B, V]`` out.

        Raises:
            UsageError: no prompt was read, ``tokens`` has another shape, or holds an id outside the vocabulary.
        """
        self._check_begun("step")
        if tokens.shape != (len(self._lengths),) or tokens.dtype not in (torch.int64, torch.int32):
            raise UsageError(
                f"a step was given {list(tokens.shape)} tokens of {tokens.dtype}",
                why=f"its prompt had {len(self._lengths)} sequences, and each decodes one token",
                remedy="give one int64 token for each sequence",
            )
        try:
            return self._steps.step(self, tokens)
        except IndexError as problem:  # the embedding's, on a CPU
            self._check_tokens([tokens.tolist()])
            raise problem from None

    def run(self, tokens: Tensor) -> Tensor:
        """The operators of one decode step for ``tokens`` ``[B, 1]``; returns logits ``[B, V]`` in the model's dtype. A
        CUDA graph captures this method, so tensors that outlive the step are modified in place."""
        mask = self._mask
        if mask is not None and self._masks_steps:
            self._mask = mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = self._forward(tokens, self._positions, mask)
        else:  # slots need no padding mask
            out = self._forward(tokens, self._positions, None)
        self._positions += 1
        return out

    @torch.inference_mode()
    def prepare(self) -> None:
        """Prepares decoding without decoding: on a GPU, captures the step if this process has run its shape before."""
        self._steps.prepare(self)

    @property
    def decode_path(self) -> str:
        """What executes a decode step, as text: PyTorch operators, compiled CPU loops or Triton kernels, and whether a
        CUDA graph replays it; empty before the prompt is compressed."""
        path = self._decode_path()
        if path and self._steps.captured:
            path += ", replayed by a CUDA graph"
        return path + (
            "; the model's own layers as in transformers" if path and self.loaded.kernels == "library" else ""
        )

    @property
    def remarks(self) -> list[str]:
        """Which parts of the GPU's fast path this session does not use, and why."""
        if self._device.type != "cuda":
            return []
        own = self.cache if isinstance(self.cache, PolicyCache) else None
        slow = [
            f"sums a prompt's columns without our kernel: {reason}" for reason in sorted(own.slow_prompt if own else ())
        ]
        if own is not None and own.state is not None and own.state.fallback:
            slow.append(f"decodes by PyTorch's operators: {own.state.fallback}")
        merges = own is not None and own.policy.merge_spec is not None and not own.keeps_all
        if merges and (reason := merging.kernel_fallback(self._device, self.loaded.dtype)):
            slow.append(f"merges what a prompt evicts by PyTorch's operators: {reason}")
        if rotary := kernels.rotary_fallback(self._device):
            slow.append(f"rotary positions by PyTorch's operators: {rotary}")
        if self.loaded.kernels == "d2obench":
            slow += joined.remarks(self.loaded.model)
        return slow + ([f"decode steps are not captured: {self._steps.reason}"] if self._steps.reason else [])

    @torch.inference_mode()
    def skip_to(self, tokens: int) -> None:
        """Advances as if ``tokens`` more had been decoded, for sampled decoding; sizes are correct, contents are
        placeholders."""
        self._check_begun("skip_to")
        if self.cache.state is None:
            raise ModelError("sampled decoding needs a compressed policy cache", remedy="use --decode full")
        self.cache.skip(tokens)
        if self._mask is not None and self.cache.slides:
            self._mask = torch.nn.functional.pad(self._mask, (0, tokens), value=1)
        self._positions += tokens

    @torch.inference_mode()
    def footprint(self) -> Footprint:
        """The present size of the cache. If ranks share the heads, every rank must call this, and each gets the
        total."""
        self._check_begun("footprint")
        own, shard = self._footprint(), shard_of(self.loaded.model)
        return own if shard is None else shard.whole(own)

    def _check_begun(self, what: str) -> None:
        if self.cache is None:
            raise UsageError(
                f"{what} was called before prefill, or after close",
                why="the session holds no prompt",
                remedy="call prefill(prompts) first",
            )

    def _check_fits(self, tokens: int) -> None:
        """A UsageError where prompts of ``tokens`` and the tokens to generate don't fit the model's context."""
        limit = interface.longest(self.loaded.model)
        bound = bound_of(self.loaded.model.config) if self.beyond else f"its context is {limit} tokens"
        if tokens + self.max_new > limit and bound:
            raise UsageError(
                f"{tokens} prompt and {self.max_new} generated tokens are more than {self.loaded.name} can see",
                why=bound,
                remedy="use a smaller shape",
            )

    def _check_tokens(self, texts: list[list[int]]) -> None:
        """A UsageError for a token id that the model has no embedding for."""
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        for text in texts:
            if wrong := [token for token in text if not 0 <= token < vocabulary]:
                raise UsageError(
                    f"the token id {wrong[0]} is outside the vocabulary",
                    why=f"{self.loaded.name} knows the ids 0 to {vocabulary - 1}",
                    remedy="use the tokenizer of this model",
                )

    def _decode_path(self) -> str:
        return "" if self.cache is None or self.cache.state is None else str(self.cache.state.decode_path)

    def _footprint(self) -> Footprint:
        cache, held = self.cache, self.cache.held()
        allowed = [cache.allowed(length) for length in self._lengths]
        requested = None if None in allowed else sum(allowed) / len(allowed)
        kept = (held if cache.kept is None else cache.kept).tolist()
        merged, evicted = cache.counts()
        return Footprint(
            kv_bytes=cache.kv_bytes,
            prompt_kv_bytes=cache.prompt_kv_bytes or cache.kv_bytes,
            state_bytes=cache.state_bytes,
            prompt_tokens=self._lengths,
            requested=requested,
            kept=kept,
            held=held.tolist(),
            effective=sum(map(sum, kept)) / (len(kept) * sum(self._lengths)),
            merged_layers=merged,
            evicted_layers=evicted,
            read_bytes=getattr(cache, "read_bytes", None),
        )

    @torch.inference_mode()
    def snapshot(self, decode_only: bool = False) -> Any:
        """A copy of the compressed state, which :meth:`restore` can bring back any number of times.

        Args:
            decode_only: nothing but :meth:`step` and :meth:`skip_to` comes before each :meth:`restore`; the full cache
                then needs no copy of its entries.
        """
        self._check_begun("snapshot")
        return self.cache.snapshot(decode_only), self._positions.clone(), self._mask

    @torch.inference_mode()
    def restore(self, saved: Any) -> None:
        """Brings back a :meth:`snapshot` of this session."""
        self.cache.restore(saved[0])
        self._positions.copy_(saved[1])
        self._mask = saved[2]

    def close(self) -> None:
        """Frees the cache."""
        if isinstance(self.cache, PolicyCache):
            self.cache.free()
        self.cache, self._steps = None, Steps()

    def _blocks(self, longest: int) -> list[slice]:
        """The parts of a prompt of ``longest`` tokens that are read one after the other; the first may be shorter."""
        size = self.policy.block if self.policy is not None and not self.cache.keeps_all else 0
        if not size:
            return [slice(0, longest)]
        ends = range(longest, 0, -size)
        return [slice(max(0, end - size), end) for end in reversed(ends)]

    def _groups(self, longest: int) -> list[slice]:
        """The sequences that are read together, in a batch whose longest prompt has ``longest`` tokens."""
        count, cache = len(self._lengths), self.cache
        apart = self._in_groups and isinstance(cache, PolicyCache) and cache.reads_in_groups
        some = max(1, together(self._device) // longest) if apart else count
        return [slice(first, min(first + some, count)) for first in range(0, count, some)]

    def _prefill_groups(self, groups: list[slice], tokens: Tensor, positions: Tensor) -> Tensor:
        """Reads and compresses the prompts group by group; returns the logits of all sequences."""
        whole, parts, found = self.cache, [], []
        for group in groups:
            self.mark("prefill")
            width = max(self._lengths[group])
            self.cache = self._new_cache(width)
            mask = None if self._mask is None else self._mask[group, -width:]
            own = tokens[group, -width:].to(self._device)
            found.append(self._forward(own, positions[group, -width:], mask).float())
            self.cache.pack()
            parts.append(self.cache)
        self.cache = whole
        whole.take_over(parts)
        return torch.cat(found)

    def _read(self, tokens: Tensor) -> Tensor:
        """The forward pass of a turn: ``tokens`` ``[B, n]`` in, float32 logits ``[B, V]`` out."""
        count = tokens.shape[1]
        if self._mask is not None and self._masks_steps:
            self._mask = torch.nn.functional.pad(self._mask, (0, count), value=1)
        positions = self._positions + torch.arange(count, device=self._device)
        out = self._forward(tokens, positions, self._mask if self._masks_steps else None).float()
        self._positions = positions[:, -1:] + 1
        return out

    @property
    def _masks_steps(self) -> bool:
        """Whether what is read after the prompt needs the padding mask of the prompt; slots need none."""
        return bool(self.cache.slides)

    def _forked(self, sequences: Tensor) -> Any:
        """The cache of a :meth:`fork`."""
        return self.cache.fork(sequences)

    def _new_cache(self, longest: int) -> Any:
        """The cache of a prompt of ``longest`` tokens."""
        model = self.loaded.model
        assert self.policy is not None
        return policy_cache.cache(
            self.policy, self.budget, model=model, max_new=self.max_new, seed=self.seed, mark=self.mark, whole=True,
            tokenizer=self.loaded.tokenizer, lengths=self._lengths if self.policy.block else None,
        )  # fmt: skip

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        out = self.loaded.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{interface.keyword(self.loaded.model): self.cache},
        )
        logits: Tensor = out.logits[:, -1]
        return logits


def together(device: torch.device) -> int:
    """Tokens of prompts that are read at once where all layers are compressed together."""
    return TOGETHER if device.type == "cuda" else sys.maxsize
