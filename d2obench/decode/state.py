"""The decode state: the content of every slot, the slot that the next token will overwrite, and the order of a step.

A step does this in every compressed layer: ``write`` puts the new key and value into the slot that the previous step
freed; ``attend`` computes attention over the layer's slots and leaves the attention weights (mean over the query heads
of a KV head) in ``attention``. After the last layer, ``advance`` lets the policy's rule choose, for all layers at once,
the slot that the next token will overwrite, which evicts the entry in it. Nothing is concatenated or reallocated, and
the host never waits for the device.

The state holds data only; a backend (``d2obench.decode.backend``) computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench.decode import backend, rules
from d2obench.decode.mass import PendingMass
from d2obench.decode.merge import PendingMerge, StagedEntries
from d2obench.decode.pages import Pages
from d2obench.errors import ModelError
from d2obench.policies.base import Stats
from d2obench.policies.protect import decode_rule
from d2obench.policies.random import stream
from d2obench.policies.rules import (
    Custom,
    DecodeRule,
    LowestScore,
    LowestWeightedScore,
    MassSpec,
    Merge,
    MergeSpec,
    RowSizes,
)
from d2obench.slots.dense import CLOSED, EMPTY, NEVER, DenseStore

if TYPE_CHECKING:
    from d2obench.decode.reference import Backend
    from d2obench.policies.base import Policy


class DecodeState:
    """Slots of all compressed layers for one batch.

    Args:
        store: keys and values.
        position: int32 ``[layers, rows, C]``, true position of each slot's token, or EMPTY, or CLOSED.
        now: int32 ``[rows]``, position of the last token of each row's sequence.
        policy: the policy whose rule chooses the slots to overwrite.
        heads: KV heads per sequence; rows = batch × heads.
        group: query heads per KV head.
        prompts: number of slots that the prompt occupies in each layer.
        grows: whether tokens are appended and nothing is evicted.
        seed: seed for policies that draw random numbers.
        rotary: float32 ``[r/2]``, rotation angle per position of each rotary pair; None if the angles depend on the
            length.
        first_layer: index among all compressed layers of the first of these.
        first_head: index in the model of the first KV head.

    Attributes:
        rule: how a step chooses what to evict, as the policy declares it; None in a growing cache.
        merge_spec: how evicted entries are merged, as the policy declares it; None in a growing cache.
        merge: the pending merge of D2O or by mass, if one entry is evicted at a time.
        score: float32 ``[layers, rows, C]``, the number that the rule compares; NEVER for slots that must not be
            overwritten, −NEVER for slots that must be overwritten first.
        square: sums of squared attention, for the rule that needs them.
        factor: float32 ``[layers, rows, C]``, each entry's weight in the rule :class:`LowestWeightedScore`.
        fresh: float32 ``[layers, rows]``, the diversity of a decoded token in the same rule.
        attention: float32 ``[layers, rows, C]``, attention weights of the last step (their sum over the query heads of
            a KV head until the step ends, then their mean).
        threshold: float32 ``[layers, rows]``, the similarity required for a merge; −inf before the first eviction.
        merged: entries merged during decoding, int64 ``[layers]``.
        evicted: entries evicted during decoding, int64 ``[layers]``.
        usable: slots of each row that are not CLOSED, ``[layers, rows]``.
        bias: what attention adds to a slot's logit: −inf where it must not see the slot, and with a merge by mass the
            slot's own bias, float32; None if all slots are filled and nothing has a bias.
        free: slots of the next ``interval`` tokens, int64 ``[layers, rows, interval]``.
        slot: slot of the next token, ``[layers, rows]``.
        target: row of that slot in the store's flat tensors, ``[layers, rows]``.
        stream: hash state that the random numbers of a row start from, int64 ``[layers, rows, 1]``.
        extra: tensors of a policy with a :class:`Custom` rule, by name.
        queries: the newest queries, ``[layers, rows, G, n, d]``, in any order; 0 for those before decoding; None if the
            policy needs none (:attr:`Policy.decode_queries`).
        scale: factor of the logits.
        pages: which parts of a growing cache steps read; None if they read all of it.
    """

    def __init__(
        self,
        store: DenseStore,
        position: Tensor,
        now: Tensor,
        policy: Policy,
        heads: int,
        group: int,
        prompts: Sequence[int],
        grows: bool,
        seed: int = 0,
        rotary: Tensor | None = None,
        first_layer: int = 0,
        first_head: int = 0,
    ) -> None:
        self.store, self.position, self.now, self.policy = store, position, now, policy
        self.heads, self.group, self.grows, self.seed = heads, group, grows, seed
        self.first_layer, self.first_head = first_layer, first_head
        self.prompts, self.added, self.rotary, self.steps = list(prompts), 0, rotary, 0
        layers, rows, width = position.shape
        device = position.device
        self.rule: DecodeRule | None = None
        self.merge_spec: Merge | None = None if grows else policy.merge_spec
        self.merge: StagedEntries | None = None
        self.tracks = (policy.needs_attention or isinstance(self.merge_spec, MassSpec)) and not grows
        self.attention = torch.zeros((layers, rows, width) if self.tracks else (0,), device=device)
        self.score, self.square = torch.zeros_like(self.attention), torch.zeros(0, device=device)
        self.factor, self.fresh = torch.zeros(0, device=device), torch.zeros(0, device=device)
        self.threshold = torch.full((layers, rows), -torch.inf, device=device)
        self.merged, self.evicted = (torch.zeros(layers, dtype=torch.long, device=device) for _ in range(2))
        self.usable = (position != CLOSED).sum(-1)
        self.bias: Tensor | None = None
        self.biased = False
        """Whether slots have biases of their own, from a merge; they are part of what the cache holds."""
        self.slot = torch.zeros(layers, rows, dtype=torch.long, device=device)
        self.free = torch.zeros(layers, rows, policy.interval, dtype=torch.long, device=device)
        self.target = store.base.clone()
        layer = first_layer + torch.arange(layers, device=device)[:, None, None]
        head = first_head + (torch.arange(rows, device=device) % heads)[:, None]
        self.stream = stream(seed, layer, head, device)
        self.extra: dict[str, Tensor] = {}
        self.scale, newest = 1.0, 0 if grows else policy.decode_queries
        self.queries: Tensor | None = None
        if newest:
            shape = (layers, rows, group, newest, store.widths[0])
            self.queries = torch.zeros(shape, dtype=store.dtype, device=device)
        self._oldest = torch.zeros(min(1, newest), dtype=torch.long, device=device)
        """Which of the queries the next one replaces."""
        self.pages: Pages | None = None
        batch, (key_width, value_width) = rows // heads, store.widths
        self._key_shape, self._value_shape = (batch, heads, 1, key_width), (batch, heads, 1, value_width)
        self._query_shape = (batch, heads * group, 1, key_width)
        self.backend: Backend
        self.fallback = ""
        """The reason why the device's fast path is not used for decoding; empty if it is."""

    def start(self, memory: Sequence[dict[str, Tensor]] = (), scores: list[Stats] | None = None) -> None:
        """Prepares decoding; called once the kept entries are in their slots.

        Args:
            memory: what the policy's ``absorb`` returned, per layer.
            scores: statistics of the kept entries, per layer, ``[B, H, C]``; None if everything was kept.
        """
        unused, spare = self.position < 0, self.policy.interval
        held = (self.position >= 0).sum(-1)
        # 1. the rule and the fields that it uses
        for layer, remembered in enumerate(memory):
            if "threshold" in remembered and isinstance(self.merge_spec, MergeSpec):
                self.threshold[layer] = remembered["threshold"].flatten()
        if not self.grows:
            budget = self.usable - spare
            if self.policy.sharing is not None:  # windows and sinks are those of the average budget
                budget = budget.view(len(budget), -1, self.heads).sum(-1) // self.heads
                budget = budget.repeat_interleave(self.heads, -1)
            self.rule = decode_rule(self.policy, RowSizes(budget, self.position, self.now.long() + 1))
            rules.begin(self, self.rule, scores or [])
        if scores is not None:
            self.policy.begin(self, list(memory), scores)
        if self.score.numel():
            self.score.masked_fill_(unused, -NEVER).masked_fill_(self.position == CLOSED, NEVER)
        if spare == 1:
            self.merge = _pending(self, self.merge_spec)
        # 2. hide empty slots from attention, and give the others their biases
        full = self.prompts if self.grows else [capacity - spare for capacity in self.store.capacities]
        whole = bool((held == torch.tensor(full, device=held.device)[:, None]).all())
        slots = torch.arange(self.position.shape[-1], device=held.device)
        if self.grows:
            unused &= slots < torch.tensor(self.prompts, device=held.device)[:, None, None]
        self.biased = scores is not None and self.policy.adds_biases
        if self.biased or not whole or (spare > 1 and not self.grows):
            kind = torch.float32 if self.biased else self.store.dtype
            self.bias = torch.zeros(self.position.shape, dtype=kind, device=held.device)
            rules.fill(self.bias, scores or [], "bias")
            self.bias.masked_fill_(unused, -torch.inf)
        # 3. choose the slots of the first decoded tokens
        if self.grows:
            self._append()
        else:
            order = slots.expand_as(self.position)
            empty = torch.where(self.position == EMPTY, order, self.position.shape[-1])
            self.free_slots(empty.topk(spare, -1, largest=False, sorted=True).indices)
            if self.merge is not None:
                self.merge.stage(self.slot)
            self.reserve()
        self._choose()

    def read_pages(self, most: Tensor) -> None:
        """From now on, steps read pages of ``most`` tokens together, int64 ``[B]``, as the policy says."""
        assert self.policy.reads is not None
        self.pages = Pages(self, self.policy.reads, most.to(self.now.device).repeat_interleave(self.heads))
        self._choose()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Writes the new token's key and value ``[B, H, 1, d]`` to the layer's freed slots.

        Raises:
            ModelError: the shape, dtype or device differs from the slots', or no slot is left. Everything is checked
                here, because compiled backends use raw addresses.
        """
        for held, shape in ((keys, self._key_shape), (values, self._value_shape)):
            if held.shape != shape or held.dtype != self.store.dtype or held.device != self.now.device:
                raise self._unfit("key or value", held, shape)
        if self.grows and self.prompts[layer] + self.added >= self.store.capacities[layer]:
            raise ModelError("every slot of the cache is taken", remedy="give a larger max_new, or extend the cache")
        self.backend.write(layer, keys, values)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of one new query over the layer's slots.

        Args:
            layer: index among the compressed layers.
            query: ``[B, Hq, 1, d]``.
            scale: factor of the logits.

        Returns:
            ``[B, 1, Hq, d_v]``.

        Raises:
            ModelError: as :meth:`write`.
        """
        if query.shape != self._query_shape or query.dtype != self.store.dtype or query.device != self.now.device:
            raise self._unfit("query", query, self._query_shape)
        if self.queries is not None:
            self.scale, held = scale, self.queries[layer]
            held.index_copy_(2, self._oldest, query.reshape(*held.shape[:2], 1, -1))
        return self.backend.attend(layer, query, scale)

    def advance(self) -> None:
        """Ends a step: the rule reads the step's attention and frees the slot of the next token."""
        self.count()
        self.now += 1
        if self.queries is not None:
            self._oldest.add_(1).remainder_(self.queries.shape[3])
        if self.grows:
            self.target += 1
        else:
            self.backend.update()

    def count(self) -> None:
        """Updates the host's counters for one step; the only part of a step that a replayed CUDA graph does not do."""
        self.steps += 1
        self.added += self.grows

    @property
    def decode_path(self) -> str:
        """What executes a step, as text for the ``decode path`` field of a result."""
        return self.backend.path

    def observe_inherited(self) -> None:
        """Updates the statistics of the rule that a :class:`Custom` rule is based on (``Custom.inherited``)."""
        rules.observe(self, _inherited(self.rule))

    def inherited_victims(self) -> Tensor:
        """The slots that the rule which a :class:`Custom` rule is based on would free."""
        return rules.victims(self, _inherited(self.rule))

    def known(self) -> Stats:
        """The prompt statistics that can still be read from the slots, ``[layers, rows, C]`` by name."""
        return rules.known(self, self.rule)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, and of the biases or the bounds of pages that belong to them."""
        biases = self.store.slots * torch.float32.itemsize if self.biased else 0
        return self.store.bytes + biases + (0 if self.pages is None else self.pages.bytes)

    @property
    def read_bytes(self) -> int | None:
        """Bytes of them that the last step has read; None if that is all that was held."""
        return None if self.pages is None else self.pages.read_bytes

    def least(self, score: Tensor, recent: Tensor | int) -> Tensor:
        """Slots of the lowest scores outside a recent window; see :func:`d2obench.decode.rules.lowest`."""
        return rules.lowest(self, score, recent)

    def marked(self, score: Tensor) -> Tensor:
        """``score`` ``[layers, rows, C]``, with slots without an entry marked for :meth:`least`: an empty one comes
        first, a closed one never."""
        return score.masked_fill(self.position == EMPTY, -NEVER).masked_fill(self.position == CLOSED, NEVER)

    def oldest(self, start: Tensor | int) -> Tensor:
        """Slots of the oldest tokens from a position on; see :func:`d2obench.decode.rules.oldest`."""
        return rules.oldest(self, start)

    def important(self) -> Tensor:
        """Which slots hold an entry that is neither a sink nor in the recent window, bool ``[layers, rows, C]``."""
        rule = _inherited(self.rule) if isinstance(self.rule, Custom) else self.rule
        assert isinstance(rule, LowestScore | LowestWeightedScore)
        newest = self.position > self.now[None, :, None] - rule.recent[..., None]
        return (self.position >= 0) & (self.position >= rules.column(rule.sinks)) & ~newest

    def free_slots(self, slots: Tensor) -> None:
        """Evicts the entries in ``slots`` ``[layers, rows, interval]``. Slots that are not overwritten before the next
        attention are hidden from it."""
        self.free.copy_(slots)
        self.slot = self.free[..., 0]
        self.evicted += (self.position.gather(2, slots) >= 0).sum((1, 2))
        if self.policy.interval > 1 and self.bias is not None:
            self.position.scatter_(2, slots, EMPTY)
            self.bias.scatter_(2, slots, -torch.inf)
            if self.score.numel():
                self.score.scatter_(2, slots, -NEVER)

    def reserve(self) -> None:
        """Reserves the freed slot for the next token."""
        at = self.slot[..., None]
        self.position.scatter_(2, at, (self.now + 1)[None, :, None].expand(*self.slot.shape, 1))
        torch.add(self.store.base, self.slot, out=self.target)
        if self.score.numel():
            self.score.scatter_(2, at, 0.0)
        if self.bias is not None:
            self.bias.scatter_(2, at, 0.0)

    def where(self) -> Tensor:
        """True position of the token in each slot, ``[layers, rows, C]``; negative for a slot without one."""
        if not self.grows:
            return torch.where(self.position > self.now[None, :, None], EMPTY, self.position)
        position = self.position.clone()
        ages = torch.arange(self.added - 1, -1, -1, device=self.now.device, dtype=position.dtype)
        for layer, prompt in enumerate(self.prompts):
            position[layer, :, prompt : prompt + self.added] = self.now[:, None] - ages
        return position

    def skip(self, tokens: int) -> None:
        """Advances the state as if ``tokens`` more had been decoded, for sampled decoding (``--decode sampled``). A
        growing cache is filled with copies of its entries; a bounded one only gets later positions. Sizes are correct,
        contents are placeholders."""
        self.now += tokens
        if not self.grows:
            return
        self.store.repeat([prompt + self.added for prompt in self.prompts], tokens)
        self.added += tokens
        self._append()
        if self.pages is not None:
            self.pages.refresh()

    def tensors(self) -> list[Tensor]:
        """Every tensor except keys and values, for snapshots and for counting bytes."""
        return [*self._living(), *self.store.work(), *self.backend.tensors()]

    def snapshot(self, decode_only: bool = False) -> tuple[Any, ...]:
        """A copy of everything that decoding changes, for :meth:`restore`; work buffers are not copied.

        Args:
            decode_only: nothing but decode steps and :meth:`skip` comes before :meth:`restore`. A cache that grows then
                needs no copy of its entries: it only writes behind those it holds now.
        """
        appends = decode_only and self.grows and not self.store.quantised
        entries = None if appends else self.store.snapshot()
        return entries, [tensor.clone() for tensor in self._living()], self.added, self.steps

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Copies the contents of a :meth:`snapshot` back, in place, so that addresses held by backends and graphs stay
        valid."""
        # 1. keys and values, then every tensor that a step changes
        if saved[0] is not None:
            self.store.restore(saved[0])
        for tensor, old in zip(self._living(), saved[1], strict=True):
            tensor.copy_(old)
        # 2. the host's counters, and what is derived from them
        self.added, self.steps = saved[2], saved[3]
        if self.grows:
            self._append()
        else:
            self.slot = self.free[..., self.steps % self.policy.interval]

    def extend(self, tokens: int) -> None:
        """Adds ``tokens`` slots to a growing cache; copies the cache once."""
        self.store = self.store.extended(tokens)
        layers, rows, width = self.position.shape
        position = torch.full((layers, rows, width + tokens), EMPTY, dtype=self.position.dtype, device=self.now.device)
        position[..., :width] = self.position
        self.position = position
        if self.bias is not None:
            self.bias = torch.nn.functional.pad(self.bias, (0, tokens))
        if self.pages is not None:
            self.pages.refresh()
        self._append()
        self._choose()

    def retract(self, tokens: int) -> None:
        """Removes the last ``tokens`` tokens that were decoded into a growing cache, at most ``added``."""
        with torch.inference_mode(self.now.is_inference()):
            self.now -= tokens
            self.added -= tokens
            self._append()

    def select(self, sequences: Tensor) -> DecodeState:
        """A copy of this state for other sequences: beams, parallel samples, or copies of a sequence.

        Args:
            sequences: int64 ``[B']``; sequence i of the new state continues sequence ``sequences[i]`` of this one. Its
                entries, scores, thresholds, random numbers and pending merge are copied.
        """
        found = self.copied(sequences)
        found._choose()
        return found

    def copied(self, sequences: Tensor) -> DecodeState:
        """As :meth:`select`, without a backend: the caller gives it one."""
        sequences = sequences.to(self.now.device)
        old, rows = (
            self.store.rows,
            (sequences[:, None] * self.heads + torch.arange(self.heads, device=self.now.device)),
        )
        rows = rows.flatten()

        def picked(held: Tensor) -> Tensor:
            if held.dim() > 1 and held.shape[1] == old:
                return held[:, rows]
            return held[rows] if held.dim() and held.shape[0] == old else held.clone()

        found = DecodeState(
            self.store.selected(rows), self.position[:, rows], self.now[rows], self.policy, self.heads, self.group,
            self.prompts, self.grows, self.seed, self.rotary, self.first_layer, self.first_head,
        )  # fmt: skip
        found.added, found.steps, found.rule = self.added, self.steps, _picked_rule(self.rule, picked)
        for name in ("attention", "score", "square", "factor", "fresh", "threshold", "usable", "stream", "free"):
            setattr(found, name, picked(getattr(self, name)))
        found.merged, found.evicted = self.merged.clone(), self.evicted.clone()
        found.bias, found.biased = None if self.bias is None else picked(self.bias), self.biased
        found.extra = {name: picked(held) for name, held in self.extra.items()}
        found.queries, found.scale = None if self.queries is None else picked(self.queries), self.scale
        found._oldest = self._oldest.clone()
        if self.merge is not None:
            found.merge = type(self.merge)(found, self.merge.spec)
            for new, mine in zip(found.merge.tensors()[:-1], self.merge.tensors()[:-1], strict=True):  # less work space
                new.copy_(picked(mine))
        found.pages = None if self.pages is None else self.pages.selected(found, rows)
        if self.grows:
            found._append()
        else:
            found.slot = found.free[..., self.steps % self.policy.interval]
            torch.add(found.store.base, found.slot, out=found.target)
        return found

    def held(self) -> Tensor:
        """Entries held per layer and row, ``[layers, rows]``; the slot freed for the next token is not counted."""
        return (self.position >= 0).sum(-1) + (self.added if self.grows else -1)

    def _living(self) -> list[Tensor]:
        """The tensors that a decode step changes, except keys and values."""
        own = [self.position, self.now, self.attention, self.score, self.square, self.factor, self.free, self.target]
        own += [self.threshold, self.merged, self.evicted, *self.extra.values()]
        own += [held for held in (self.bias, self.queries) if held is not None] + [self._oldest]
        own += [] if self.pages is None else self.pages.tensors()
        return own + ([] if self.merge is None else self.merge.tensors())

    def _choose(self) -> None:
        self.backend = backend.choose(self)
        self.fallback = self.backend.why

    def _append(self) -> None:
        prompts = torch.tensor(self.prompts, device=self.now.device)[:, None]
        self.target.copy_(self.store.base + prompts + self.added)

    def _unfit(self, what: str, found: Tensor, shape: tuple[int, ...]) -> ModelError:
        return ModelError(
            f"a decode step's {what} is {list(found.shape)}, {found.dtype} on {found.device}",
            why=f"the cache holds {list(shape)}, {self.store.dtype} on {self.now.device}",
            remedy="use the cache with the model and the batch that its prompt had",
        )


def _pending(state: DecodeState, spec: Merge | None) -> StagedEntries | None:
    match spec:
        case MergeSpec():
            return PendingMerge(state, spec)
        case MassSpec():
            return PendingMass(state, spec)
        case _:
            return None


def _inherited(rule: DecodeRule | None) -> DecodeRule | None:
    return rule.inherited if isinstance(rule, Custom) else None


def _picked_rule(rule: DecodeRule | None, picked: Callable[[Tensor], Tensor]) -> DecodeRule | None:
    """The rule with its per-row tensors restricted to the rows that ``picked`` selects."""
    if isinstance(rule, Custom):
        return dataclasses.replace(rule, inherited=_picked_rule(rule.inherited, picked))
    if rule is None:
        return None
    held: dict[str, Any] = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    changed: Any = {name: picked(one) for name, one in held.items() if isinstance(one, Tensor)}
    return dataclasses.replace(rule, **changed)


def capacities(budgets: Tensor, spare: int) -> Sequence[int]:
    """Slots per layer for budgets ``[layers, …]``: the largest budget plus ``spare`` slots for new tokens."""
    return [int(most) + spare for most in budgets.flatten(1).amax(1).tolist()]
