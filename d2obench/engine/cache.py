"""The policy cache: transformers' ``Cache`` interface over slots, from prompt through compression to decoding.

``update`` of a layer hands the layer itself to the attention function that follows, riding on the key tensor it
returns (``d2obench.engine.attention``): so the model code of transformers runs unchanged, and the cache alone decides
what attention sees.

While the prompt is read, a layer keeps its full keys and values. ``compress`` lets the policy allocate, select and
merge, layer by layer, and frees the full tensors of a layer as soon as its slots are filled. A policy that keeps
everything writes the prompt straight into its slots instead. A prompt may come in several blocks. A block after
decoding has begun (a new turn) attends to the slots and to itself, and is then compressed together with them
(``d2obench.engine.turns``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from d2obench.engine.carry import Carry
from d2obench.engine.layer import PolicyLayer
from d2obench.engine.packing import book, compress, real_tokens, to_the_right
from d2obench.engine.prefill import kept_stats, prompt_attention
from d2obench.engine.quantised import QuantStore
from d2obench.engine.slots import CLOSED, DenseStore
from d2obench.engine.state import DecodeState, capacities
from d2obench.engine.turns import add, reopen, rescale
from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Needs, Policy, Stats
from d2obench.ranges import span
from d2obench.spec import Budget

SPARE = 256
"""Slots a growing cache is extended by when the length of the generation is not known."""
LIVING = ("seen", "lengths", "starts", "state", "budgets", "first", "kept", "ready", "merged_prompt", "evicted_prompt",
          "prompt_kv_bytes", "_store", "_before", "shape")  # fmt: skip
"""What of a cache a snapshot holds beside its layers and slots."""


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
        rotary: angles per position, see :class:`DecodeState`.
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
    ) -> None:
        if policy.takes_budget and budget is None:
            raise PolicyError(f"policy '{policy.name}' needs a budget", remedy="give one, for example 0.2 or 512")
        self.policy, self.budget, self.group, self.max_new = policy, budget, group, max_new
        self.mark = mark or (lambda phase: None)
        self.wrap, self.seed, self.rotary = wrap, seed, rotary
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
        self._before: Tensor | None = None
        self.shape = (0, 0, 0)
        self.widths = (0, 0)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.starts: list[int] = []
        self.state: DecodeState | None = None
        self.budgets: Tensor | None = None
        self.first: tuple[Tensor, list[int]] | None = None
        self.kept: Tensor | None = None
        self._store: DenseStore | None = None
        self.prompt_kv_bytes = 0
        self.merged_prompt = [0] * len(self.own)
        self.evicted_prompt = [0] * len(self.own)
        self.ready = False
        for layer in self.layers:
            if isinstance(layer, PolicyLayer):
                layer.clear()
            else:
                layer.reset()

    def receive(self, layer: PolicyLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Called by a layer's ``update``."""
        new = keys.shape[2]
        if layer.index == 0:
            if self.seen and not self.ready and (new == 1 or self.keeps_all):
                self.compress()
            if self.ready and new > 1:
                self._reopen()
            self._before = self.lengths
        if self.policy.expands:
            keys, values = (held.repeat_interleave(self.group, 1) for held in (keys, values))
        if self.ready:
            assert self.state is not None
            if layer.index == 0 and self.grows:
                self._extend()
            self.state.write(layer.index, keys, values)
        else:
            self._append(layer, keys, values)
        handed = keys if self.wrap is None else keys.as_subclass(self.wrap)
        handed.slot_layer = layer  # type: ignore[attr-defined]
        return handed, values

    def attend(self, layer: PolicyLayer, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Called by a layer's ``attend``: over slots for one new token, causally over the prompt otherwise."""
        last, new = layer.index == len(self.own) - 1, query.shape[2]
        if self.ready:
            assert self.state is not None
            out = self.state.attend(layer.index, query, scale)
            if last:
                self.state.advance()
                self.seen += 1
            return out
        assert layer.keys is not None and layer.values is not None
        if layer.index == 0:
            self._measure(new, mask)
        if layer.position is None:
            layer.starts = self.starts
        needs = Needs() if self.keeps_all else self.policy.needs
        with span("prefill attention"):
            out, stats = prompt_attention(query, layer.keys, layer.values, scale, layer.starts, needs)
        layer.stats = add(layer.stats, stats, new)
        if self.keeps_all:
            self._keep(layer)
            layer.keys = layer.values = None
        if last:
            first_decode = self.seen > 0 and new == 1
            self.seen += new
            if first_decode:
                self._pack()
        return out

    def compress(self) -> None:
        """Brings every layer down to its budget; decoding may start. Nothing happens twice.

        A policy that defers only sets its budgets here; the first decode step does the rest.
        """
        if self.ready:
            return
        self.mark("compress")
        if self.budgets is None:
            with span("allocate"):
                self.budgets = self._budgets()
        if self.policy.defers and not self.keeps_all:
            self.mark("decode")
        else:
            self._pack()

    def _pack(self) -> None:
        """Compresses the entries into slots."""
        assert self.lengths is not None and self.budgets is not None
        batch, heads, _ = self.shape
        extra = (self.max_new or SPARE) if self.grows else self.policy.interval
        budgets = self._grown(self.budgets)
        most = [min(int(row.max()), self._count(layer)) for layer, row in zip(self.own, budgets, strict=True)]
        sizes = [count + extra for count in most] if self.grows else capacities(budgets, extra)
        store = self._store or self._new_store(sizes)
        shape = (len(self.own), batch * heads, max(sizes))
        position = torch.full(shape, CLOSED, dtype=torch.int32, device=self.device)
        memory: list[dict[str, Tensor]] = []
        scores: list[Stats] = []
        merged, evicted = self.counts()
        for layer, keep, count in zip(self.own, budgets, most, strict=True):
            total, position_of = self._count(layer), self._positions(layer)
            index = self._all_entries(total)
            if not self.keeps_all:
                kept, remembered = compress(self.policy, self._entries(layer, position_of), keep, count)
                if self.grows:
                    kept = to_the_right(kept)
                index = kept.index
                memory.append(remembered)
                evicted[layer.index] += int(kept.leaving.sum())
                merged[layer.index] += int(remembered["merged"].sum()) if "merged" in remembered else 0
                scores.append(kept_stats(layer.stats, index.clamp_max(total - 1)))
                store.fill(layer.index, kept.keys.flatten(0, 1), kept.values.flatten(0, 1), kept.filled.flatten(0, 1))
            own = position[layer.index].view(batch, heads, -1)[..., : sizes[layer.index]]
            book(own, index, position_of, None if self.grows else keep + extra)
            layer.clear()
        now = (self.lengths - 1).to(torch.int32).repeat_interleave(heads)
        group = 1 if self.policy.expands else self.group
        state = DecodeState(store, position, now, self.policy, heads, group, most, self.grows, self.seed, self.rotary)
        if not self.keeps_all:
            self.policy.begin(state, memory, scores)
            if self.policy.carries is not None and not self.grows:
                state.carry = Carry(state, self.policy.carries)
        state.start()
        self.first = self.first or (self.budgets, self.lengths.tolist())
        self.merged_prompt, self.evicted_prompt = merged, evicted
        self.state, self.ready, self._store = state, True, None
        self.kept = self.held()
        self.prompt_kv_bytes = store.bytes
        self.mark("decode")

    def counts(self) -> tuple[list[int], list[int]]:
        """Entries merged and entries evicted so far in each layer, over its sequences and KV heads."""
        merged, evicted = list(self.merged_prompt), list(self.evicted_prompt)
        if self.state is not None:
            evicted = [a + b for a, b in zip(evicted, self.state.evicted.tolist(), strict=True)]
            if "merged" in self.state.extra:
                merged = [a + b for a, b in zip(merged, self.state.extra["merged"].tolist(), strict=True)]
        return merged, evicted

    def snapshot(self) -> Any:
        """A copy of everything that decoding changes. Entries are never written in place: references do for them."""
        own = {name: getattr(self, name) for name in LIVING}
        return own, [dict(vars(layer)) for layer in self.layers], self.state and self.state.snapshot()

    def restore(self, saved: Any) -> None:
        """Brings back a :meth:`snapshot`."""
        for name, old in saved[0].items():
            setattr(self, name, old)
        for layer, fields in zip(self.layers, saved[1], strict=True):
            layer.__dict__.update(fields)
        if self.state is not None:
            self.state.restore(saved[2])

    def held(self) -> Tensor:
        """Entries held now, per layer and sequence (mean over KV heads), float32 ``[layers, B]``."""
        assert self.lengths is not None
        if self.state is None:
            return self.lengths.float().expand(len(self.own), -1)
        batch, heads, _ = self.shape
        return self.state.held().view(len(self.own), batch, heads).float().mean(-1)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now, sliding layers included."""
        tensors = [held for layer in self.layers for held in (layer.keys, layer.values) if held is not None]
        slots = self.state.store.bytes if self.state else self._store.bytes if self._store else 0
        held: int = slots + sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return held

    @property
    def state_bytes(self) -> int:
        """Bytes of scores, positions, thresholds and work buffers."""
        tensors = self.state.tensors() if self.state else [stat for layer in self.own for stat in layer.stats.values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _entries(self, layer: PolicyLayer, position: Tensor) -> Entries:
        assert layer.keys is not None and layer.values is not None and self.lengths is not None
        return Entries(
            layer.index, len(self.own), layer.keys, layer.values, position, self.lengths, layer.stats, self.seed
        )

    def _keep(self, layer: PolicyLayer) -> None:
        """Writes a prompt that is kept whole straight into its slots."""
        assert layer.keys is not None and layer.values is not None
        self._note(layer)
        if self._store is None:
            sizes = [self.shape[2] + (self.max_new or SPARE)] * len(self.own)
            self._store = self._new_store(sizes)
        real = self._positions(layer).flatten(0, 1) >= 0
        self._store.fill(layer.index, layer.keys.flatten(0, 1), layer.values.flatten(0, 1), real)

    def _new_store(self, sizes: Sequence[int]) -> DenseStore:
        rows = self.shape[0] * self.shape[1]
        if self.policy.bits in (None, 16):
            return DenseStore(sizes, rows, self.widths, self.dtype, self.device)
        return QuantStore(sizes, rows, self.widths, self.dtype, self.device, self.policy.bits, self.grows)

    def _note(self, layer: PolicyLayer) -> None:
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        self.shape = (keys.shape[0], keys.shape[1], keys.shape[2])
        self.widths, self.dtype, self.device = (keys.shape[-1], values.shape[-1]), keys.dtype, keys.device

    def _append(self, layer: PolicyLayer, keys: Tensor, values: Tensor) -> None:
        """Adds a block to the entries of a layer."""
        if layer.keys is None:
            layer.keys, layer.values = keys, values
            return
        assert layer.values is not None and self._before is not None
        layer.keys, layer.values = torch.cat((layer.keys, keys), 2), torch.cat((layer.values, values), 2)
        if layer.position is not None:
            new = self._before[:, None, None] + torch.arange(keys.shape[2], device=self.device)
            layer.position = torch.cat((layer.position, new.expand(-1, keys.shape[1], -1)), 2)

    def _reopen(self) -> None:
        """Back from slots to entries, for a block after decoding has begun."""
        state = self.state
        assert state is not None and self.lengths is not None
        batch, heads, _ = self.shape
        for layer, turn in zip(self.own, reopen(state, batch), strict=True):
            layer.keys, layer.values, layer.position = turn.keys, turn.values, turn.position
            layer.starts, layer.stats = turn.starts, turn.stats
        self.merged_prompt, self.evicted_prompt = self.counts()
        self.lengths = state.now.view(batch, heads)[:, 0].long() + 1
        self.state, self.ready, self.budgets = None, False, None
        self.mark("prefill")

    def _count(self, layer: PolicyLayer) -> int:
        """Entries of a layer, padding included."""
        return self.shape[2] if layer.keys is None else int(layer.keys.shape[2])

    def _positions(self, layer: PolicyLayer) -> Tensor:
        """True position of each entry, ``[B, H, N]``, negative for padding."""
        if layer.position is not None:
            return layer.position
        return self._all_entries(self._count(layer)) - torch.tensor(self.starts, device=self.device)[:, None, None]

    def _all_entries(self, total: int) -> Tensor:
        return torch.arange(total, device=self.device).expand(*self.shape[:2], -1)

    def _grown(self, budgets: Tensor) -> Tensor:
        """Budgets with −1 (everything, and growing) as a number of slots."""
        assert self.lengths is not None
        if not bool((budgets < 0).any()):
            return budgets
        if self.max_new is None:
            raise PolicyError(
                f"policy '{self.policy.name}' has layers that grow", remedy="give max_new, the tokens to generate"
            )
        return torch.where(budgets < 0, self.lengths.cpu() + self.max_new, budgets)

    def _budgets(self) -> Tensor:
        assert self.lengths is not None
        length = self.lengths.cpu()
        if self.keeps_all:
            return length.expand(len(self.own), -1)
        assert self.budget is not None
        if self.first is not None:
            return rescale(*self.first, length.tolist(), self.budget)
        return self.policy.layer_budgets([layer.stats for layer in self.own], length, self.budget)

    def _measure(self, new: int, mask: Tensor | None) -> None:
        """Takes the lengths of the sequences from the padding mask, once a prompt; a later block adds to them."""
        self._note(self.own[0])
        if self.lengths is not None:
            self.lengths = self.lengths + new
            return
        self.starts = [0] * self.shape[0] if mask is None else (new - real_tokens(mask, new)).tolist()
        self.lengths = new - torch.tensor(self.starts, device=self.device)

    def _extend(self) -> None:
        """Makes room in a growing cache whose generation turned out longer than its slots."""
        state = self.state
        assert state is not None
        if all(used + state.added < size for used, size in zip(state.prompts, state.store.capacities, strict=True)):
            return
        state.extend(max(SPARE, (max(state.prompts) + state.added) // 2))
