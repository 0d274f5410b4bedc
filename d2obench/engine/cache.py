"""The policy cache: transformers' ``Cache`` interface over slots, from prompt through compression to decoding.

``update`` of a layer hands the layer itself to the attention function that follows, riding on the key tensor it
returns (``d2obench.engine.attention``): so the model code of transformers runs unchanged, and the cache alone decides
what attention sees.

While the prompt is read, a layer keeps its full keys and values. ``compress`` lets the policy allocate, select and
merge, layer by layer, and frees the full tensors of a layer as soon as its slots are filled. A policy that keeps
everything writes the prompt straight into its slots instead. A second prompt on the same cache (a new turn) attends to
the slots and to itself, and is then compressed together with them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from d2obench.engine.carry import Carry
from d2obench.engine.prefill import kept_stats, prompt_attention
from d2obench.engine.ranges import span
from d2obench.engine.slots import CLOSED, EMPTY, DenseStore
from d2obench.engine.state import DecodeState, capacities
from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Kept, Needs, Policy, Stats, select
from d2obench.spec import Budget

SPARE = 256
"""Slots a growing cache is extended by when the length of the generation is not known."""


class PolicyLayer(CacheLayerMixin):
    """One compressed layer; ``index`` counts compressed layers only."""

    is_sliding = False

    def __init__(self, cache: PolicyCache, index: int) -> None:
        super().__init__()
        self.index = index
        self._cache = weakref.ref(cache)
        self.stats: Stats = {}

    @property
    def cache(self) -> PolicyCache:
        """The cache this layer is part of."""
        cache = self._cache()
        assert cache is not None
        return cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the new keys and values ``[B, H, n, d]``; returns tensors that stand for them and lead back here."""
        return self.cache.receive(self, key_states, value_states)

    def attend(self, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Attention of ``[B, Hq, n, d]`` over what the layer holds, ``[B, n, Hq, d_v]``."""
        return self.cache.attend(self, query, scale, mask)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: slots are made when the prompt's length is known."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is ours; what transformers asks for is the true length."""
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, so that positions stay true whatever was evicted."""
        return self.cache.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class PolicyCache(Cache):
    """A cache that holds what a policy keeps.

    Args:
        policy: the rule.
        budget: what it may keep; None for a policy without a budget.
        kinds: per layer of the model, None for a compressed layer or the window of a sliding one, which stays as it is.
        group: query heads per KV head.
        max_new: tokens that will be generated at most; None if not known (a growing cache is then extended).
        mark: told "prefill", "compress", "decode" when a phase begins.
        wrap: a tensor type to hand the keys out as, for models that call SDPA themselves.
        seed: for policies that draw.
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
    ) -> None:
        if policy.takes_budget and budget is None:
            raise PolicyError(f"policy '{policy.name}' needs a budget", remedy="give one, for example 0.2 or 512")
        self.policy, self.budget, self.group, self.max_new = policy, budget, group, max_new
        self.mark = mark or (lambda phase: None)
        self.wrap, self.seed = wrap, seed
        self.keeps_all = not policy.takes_budget or (budget is not None and budget.ratio == 1.0)
        self.grows = policy.grows or self.keeps_all
        compressed = iter(range(len(kinds)))
        layers: list[Any] = [
            PolicyLayer(self, next(compressed)) if window is None else DynamicSlidingWindowLayer(window)
            for window in kinds
        ]
        super().__init__(layers=layers)
        self.own: list[PolicyLayer] = [layer for layer in layers if isinstance(layer, PolicyLayer)]
        if not self.own:
            raise PolicyError("every layer of this model has a sliding window", why="there is nothing to compress")
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the next forward is a new prompt."""
        self.seen = 0
        self.lengths: Tensor | None = None
        self.starts: list[int] = []
        self.state: DecodeState | None = None
        self.budgets: Tensor | None = None
        self.kept: Tensor | None = None
        self._store: DenseStore | None = None
        self.prompt_kv_bytes = self.merged_prompt = self.evicted_prompt = 0
        self.ready = False
        for layer in self.layers:
            if isinstance(layer, PolicyLayer):
                layer.keys = layer.values = None
                layer.stats = {}
            else:
                layer.reset()

    def receive(self, layer: PolicyLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Called by a layer's ``update``."""
        if layer.index == 0 and not self.ready and self.seen:
            self.compress()
        if self.policy.expands:
            keys, values = (held.repeat_interleave(self.group, 1) for held in (keys, values))
        if self.ready:
            assert self.state is not None
            if layer.index == 0 and self.grows:
                self._extend()
            self.state.write(layer.index, keys, values)
        else:
            layer.keys, layer.values = keys, values
            if self.keeps_all:
                self._keep(layer)
        handed = keys if self.wrap is None else keys.as_subclass(self.wrap)
        handed.slot_layer = layer  # type: ignore[attr-defined]
        return handed, values

    def attend(self, layer: PolicyLayer, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Called by a layer's ``attend``: over slots for one new token, causally over the prompt otherwise."""
        last = layer.index == len(self.own) - 1
        if self.ready:
            assert self.state is not None
            out = self.state.attend(layer.index, query, scale)
            if last:
                self.state.advance()
                self.seen += 1
            return out
        assert layer.keys is not None and layer.values is not None
        if layer.index == 0:
            self._measure(query, mask)
        needs = Needs() if self.keeps_all else self.policy.needs
        with span("prefill attention"):
            out, layer.stats = prompt_attention(query, layer.keys, layer.values, scale, self.starts, needs)
        if self.keeps_all:
            layer.keys = layer.values = None
        if last:
            self.seen += query.shape[2]
        return out

    def compress(self) -> None:
        """Brings every layer down to its budget; decoding may start. Nothing happens twice."""
        if self.ready:
            return
        self.mark("compress")
        with span("allocate"):
            budgets = self._budgets()
        assert self.lengths is not None
        batch, heads, longest = self.shape
        extra = (self.max_new or SPARE) if self.grows else self.policy.interval
        most = [min(int(row.max()), longest) for row in budgets]
        sizes = [count + extra for count in most] if self.grows else capacities(budgets, extra)
        store = self._store or self._new_store(sizes)
        shape = (len(self.own), batch * heads, max(sizes))
        position = torch.full(shape, CLOSED, dtype=torch.int32, device=self.device)
        memory: list[dict[str, Tensor]] = []
        scores: list[Stats] = []
        for layer, keep, count in zip(self.own, budgets, most, strict=True):
            index = self._all_entries()
            if not self.keeps_all:
                kept, remembered = self._compress_layer(layer, keep, count)
                index = kept.index
                memory.append(remembered)
                self.evicted_prompt += int(kept.leaving.sum())
                self.merged_prompt += int(remembered["merged"].sum()) if "merged" in remembered else 0
                scores.append(kept_stats(layer.stats, index.clamp_max(longest - 1)))
                store.fill(layer.index, kept.keys.flatten(0, 1), kept.values.flatten(0, 1))
                layer.keys = layer.values = None
                layer.stats = {}
            self._book(position[layer.index], index, keep, sizes[layer.index], extra)
        now = (self.lengths - 1).to(torch.int32).repeat_interleave(heads)
        state = DecodeState(
            store, position, now, self.policy, heads, 1 if self.policy.expands else self.group, max(most), self.grows
        )
        if not self.keeps_all:
            self.policy.begin(state, memory, scores)
            if self.policy.carries is not None and not self.grows:
                state.carry = Carry(state, self.policy.carries)
        state.start()
        self.state, self.budgets, self.ready, self._store = state, budgets, True, None
        self.kept = state.held().view(len(self.own), batch, heads).float().mean(-1)
        self.prompt_kv_bytes = store.bytes
        self.mark("decode")

    def counts(self) -> tuple[int, int]:
        """Entries merged and entries evicted so far, over all layers, sequences and KV heads."""
        state = self.state
        assert state is not None
        merged = int(state.extra["merged"].sum()) if "merged" in state.extra else 0
        return self.merged_prompt + merged, self.evicted_prompt + int(state.evicted)

    def snapshot(self) -> Any:
        """A copy of everything that decoding changes."""
        state = self.state
        assert state is not None
        return state.snapshot(), self.seen

    def restore(self, saved: Any) -> None:
        """Brings back a :meth:`snapshot`."""
        assert self.state is not None
        self.state.restore(saved[0])
        self.seen = saved[1]

    def _compress_layer(self, layer: PolicyLayer, keep: Tensor, count: int) -> tuple[Kept, dict[str, Tensor]]:
        assert layer.keys is not None and layer.values is not None and self.lengths is not None
        total = self.shape[2]
        everything = self._all_entries()
        position = everything - self._starts()
        entries = Entries(layer.index, len(self.own), layer.keys, layer.values, position, self.lengths, layer.stats)
        if count == total and not any(self.starts):
            return Kept(everything, everything[..., :0], total, layer.keys, layer.values), {}
        with span("evict"):
            index, evicted = select(self.policy.rank(entries, keep), keep, count)
        at = index.clamp_max(total - 1)[..., None]
        keys = layer.keys.gather(2, at.expand(-1, -1, -1, layer.keys.shape[-1]))
        values = layer.values.gather(2, at.expand(-1, -1, -1, layer.values.shape[-1]))
        kept = Kept(index, evicted, total, keys, values)
        with span("merge"):
            return kept, self.policy.absorb(entries, kept, keep)

    def _book(self, position: Tensor, index: Tensor, keep: Tensor, size: int, extra: int) -> None:
        """Fills in a layer's positions: kept entries, EMPTY up to each sequence's budget and the spare slots."""
        batch, heads, count = index.shape
        own = position.view(batch, heads, -1)
        if self.grows:
            own[..., count:size] = EMPTY
        else:
            usable = torch.arange(size, device=self.device) < (keep.to(self.device) + extra)[:, None]
            own[..., :size] = torch.where(usable, EMPTY, CLOSED)[:, None].to(position.dtype)
        true = (index - self._starts()).to(position.dtype)
        filled = (true >= 0) & (index < self.shape[2])
        own[..., :count] = torch.where(filled, true, own[..., :count])

    def _keep(self, layer: PolicyLayer) -> None:
        """Writes a prompt that is kept whole straight into its slots."""
        assert layer.keys is not None and layer.values is not None
        self._note(layer)
        if self._store is None:
            sizes = [self.shape[2] + (self.max_new or SPARE)] * len(self.own)
            self._store = self._new_store(sizes)
        self._store.fill(layer.index, layer.keys.flatten(0, 1), layer.values.flatten(0, 1))

    def _new_store(self, sizes: Sequence[int]) -> DenseStore:
        batch, heads, _ = self.shape
        return DenseStore(sizes, batch * heads, self.widths, self.dtype, self.device)

    def _note(self, layer: PolicyLayer) -> None:
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        self.shape = (keys.shape[0], keys.shape[1], keys.shape[2])
        self.widths, self.dtype, self.device = (keys.shape[-1], values.shape[-1]), keys.dtype, keys.device

    def _all_entries(self) -> Tensor:
        return torch.arange(self.shape[2], device=self.device).expand(self.shape)

    def _starts(self) -> Tensor:
        return torch.tensor(self.starts, device=self.device)[:, None, None]

    def _budgets(self) -> Tensor:
        assert self.lengths is not None
        length = self.lengths.cpu()
        if self.keeps_all:
            return length.expand(len(self.own), -1)
        assert self.budget is not None
        return self.policy.layer_budgets([layer.stats for layer in self.own], length, self.budget)

    def _measure(self, query: Tensor, mask: Tensor | None) -> None:
        """Takes the lengths of the sequences from the padding mask, once a prompt."""
        batch, total = query.shape[0], query.shape[2]
        self._note(self.own[0])
        if mask is None:
            self.starts = [0] * batch
        else:
            self.starts = (total - real_tokens(mask, total)).tolist()
        self.lengths = total - torch.tensor(self.starts, device=query.device)

    def _extend(self) -> None:
        """Makes room in a growing cache whose generation turned out longer than its slots."""
        state = self.state
        assert state is not None
        if state.fill < min(state.store.capacities):
            return
        state.extend(max(SPARE, state.fill // 2))


def real_tokens(mask: Tensor, total: int) -> Tensor:
    """Tokens that are not padding, ``[B]``, from a 2D mask ``[B, total]`` or the last row of a 4D one; padding must
    stand on the left."""
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask == 0
    real = mask[:, -total:].bool()
    counts = real.sum(1)
    if not bool((real == (torch.arange(total, device=mask.device) >= (total - counts)[:, None])).all()):
        raise PolicyError("the batch is padded on the right or inside", remedy="pad on the left")
    return counts
