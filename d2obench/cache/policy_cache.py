"""The policy cache: transformers' ``Cache`` interface over slots, from prompt through compression to decoding.

A layer's ``update`` attaches the layer object to the key tensor that it returns, so that the attention function that
follows finds it (``d2obench.attention.interface``). So transformers' model code runs unchanged, and only the cache
decides what attention sees.

While the prompt is read, a layer holds its full keys and values. ``d2obench.cache.compress`` then lets the policy
select and merge, layer by layer. If the prompt is known to come in one block and no budget depends on other layers,
this happens right after a layer's attention, so that its full tensors are freed before the next layer runs; otherwise
it happens when all layers have read the prompt. A policy that keeps everything writes the prompt directly into its
slots. A prompt may come in several blocks. A block after decoding has begun (a new turn) attends to the slots and to
itself, and is then compressed together with them (``d2obench.cache.conversation``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from d2obench.attention import interface
from d2obench.attention.interface import BridgedKeys, generate_reads_prompt, real_tokens
from d2obench.attention.prompt import prompt_attention
from d2obench.cache import cascade
from d2obench.cache.budgets import LastQueries, output_error, rescale
from d2obench.cache.compress import Layout, Packing, bounded
from d2obench.cache.conversation import add, reopen
from d2obench.cache.devices import HeadShard, Run, SplitPacking, SplitState, check_shardable, on, runs_of, shard_of
from d2obench.cache.groups import joined
from d2obench.cache.layer import Block, PolicyLayer
from d2obench.cache.repetition import Repetition, repeat
from d2obench.cache.sequences import SequenceCache
from d2obench.cpu.memory import LayerBuffers, lasting
from d2obench.decode.state import DecodeState
from d2obench.errors import ModelError, PolicyError
from d2obench.policies import parse_policy
from d2obench.policies.base import Entries, Needs, Policy, Stats
from d2obench.policies.protect import generated
from d2obench.policies.rotary import QueryMoments
from d2obench.ranges import span
from d2obench.slots.quantised import slot_bytes
from d2obench.suite.grammar import Budget, parse_budget

SPARE = 256
"""Number of slots by which a growing cache is extended if the length of the generation is not known."""


class PolicyCache(SequenceCache):
    """A key-value cache for transformers models that holds what a policy keeps.

    Args:
        policy: the policy.
        budget: what the policy may keep; None for a policy without a budget.
        kinds: for each layer of the model, None for a compressed layer, or the window of a sliding-window layer, which
            is not compressed.
        group: query heads per KV head.
        max_new: largest number of tokens that will be generated; None if not known (a growing cache is then extended on
            demand).
        mark: called with "prefill", "compress" or "decode" when a phase begins.
        wrap: tensor type of the returned keys, for models that call SDPA themselves.
        seed: seed for policies that draw random numbers.
        rotary: rotation angles per position, see :class:`DecodeState`.
        whole: whether every prompt and every later turn comes in one block, so that layers may be compressed while it
            is read.
        shard: the ranks that share the KV heads; None if this process holds all of them.
        runs: the layers on each device, if there are several devices.
        model: the model that will use the cache; None if layers are called without one.
        prompt: number of tokens of a prompt, including padding, that the caller feeds in several blocks; None if not
            known. Needed only if the last block has a single token, which would otherwise be taken for a decode step.
        tokenizer: the model's, for a policy that asks it to repeat its prompt; None if there is none.
        lengths: tokens of each sequence's prompt, for a policy that cuts it between blocks: budgets that are a ratio
            are then those of the whole prompt from the start.
    """

    def __init__(
        self,
        policy: Policy,
        budget: Budget | None,
        kinds: list[int | None],
        group: int,
        max_new: int | None = None,
        mark: Callable[[str], None] | None = None,
        wrap: type[Tensor] | None = None,
        seed: int = 0,
        rotary: Tensor | None = None,
        whole: bool = False,
        shard: HeadShard | None = None,
        runs: Sequence[Run] = (),
        model: PreTrainedModel | None = None,
        prompt: int | None = None,
        tokenizer: Any = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        if policy.takes_budget and budget is None:
            raise PolicyError(f"policy '{policy.name}' needs a budget", remedy="give one, for example 0.2 or 512")
        self.policy, self.asked, self.group, self.max_new = policy, budget, group, max_new
        self.generated = 0
        """Generated tokens that a layer may hold, for a policy that keeps the whole prompt."""
        self.mark = mark or (lambda phase: None)
        self.wrap, self.seed, self.rotary, self.whole, self.shard = wrap, seed, rotary, whole, shard
        self.prompt, self.tokenizer = prompt, tokenizer
        self.keeps_last = False
        """Whether the prompt's last queries are kept, and no layer is compressed while it is read, although the policy
        does not need that (``d2obench.cache.diagnosis``)."""
        self.runs = list(runs) if len(runs) > 1 else []
        self.keeps_all = not policy.takes_budget or (budget is not None and budget.ratio == 1.0)
        self.grows = policy.grows or self.keeps_all
        if policy.protects_prompt and budget is not None and not self.keeps_all:
            self.generated = generated(budget, max_new, policy.name)
        compressed = iter(range(len(kinds)))
        layers: list[Any] = [
            PolicyLayer(self, next(compressed)) if window is None else DynamicSlidingWindowLayer(window)
            for window in kinds
        ]
        super().__init__(layers, model)
        self.own: list[PolicyLayer] = [layer for layer in layers if isinstance(layer, PolicyLayer)]
        if not self.own:
            raise PolicyError("every layer of this model has a sliding window", why="there is nothing to compress")
        self.reset()
        self.whole_lengths = None if lengths is None else torch.tensor(lengths)

    def reset(self) -> None:
        """Discards all contents; the next forward pass begins a new prompt."""
        self.seen = 0
        self.lengths: Tensor | None = None
        self.layout = Layout(0, 0, (0, 0), torch.float32, torch.device("cpu"))
        self._block = Block(0, [])
        self.state: DecodeState | SplitState | None = None
        self.budgets: Tensor | None = None
        self.first: tuple[Tensor, list[int]] | None = None
        self._gone: Tensor | int = 0
        """Tokens that are no longer held when a turn begins, int64 ``[layers, B]``."""
        self.kept: Tensor | None = None
        self.packing: Packing | SplitPacking | None = None
        self.prompt_kv_bytes = 0
        self.slow_prompt: set[str] = set()
        """Why a GPU has not read the prompt by our kernels."""
        self._buffers = LayerBuffers(len(self.own))
        self.merged_prompt = [0] * len(self.own)
        self.evicted_prompt = [0] * len(self.own)
        self.whole_lengths: Tensor | None = None
        self._sent: dict[tuple[Any, ...], Tensor] = {}
        self._counted: tuple[Tensor, list[int]] | None = None
        self.tokens: list[Tensor] = []
        self.repetition: Repetition | None = None
        self.ready = False
        self.described: list[tuple[Policy, int, list[Stats]]] = []
        """What policies have added to the statistics of the prompt, for caches that begin from this one: policy, seed
        and a dictionary for each layer."""
        for layer in self.layers:
            if isinstance(layer, PolicyLayer):
                layer.clear()
                layer.moments = None
            else:
                layer.reset()

    def note_tokens(self, tokens: Tensor | None) -> None:
        """Remembers the prompt; and all of the text, for a policy that must repeat it."""
        if self.repetition is not None or tokens is None:
            return
        # decode steps may be replayed by a CUDA graph, without a word
        if not self.ready or (self.policy.repeats is not None and tokens.device.type == "cpu"):
            self.tokens = [*self.tokens, tokens]

    def receive(self, layer: PolicyLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values, or passes them to the decode state; called by the layer's
        ``update``."""
        new = keys.shape[2]
        if self.repetition is not None:
            if layer.index == 0:
                self.check_forward(self.seen + new)
            self.repetition.receive(keys, values)
            return self._handed(layer, keys), values
        if layer.index == 0:
            self.check_forward(self.seen + new)
            if self.seen and keys.shape[0] != self.layout.batch:
                raise ModelError(
                    f"a batch of {keys.shape[0]} was given to a cache of {self.layout.batch} sequences",
                    remedy="use one cache for each batch, or batch_repeat_interleave and batch_select_indices",
                )
            if new == 1 and self.seen and not self.ready and not self._reads_prompt():
                self.compress()
            if new > 1 and self.seen and self.policy.block and not self.ready:
                self.compress()  # what the block before left
            if new > 1 and self.ready:
                self._reopen()
        if self.policy.caches_query_heads:
            keys, values = (held.repeat_interleave(self.group, 1) for held in (keys, values))
        if self.ready:
            assert self.state is not None
            if layer.index == 0 and self.grows:
                self.ensure_space()
            self.state.write(layer.index, keys, values)
        else:
            layer.append(keys, values, short_lived=self._early or self._cascades)
        return self._handed(layer, keys), values

    def _handed(self, layer: PolicyLayer, keys: Tensor) -> Tensor:
        """The keys, with the layer attached."""
        handed = keys if self.wrap is None else keys.as_subclass(self.wrap)
        handed.slot_layer = layer  # type: ignore[attr-defined]
        return handed

    def keep_entries(self, layer: PolicyLayer, held: Tensor) -> Tensor:
        """A layer's keys or values ``[B, H, n, d]`` for as long as other layers read the prompt. They are copied where
        they are part of something larger, such as a fused projection, and on a CPU always, into a buffer of the layer's
        own."""
        if held.device.type != "cpu":
            return held if held.untyped_storage().nbytes() <= held.nbytes else held.contiguous().clone()
        if self._cascades:  # most layers will be cut before the last one needs a buffer
            return lasting(held.shape, held.dtype, held.device).copy_(held)
        return self._buffers.zeros(layer.index, held.shape, held.dtype, held.device).copy_(held)

    def attend(self, layer: PolicyLayer, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Attention over the slots for a new token, and causal attention for a prompt's block; called by a layer's
        ``attend``."""
        if self.repetition is not None:
            return self.repetition.attend(layer, query, scale, self.output_projection(layer))
        # 1. a decode step attends to slots
        last, new = layer.index == len(self.own) - 1, query.shape[2]
        if self.ready:
            assert self.state is not None
            out = self.state.attend(layer.index, query, scale)
            if last:
                with span("bookkeeping"):
                    self.state.advance()
                self.seen += 1
            return out
        assert layer.keys is not None and layer.values is not None
        # 2. place the block among the entries; the first layer determines how, for all layers
        if layer.index == 0:
            self._measure(layer, new, mask)
        assert self.lengths is not None
        layer.place(self._block, self.lengths)
        # 3. causal attention over all entries, with the statistics by which the policy ranks them
        needs = self.needs
        with span("prefill attention"), on(query.device) if self.runs else nullcontext():
            zeros = lasting if self._early or query.device.type != "cpu" else partial(self._buffers.zeros, layer.index)
            out, stats = prompt_attention(
                query, layer.keys, layer.values, scale, layer.starts, needs, zeros, layer.queries,
                layer.logit_bias(new), self.slow_prompt,
            )  # fmt: skip
        layer.scale = scale
        if needs.queries or (needs.window > 1 and not self.whole):
            layer.remember(query, max(needs.queries, needs.window - 1))
        if needs.moments:
            self._add_moments(layer, query)
        if (needs.errors or self.keeps_last) and self.first is None:
            before = LastQueries(query[:, :, :0], out[:, :0], scale) if layer.last is None else layer.last
            layer.last = before.and_then(query, out)
        layer.stats = add(layer.stats, stats, layer.keys.shape[2])
        # 4. compress the layer now if it does not depend on other layers, or to what they will at least leave it
        if self._early:
            self._compress_early(layer)
        elif self._cascades:
            self._cut_so_far(layer)
        if last:
            self.seen += new
            if self.budgets is not None and not self._early:  # the first decode step of a policy that waits for it
                self._pack()
                self.mark("decode")
        return out

    def compress(self) -> None:
        """Reduces every layer to its budget, after which decoding may start. A second call has no effect.

        For a policy that compresses after the first decode step, only the budgets are computed here.
        """
        if not self.seen:
            raise ModelError("there is nothing to compress", why="the cache has seen no prompt yet")
        if not self.ready:
            self.mark("compress")
            if self.budgets is None:
                with span("allocate"):
                    self.budgets = self._budgets()
            if not self.policy.compresses_after_first_step:
                self._pack()
        self.mark("decode")

    @property
    def needs(self) -> Needs:
        """The statistics that are gathered while a prompt is read."""
        return Needs() if self.keeps_all else self.policy.needs

    def begin_from(self, read: PolicyCache) -> None:
        """Begins with prompts that another cache of the same model has read in one block (``d2obench.cache.reading``),
        as if this one had read them. The entries are shared, because nothing writes to them; :meth:`compress` copies
        those that it keeps."""
        self.seen, self.lengths, self.layout, self._block = read.seen, read.lengths, read.layout, read._block
        self.tokens = list(read.tokens)
        for mine, theirs in zip(self.layers, read.layers, strict=True):
            if isinstance(mine, PolicyLayer):
                mine.begin_from(theirs, self.needs)
            else:  # a sliding layer makes new tensors when it receives a token
                vars(mine).update(vars(theirs))
        self._take_descriptions(read)

    def _take_descriptions(self, read: PolicyCache) -> None:
        """Adds the policy's own statistics of the entries, which don't depend on its budget: they are computed once for
        all caches with an equal policy that begin from ``read``."""
        own = type(self.policy).describe is not Policy.describe or self.policy.repeats is not None
        if self.keeps_all or not own:
            return
        known = next(
            (held for policy, seed, held in read.described if policy == self.policy and seed == self.seed), None
        )
        if known is None:
            names = [set(layer.stats) for layer in self.own]
            if self.policy.repeats is not None:
                repeat(self, self.policy.repeats)
            for layer in self.own:
                assert layer.keys is not None
                with on(layer.keys.device) if self.runs else nullcontext():
                    self._describe(layer)
            known = [
                {name: held for name, held in layer.stats.items() if name not in gathered}
                for layer, gathered in zip(self.own, names, strict=True)
            ]
            read.described.append((self.policy, self.seed, known))
        for layer, stats in zip(self.own, known, strict=True):
            layer.stats |= stats

    @property
    def _early(self) -> bool:
        """Whether a layer can be compressed before the next layer has read the prompt."""
        if self.keeps_last or not self.whole or self.keeps_all:
            return self.whole and not self.keeps_last
        waits = self.first is None and self.policy.budgets_need_stats
        return not waits and not self.policy.compresses_after_first_step and self.policy.repeats is None

    def _reads_prompt(self) -> bool:
        """Whether a block of one token is the last block of a prompt that comes in chunks, and not a decode step."""
        return generate_reads_prompt() if self.prompt is None else self.seen < self.prompt

    def _compress_early(self, layer: PolicyLayer) -> None:
        """Compresses a layer that has just read the prompt."""
        self._note("compress")
        if layer.index == 0:
            self.budgets = self._budgets()
            self.packing = self._new_packing(self._block.columns)
        assert self.packing is not None
        self.packing.add(layer)
        if layer.index == len(self.own) - 1:
            self._finish()
        self._note("prefill")

    @property
    def _cascades(self) -> bool:
        """Whether layers are cut to bounds of their budgets while the prompt is read (``d2obench.cache.cascade``)."""
        alone = not (self.runs or self.shard or self.keeps_last or self.keeps_all)
        waits = self.whole and self.first is None and self.policy.budgets_need_stats
        return alone and waits and cascade.cascades(self.policy)

    def _cut_so_far(self, layer: PolicyLayer) -> None:
        """Cuts the layers that have read the prompt, ``layer`` being the newest."""
        assert self.budget is not None
        self._note("compress")
        with span("evict"):
            self._describe(layer)
            layers = self.own[: layer.index + 1]
            stats, lengths = [held.stats for held in layers], self._text_lengths()
            bounds = self.policy.budgets_so_far(stats, lengths, self.budget, len(self.own))
            for held, bound in zip(layers, bounds, strict=True):
                self.evicted_prompt[held.index] += cascade.cut(self.policy, held, self._describe(held), bound)
            if layer.position is None:  # it stays whole for now
                assert layer.keys is not None and layer.values is not None
                layer.keys, layer.values = (self.keep_entries(layer, kept) for kept in (layer.keys, layer.values))
        self._note("prefill")

    def _note(self, phase: str) -> None:
        """Marks a phase within prefill. For a policy that keeps everything nothing is marked: writing slots counts as
        prefill."""
        if not self.keeps_all:
            self.mark(phase)

    def _pack(self) -> None:
        """Compresses the entries of all layers."""
        self._add_all()
        self._finish()

    def _add_all(self) -> None:
        self.packing = self._new_packing(0)
        for layer in self.own:
            self.packing.add(layer)

    @property
    def reads_in_groups(self) -> bool:
        """Whether the sequences of a batch may be read group by group, each by a cache of its own (:meth:`pack` and
        :meth:`take_over`). It lowers peak memory where all layers are compressed together: otherwise only one layer
        holds its full entries at a time."""
        policy, needs = self.policy, self.needs
        waits = self.whole and policy.budgets_need_stats and not self._early and not self.keeps_last
        later = policy.compresses_after_first_step or policy.repeats is not None or needs.moments or needs.queries
        spread = self.shard is not None or self.runs or self.slides
        return waits and not self.grows and not later and not spread

    def pack(self) -> None:
        """Compresses the prompts of a group without making their slots, which :meth:`take_over` does."""
        self.mark("compress")
        self.budgets = self._budgets()
        self._add_all()

    def take_over(self, groups: Sequence[PolicyCache]) -> None:
        """Makes the slots of all sequences of several caches, in their order; after :meth:`pack`, which they can't be
        used after."""
        parts, lengths, budgets = [], [], []
        for group in groups:
            assert isinstance(group.packing, Packing) and group.lengths is not None and group.budgets is not None
            parts.append(group.packing)
            lengths.append(group.lengths)
            budgets.append(group.budgets)
            self.slow_prompt |= group.slow_prompt
        self.seen = max(group.seen for group in groups)
        self.lengths, self.budgets = torch.cat(lengths), torch.cat(budgets, 1)
        packing = joined(parts)
        self.packing, self.layout = packing, packing.layout
        self._finish()

    def _new_packing(self, new: int) -> Packing | SplitPacking:
        """Makes empty slots; ``new`` is the number of entries that all layers but the first are still going to
        receive."""
        assert self.lengths is not None and self.budgets is not None
        spare = (self.max_new or SPARE) if self.grows else self.policy.interval
        budgets = bounded(self.budgets, self.lengths, self.max_new, self.policy.name)
        budgets = budgets if self.shard is None else self.shard.own(budgets)
        counts, parts = self._counts(new), []
        for run in self.runs or [Run(0, len(counts), self.layout.device)]:
            layout, lengths = replace(self.layout, device=run.device), self.lengths.to(run.device)
            own = slice(run.first, run.last)
            part = Packing(
                self.policy, layout, lengths, budgets[own], counts[own], spare, everything=self.keeps_all,
                grows=self.grows, early=self._early, seed=self.seed, first=run.first, layers=len(counts),
            )  # fmt: skip
            parts.append(part)
        return SplitPacking(parts) if self.runs else parts[0]

    def _finish(self) -> None:
        """Creates the decode state from the compressed layers."""
        packing = self.packing
        assert packing is not None and self.lengths is not None and self.budgets is not None
        state = packing.finish(1 if self.policy.caches_query_heads else self.group, self.rotary)
        if self.policy.reads is not None and not self.keeps_all:
            assert self.budget is not None
            state.read_pages(torch.tensor([self.budget.of(tokens) for tokens in self._text_lengths().tolist()]))
        self.first = self.first or (self.budgets, self._text_lengths().tolist())
        merged, evicted = packing.counts
        self.merged_prompt = [a + b for a, b in zip(self.merged_prompt, merged, strict=True)]
        self.evicted_prompt = [a + b for a, b in zip(self.evicted_prompt, evicted, strict=True)]
        self.state, self.ready, self.packing = state, True, None
        self._buffers = LayerBuffers(len(self.own))
        self.kept = self.held()
        self.prompt_kv_bytes = state.kv_bytes

    def counts(self) -> tuple[list[int], list[int]]:
        """Entries merged and entries evicted so far in each layer, over its sequences and KV heads."""
        merged, evicted = list(self.merged_prompt), list(self.evicted_prompt)
        if self.state is not None:
            evicted = [a + b for a, b in zip(evicted, self.state.evicted.tolist(), strict=True)]
            merged = [a + b for a, b in zip(merged, self.state.merged.tolist(), strict=True)]
        return merged, evicted

    @property
    def batch_size(self) -> int:
        """Number of sequences held; −1 before the first prompt."""
        return self.layout.batch if self.seen else -1

    max_batch_size = batch_size

    @property
    def max_cache_len(self) -> int:
        """−1: there is no maximum number of tokens."""
        return self.get_max_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: there is no maximum number of tokens."""
        return -1

    def skip(self, tokens: int) -> None:
        """Advances the cache as if ``tokens`` more had been decoded, see :meth:`DecodeState.skip`; a sliding-window
        layer keeps its present contents as placeholders."""
        assert self.state is not None
        self.state.skip(tokens)
        self.seen += tokens
        for layer in self.layers:
            if not isinstance(layer, PolicyLayer):
                layer.cumulative_length += tokens

    @property
    def slides(self) -> bool:
        """Whether there are sliding-window layers, which are not compressed and need a padding mask in each step."""
        return len(self.own) < len(self.layers)

    def held(self) -> Tensor:
        """Entries held, per layer and sequence (mean over KV heads), float32 ``[layers, B]``."""
        assert self.lengths is not None
        if self.state is None:
            return self.lengths.float().expand(len(self.own), -1)
        shape = (len(self.own), self.layout.batch, self.layout.heads)
        return self.state.held().view(shape).float().mean(-1)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held, including sliding-window layers and the biases of a merge by mass."""
        tensors = [held for layer in self.layers for held in (layer.keys, layer.values) if held is not None]
        slots = self.state.kv_bytes if self.state else self.packing.bytes if self.packing else 0
        held: int = slots + sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return held

    @property
    def read_bytes(self) -> int | None:
        """Bytes of keys and values that the last decode step has read; None if that is all that was held."""
        found = None if self.state is None else self.state.read_bytes
        sliding = [layer for layer in self.layers if not isinstance(layer, PolicyLayer)]
        tensors = [held for layer in sliding for held in (layer.keys, layer.values) if held is not None]
        return None if found is None else found + sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    @property
    def state_bytes(self) -> int:
        """Bytes of scores, positions, thresholds and work buffers."""
        tensors = self.state.tensors() if self.state else [stat for layer in self.own for stat in layer.stats.values()]
        biases = self.state.kv_bytes - self.state.store.bytes if self.state else 0  # counted as keys and values
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors) - biases

    def _reopen(self) -> None:
        """Turns slots back into entries, for a block that arrives after decoding has begun."""
        state = self.state
        assert state is not None and self.lengths is not None
        batch, heads = self.layout.batch, self.layout.heads
        parts = state.parts if isinstance(state, SplitState) else [state]
        turns = [turn for part in parts for turn in reopen(part, batch)]
        for layer, turn in zip(self.own, turns, strict=True):
            layer.__dict__.update(vars(turn))
        self.merged_prompt, self.evicted_prompt = self.counts()
        self.lengths = state.now.view(batch, heads)[:, 0].long() + 1
        self._gone = (self.lengths - self.held()).round().long().cpu()
        self.state, self.ready, self.budgets = None, False, None
        self.mark("prefill")

    def _counts(self, new: int) -> list[int]:
        """Entries of each layer, including padding, once all layers have received their part of a block of ``new``
        tokens."""
        held = [0 if layer.keys is None else layer.keys.shape[2] for layer in self.own]
        return [held[0], *(count + new for count in held[1:])]

    def _budgets(self) -> Tensor:
        length = self._text_lengths()
        if self.keeps_all or self.policy.reads is not None:
            return length.expand(len(self.own), -1)
        assert self.budget is not None
        if self.first is not None and self.generated:
            budgets, before = self.first
            return budgets - torch.tensor(before) + length - self._gone
        if self.policy.repeats is not None and "repeated" not in self.own[0].stats:
            repeat(self, self.policy.repeats)
        if self.first is not None:
            return rescale(*self.first, length.tolist(), self.budget)
        if self.policy.budgets_need_stats:
            for layer in self.own:
                self._describe(layer)
        stats = [self._with_error(layer) if self.policy.needs.errors else layer.stats for layer in self.own]
        if self.shard is not None and self.policy.budgets_need_stats:
            stats = [self.shard.all_heads(stat) for stat in stats]
        if self.runs:
            stats = [{name: held.cpu() for name, held in stat.items()} for stat in stats]
        if self.generated:
            return length + self.policy.layer_budgets(stats, length, Budget(tokens=self.generated))
        return self.policy.layer_budgets(stats, length, self.budget)

    @property
    def budget(self) -> Budget | None:
        """What a layer may hold, in slots; None for a policy without a budget."""
        if self.asked is None:
            return None
        return self.policy.in_slots(self.asked, slot_bytes(self.layout.widths, self.layout.dtype, self.policy.bits))

    def allowed(self, prompt: int) -> int | None:
        """Entries that the budget allows a layer on average for a prompt of ``prompt`` tokens; None without a
        budget."""
        if self.budget is None or not self.policy.takes_budget:
            return None
        return prompt + self.generated if self.generated else self.budget.of(prompt)

    def plan(self) -> Tensor:
        """The number of entries that each layer would keep if the prompt were compressed now, ``[layers, B]``."""
        assert self.lengths is not None
        return bounded(self._budgets(), self.lengths, self.max_new, self.policy.name)

    def _with_error(self, layer: PolicyLayer) -> Stats:
        """A layer's statistics, and what compression to equal budgets would cost its heads."""
        error = self.cost(layer)
        return {**layer.stats, "error": error}

    def cost(self, layer: PolicyLayer) -> Tensor:
        """What compression to equal budgets would cost each KV head of a layer (``d2obench.cache.budgets``), float32
        ``[B, H]``."""
        assert layer.last is not None
        tokens = self._tokens()
        equal = tokens if self.budget is None else [self.generated or self.budget.of(count) for count in tokens]
        entries, projection = self._describe(layer), self.output_projection(layer)
        device = entries.keys.device
        with on(device) if self.runs else nullcontext():
            return output_error(
                self.policy, entries, torch.tensor(equal), layer.last, projection, self.on_device(equal, device)
            )

    def on_device(self, numbers: list[int], device: torch.device) -> Tensor:
        """Numbers that layer after layer needs, int64 on a device; copied there once, because a copy waits for it."""
        key = (*numbers, device)
        if key not in self._sent:
            self._sent[key] = torch.tensor(numbers, device=device)
        return self._sent[key]

    def _tokens(self) -> list[int]:
        """Tokens of each sequence so far, read from the device once for all layers."""
        assert self.lengths is not None
        if self._counted is None or self._counted[0] is not self.lengths:
            self._counted = self.lengths, self.lengths.tolist()
        return self._counted[1]

    def _text_lengths(self) -> Tensor:
        """Tokens of each sequence, including those of its prompt that have not been read yet, int64 ``[B]``."""
        assert self.lengths is not None
        so_far = self.lengths.cpu()
        return so_far if self.whole_lengths is None else torch.maximum(so_far, self.whole_lengths)

    def _describe(self, layer: PolicyLayer) -> Entries:
        """The entries of a layer, with the policy's own statistics, which are kept so that it need not be done
        twice."""
        assert self.lengths is not None
        entries = layer.entries(len(self.own), self.lengths, self.seed, self.layout.first_head)
        self.policy.describe(entries)
        layer.stats = entries.stats
        return entries

    def output_projection(self, layer: PolicyLayer) -> Tensor | None:
        """W_O of a layer, ``[hidden, Hq·d_v]``; None if the model is not known."""
        model = self.module
        if model is None:
            return None
        return interface.output_projection(interface.decoder_layers(model)[self.layers.index(layer)])

    def _add_moments(self, layer: PolicyLayer, query: Tensor) -> None:
        """Adds the block's queries ``[B, Hq, n, d]`` to the statistics of a layer's queries."""
        assert self.lengths is not None
        if self.rotary is None:
            raise PolicyError(
                f"{self.policy.name}: this model's positions can't be undone",
                why="its rotary angles depend on the length of the text",
                remedy="use another policy",
            )
        new = query.shape[2]
        position = (self.lengths[:, None] - new).to(query.device) + torch.arange(new, device=query.device)
        own = QueryMoments.of(query, position, self.rotary.to(query.device))
        layer.moments = own if layer.moments is None else layer.moments.and_then(own)

    def _measure(self, layer: PolicyLayer, new: int, mask: Tensor | None) -> None:
        """Counts each sequence's own tokens in a block from the padding mask, and adds them to its length.

        Raises:
            PolicyError: padding that is not before all tokens of its sequence.
        """
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        if new > 1:
            self.budgets = None
        widths = (keys.shape[-1], values.shape[-1])
        first = keys.shape[1] * self.shard.rank if self.shard else 0
        self.layout = Layout(keys.shape[0], keys.shape[1], widths, keys.dtype, keys.device, first)
        batch = keys.shape[0]
        before = torch.zeros(batch, dtype=torch.long, device=keys.device) if self.lengths is None else self.lengths
        real = [new] * batch
        if mask is not None:
            counts = real_tokens(mask, self.seen, new)
            if bool(((counts < new) & (before > 0)).any()):
                raise PolicyError(
                    "a sequence is padded in its midst", why="padding comes after tokens", remedy="pad on the left"
                )
            real = counts.tolist()
        self.lengths = before + torch.tensor(real, device=keys.device)
        # columns that are padding in every sequence so far are removed
        padding = new - max(real) if not bool((before > 0).any()) else 0
        self._block = Block(new - padding, [new - count for count in real], padding)

    def ensure_space(self) -> None:
        """Extends a growing cache whose generation turned out longer than its slots."""
        state = self.state
        assert state is not None
        if all(used + state.added < size for used, size in zip(state.prompts, state.store.capacities, strict=True)):
            return
        state.extend(max(SPARE, (max(state.prompts) + state.added) // 2))


def cache(
    policy: Policy | str,
    budget: Budget | float | int | str | None = None,
    *,
    model: PreTrainedModel,
    max_new: int | None = None,
    seed: int = 0,
    mark: Callable[[str], None] | None = None,
    whole: bool = False,
    prompt: int | None = None,
    tokenizer: Any = None,
    lengths: Sequence[int] | None = None,
) -> PolicyCache:
    """A cache for ``model.generate(cache=…)``. Pass the same cache again to continue a conversation.

    transformers before 5.24 calls the argument ``past_key_values``.

    The model stays unchanged: our attention is active only in a forward pass that receives this cache.

    Args:
        policy: as text, ``d2o(merge=values)``, or a policy object.
        budget: a ratio of the prompt or a number of tokens per layer; None for a policy without a budget.
        model: a transformers model of a supported family.
        max_new: largest number of tokens that will be generated; if not known, a growing cache is extended on demand.
        seed: seed for policies that draw random numbers.
        mark: called with "prefill", "compress" or "decode" when a phase begins.
        whole: whether every prompt and every later turn comes in one block. A layer is then compressed before the next
            one reads the prompt, if the policy allows it, and a second block is taken for a second turn.
        prompt: number of tokens of a prompt, including padding, that you feed in blocks of your own and whose last
            block may be a single token. ``generate(prefill_chunk_size=…)`` needs no such hint.
        tokenizer: the model's, for ``kvzip``: without it, the model repeats its prompt without being asked to; and for
            ``triattention`` without a file: without it, statistics are measured on random tokens.
        lengths: tokens of each prompt, for a policy with ``block``: a budget that is a ratio is then that of the whole
            prompt from its first block on.

    Raises:
        PolicyError: an unknown policy, or one that needs a budget.
        ModelError: a model of another family.
    """
    interface.attach(model)
    built = parse_policy(policy) if isinstance(policy, str) else policy
    given = budget if budget is None or isinstance(budget, Budget) else parse_budget(budget)
    _, group = interface.kv_heads(model)
    wrap = BridgedKeys if model.config.model_type in interface.BRIDGED else None
    kinds, rotary = interface.layer_kinds(model), interface.rotary(model)
    if shard := shard_of(model):
        check_shardable(built)
    if built.calibration:
        from d2obench.cache.calibration import calibrated  # it reads texts by such a cache

        built = calibrated(built, model, tokenizer)
    return PolicyCache(
        built,
        given,
        kinds,
        group,
        max_new,
        mark,
        wrap,
        seed,
        rotary,
        whole,
        shard,
        runs_of(model, kinds),
        model,
        prompt,
        tokenizer,
        lengths,
    )
