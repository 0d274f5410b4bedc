"""The decode state: what is in every slot, what a step overwrites next, and the sequence of a step.

One step, for every compressed layer: the new key and value go to the slot that the last step freed (``write``),
attention runs over the layer's slots, and the row of attention (mean over the query heads of a KV head) is left in
``attention`` (``attend``). After the last layer ``advance`` lets the policy's rule choose, for all layers at once, the
slot that the next token takes. A slot chosen so is an eviction. There is no concatenation, no reallocation and no
synchronisation with the host.

The state is data; a backend (``d2obench.decode.backend``) works on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench.decode import backend, reference
from d2obench.decode.merge import PendingMerge
from d2obench.errors import ModelError
from d2obench.policies.base import Custom, DecodeRule, LowestScore, MergeSpec, RowSizes, SpreadSpec, Stats
from d2obench.policies.random import stream
from d2obench.slots.dense import CLOSED, EMPTY, NEVER, DenseStore

if TYPE_CHECKING:
    from d2obench.decode.reference import Backend
    from d2obench.policies.base import Policy


class DecodeState:
    """Slots of all compressed layers of one batch.

    Args:
        store: keys and values.
        position: int32 ``[layers, rows, C]``, true position of each slot's token, or EMPTY, or CLOSED.
        now: int32 ``[rows]``, position of the last token of each row's sequence.
        policy: chooses the slots.
        heads: KV heads per sequence; rows = batch × heads.
        group: query heads per KV head.
        prompts: slots of each layer that the prompt takes.
        grows: tokens are appended and nothing is evicted.
        seed: for policies that draw.
        rotary: float32 ``[r/2]``, angle per position of each rotary pair; None if it isn't constant.
        first_layer: the model's index of the first of these layers, and
        first_head: of a row's first KV head; for policies that draw.

    Attributes:
        rule: how a step chooses what to evict, and
        merge_spec: what becomes of that; both as the policy declares them, None in a growing cache.
        merge: the pending merge, for a D2O that evicts one entry at a time.
        score: float32 ``[layers, rows, C]``, what the rule compares; NEVER and −NEVER for slots that can't or must be
            taken.
        square: sums of squared attention, for the rule that needs them.
        attention: float32 ``[layers, rows, C]``, the row of attention of the last step (its sum over the query heads of
            a KV head until the step ends, then their mean).
        threshold: float32 ``[layers, rows]``, the similarity that a merge needs; −inf before the first eviction.
        merged: entries merged and
        evicted: entries evicted so far while decoding, int64 ``[layers]``.
        usable: slots of each row that are not CLOSED, ``[layers, rows]``.
        bias: −inf for slots that attention must not see; None where all hold something.
        free: the slots of the next ``interval`` tokens, int64 ``[layers, rows, interval]``.
        slot: that of the next one, ``[layers, rows]``, and
        target: its line in the store.
        stream: what the draws of a row begin with, int64 ``[layers, rows, 1]``.
        extra: what a policy with a rule of its own keeps.
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
        self.prompts, self.added, self.rotary, self.steps = list(prompts), 0, rotary, 0
        layers, rows, width = position.shape
        device = position.device
        self.rule: DecodeRule | None = None
        self.merge_spec: MergeSpec | SpreadSpec | None = None if grows else policy.merge_spec
        self.merge: PendingMerge | None = None
        self.tracks = policy.needs_attention and not grows
        self.attention = torch.zeros((layers, rows, width) if self.tracks else (0,), device=device)
        self.score, self.square = torch.zeros_like(self.attention), torch.zeros(0, device=device)
        self.threshold = torch.full((layers, rows), -torch.inf, device=device)
        self.merged, self.evicted = (torch.zeros(layers, dtype=torch.long, device=device) for _ in range(2))
        self.usable = (position != CLOSED).sum(-1)
        self.bias: Tensor | None = None
        self.slot = torch.zeros(layers, rows, dtype=torch.long, device=device)
        self.free = torch.zeros(layers, rows, policy.interval, dtype=torch.long, device=device)
        self.target = store.base.clone()
        layer = first_layer + torch.arange(layers, device=device)[:, None, None]
        head = first_head + (torch.arange(rows, device=device) % heads)[:, None]
        self.stream = stream(seed, layer, head, device)
        self.extra: dict[str, Tensor] = {}
        batch, (key_width, value_width) = rows // heads, store.widths
        self._key_shape, self._value_shape = (batch, heads, 1, key_width), (batch, heads, 1, value_width)
        self._query_shape = (batch, heads * group, 1, key_width)
        self.backend: Backend
        self.fallback = ""
        """Why a fast path of the device, for decoding or for the prompt, was not taken; in words."""

    def start(self, memory: Sequence[dict[str, Tensor]] = (), scores: list[Stats] | None = None) -> None:
        """Called once the kept entries are in place.

        Args:
            memory: what the policy's ``absorb`` returned, per layer.
            scores: the statistics of the kept entries, per layer, ``[B, H, C]``; None where everything was kept.
        """
        unused, spare = self.position < 0, self.policy.interval
        held = (self.position >= 0).sum(-1)
        # 1. the rule, and the fields it works on
        for layer, remembered in enumerate(memory):
            if "threshold" in remembered and isinstance(self.merge_spec, MergeSpec):
                self.threshold[layer] = remembered["threshold"].flatten()
        if not self.grows:
            self.rule = self.policy.decode_rule(RowSizes(self.usable - spare, self.position, self.now.long() + 1))
            reference.begin(self, self.rule, scores or [])
        if scores is not None:
            self.policy.begin(self, list(memory), scores)
        if self.score.numel():
            self.score.masked_fill_(unused, -NEVER).masked_fill_(self.position == CLOSED, NEVER)
        if isinstance(self.merge_spec, MergeSpec) and spare == 1:
            self.merge = PendingMerge(self, self.merge_spec)
        # 2. what attention must not see
        full = self.prompts if self.grows else [capacity - spare for capacity in self.store.capacities]
        whole = bool((held == torch.tensor(full, device=held.device)[:, None]).all())
        slots = torch.arange(self.position.shape[-1], device=held.device)
        if self.grows:
            unused &= slots < torch.tensor(self.prompts, device=held.device)[:, None, None]
        if not whole or (spare > 1 and not self.grows):
            bias = torch.zeros(self.position.shape, dtype=self.store.dtype, device=held.device)
            self.bias = bias.masked_fill_(unused, -torch.inf)
        # 3. the slots of the first tokens
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

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Puts the new token's key and value ``[B, H, 1, d]`` into the layer's freed slots.

        Raises:
            ModelError: tensors of another shape, dtype or device than the slots, or no slot left. Compiled backends
                trust their addresses, so all is checked here.
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
        return self.backend.attend(layer, query, scale)

    def advance(self) -> None:
        """Ends a step: the rule sees its attention and frees the slot of the next token."""
        self.count()
        self.now += 1
        if self.grows:
            self.target += 1
        else:
            self.backend.update()

    def count(self) -> None:
        """Counts a step on the host: all of a step that replaying a graph of it leaves out."""
        self.steps += 1
        self.added += self.grows

    @property
    def decode_path(self) -> str:
        """What executes a step, in the words of a result's decode path."""
        return self.backend.path

    def observe_inherited(self) -> None:
        """What the rule that a policy's own one is built on does with a row of attention."""
        reference.observe(self, _inherited(self.rule))

    def inherited_victims(self) -> Tensor:
        """The slots that the rule which a policy's own one is built on would free."""
        return reference.victims(self, _inherited(self.rule))

    def known(self) -> Stats:
        """The prompt statistics that the slots still know, ``[layers, rows, C]`` by name."""
        return reference.known(self, self.rule)

    def least(self, score: Tensor, recent: Tensor | int) -> Tensor:
        """Slots of the lowest scores outside a recent window; see :func:`d2obench.decode.reference.lowest`."""
        return reference.lowest(self, score, recent)

    def oldest(self, start: Tensor | int) -> Tensor:
        """Slots of the oldest tokens from a position on; see :func:`d2obench.decode.reference.oldest`."""
        return reference.oldest(self, start)

    def important(self) -> Tensor:
        """Which slots hold an entry that is neither a sink nor in the recent window, bool ``[layers, rows, C]``."""
        rule = self.rule if isinstance(self.rule, LowestScore) else _inherited(self.rule)
        assert isinstance(rule, LowestScore)
        newest = self.position > self.now[None, :, None] - rule.recent[..., None]
        return (self.position >= 0) & ~newest & ~self.score.isinf()

    def free_slots(self, slots: Tensor) -> None:
        """Evicts ``[layers, rows, interval]``; what is not overwritten before the next attention is hidden from it."""
        self.free.copy_(slots)
        self.slot = self.free[..., 0]
        self.evicted += (self.position.gather(2, slots) >= 0).sum((1, 2))
        if self.policy.interval > 1 and self.bias is not None:
            self.position.scatter_(2, slots, EMPTY)
            self.bias.scatter_(2, slots, -torch.inf)
            if self.score.numel():
                self.score.scatter_(2, slots, -NEVER)

    def reserve(self) -> None:
        """Reserves the freed slot for the token to come."""
        at = self.slot[..., None]
        self.position.scatter_(2, at, (self.now + 1)[None, :, None].expand(*self.slot.shape, 1))
        torch.add(self.store.base, self.slot, out=self.target)
        if self.score.numel():
            self.score.scatter_(2, at, 0.0)
        if self.bias is not None:
            self.bias.scatter_(2, at, 0.0)

    def where(self) -> Tensor:
        """True position of what each slot holds, ``[layers, rows, C]``; negative where it holds nothing."""
        if not self.grows:
            return torch.where(self.position > self.now[None, :, None], EMPTY, self.position)
        position = self.position.clone()
        ages = torch.arange(self.added - 1, -1, -1, device=self.now.device, dtype=position.dtype)
        for layer, prompt in enumerate(self.prompts):
            position[layer, :, prompt : prompt + self.added] = self.now[:, None] - ages
        return position

    def skip(self, tokens: int) -> None:
        """Moves on as if ``tokens`` more had been decoded: a growing cache is filled with copies of its entries, a
        bounded one only sees later positions. For sampled decode; contents are stand-ins, sizes are true."""
        self.now += tokens
        if not self.grows:
            return
        self.store.repeat([prompt + self.added for prompt in self.prompts], tokens)
        self.added += tokens
        self._append()

    def tensors(self) -> list[Tensor]:
        """Every tensor beside keys and values, for snapshots and for counting bytes."""
        return [*self._living(), *self.store.work(), *self.backend.tensors()]

    def snapshot(self) -> tuple[Any, ...]:
        """A copy of what decoding changes; work buffers are left out."""
        return self.store.snapshot(), [tensor.clone() for tensor in self._living()], self.added, self.steps

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Brings back a :meth:`snapshot`, in place."""
        self.store.restore(saved[0])
        for tensor, old in zip(self._living(), saved[1], strict=True):
            tensor.copy_(old)
        self.added, self.steps = saved[2], saved[3]
        if self.grows:
            self._append()
        else:
            self.slot = self.free[..., self.steps % self.policy.interval]

    def extend(self, tokens: int) -> None:
        """Makes room for ``tokens`` more in a growing cache, by one copy."""
        self.store = self.store.extended(tokens)
        layers, rows, width = self.position.shape
        position = torch.full((layers, rows, width + tokens), EMPTY, dtype=self.position.dtype, device=self.now.device)
        position[..., :width] = self.position
        self.position = position
        if self.bias is not None:
            self.bias = torch.nn.functional.pad(self.bias, (0, tokens))
        self._append()
        self._choose()

    def retract(self, tokens: int) -> None:
        """Takes back the last ``tokens`` that were decoded into a growing cache, at most ``added``."""
        with torch.inference_mode(self.now.is_inference()):
            self.now -= tokens
            self.added -= tokens
            self._append()

    def select(self, sequences: Tensor) -> DecodeState:
        """The same state for other sequences, for beams, parallel samples and copies.

        Args:
            sequences: int64 ``[B']``, the sequence of this state that each one of the new state goes on with. All that
                is known of its rows goes along: entries, scores, thresholds, draws, a pending merge.
        """
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
            self.prompts, self.grows, self.seed, self.rotary,
        )  # fmt: skip
        found.added, found.steps, found.rule = self.added, self.steps, _picked_rule(self.rule, picked)
        for name in ("attention", "score", "square", "threshold", "usable", "stream", "free"):
            setattr(found, name, picked(getattr(self, name)))
        found.merged, found.evicted = self.merged.clone(), self.evicted.clone()
        found.bias = None if self.bias is None else picked(self.bias)
        found.extra = {name: picked(held) for name, held in self.extra.items()}
        if self.merge is not None:
            found.merge = PendingMerge(found, self.merge.spec)
            for new, mine in zip(found.merge.tensors()[:-1], self.merge.tensors()[:-1], strict=True):  # less work space
                new.copy_(picked(mine))
        if self.grows:
            found._append()
        else:
            found.slot = found.free[..., self.steps % self.policy.interval]
            torch.add(found.store.base, found.slot, out=found.target)
        found._choose()
        return found

    def held(self) -> Tensor:
        """Entries held per layer and row, ``[layers, rows]``; the slot freed for the next token doesn't count."""
        return (self.position >= 0).sum(-1) + (self.added if self.grows else -1)

    def _living(self) -> list[Tensor]:
        own = [self.position, self.now, self.attention, self.score, self.square, self.free, self.target]
        own += [self.threshold, self.merged, self.evicted, *self.extra.values()]
        own += [] if self.bias is None else [self.bias]
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


def _inherited(rule: DecodeRule | None) -> DecodeRule | None:
    return rule.inherited if isinstance(rule, Custom) else None


def _picked_rule(rule: DecodeRule | None, picked: Callable[[Tensor], Tensor]) -> DecodeRule | None:
    """A rule whose figures of rows are those of the rows that ``picked`` picks."""
    if isinstance(rule, Custom):
        return dataclasses.replace(rule, inherited=_picked_rule(rule.inherited, picked))
    if rule is None:
        return None
    held: dict[str, Any] = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    changed: Any = {name: picked(one) for name, one in held.items() if isinstance(one, Tensor)}
    return dataclasses.replace(rule, **changed)


def capacities(budgets: Tensor, spare: int) -> Sequence[int]:
    """Slots per layer for budgets ``[layers, B]``: the largest of the batch and what comes before it is evicted."""
    return [int(most) + spare for most in budgets.amax(1).tolist()]
