"""A decode step in PyTorch operators: the reference for every backend, and the fallback that handles every case.
``d2obench.decode.rules`` says what it does for each kind of rule."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2obench.decode import mass, rules
from d2obench.decode.merge import merge_together
from d2obench.policies.random import drawn
from d2obench.policies.rules import Custom, MassSpec, MergeSpec, Ring, SpreadSpec
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


class Backend:
    """Executes decode steps as PyTorch operators. Compiled backends override the methods they have faster code for.

    Args:
        state: the slots; its tensors are modified in place.
        why: the reason why no compiled backend executes this state; empty if none exists for its device.
    """

    length_on_device = False
    """Whether the length of a growing cache is read from a device tensor, so that a CUDA graph can replay a step."""

    def __init__(self, state: DecodeState, why: str = "") -> None:
        self.state, self.why = state, why
        rows, width, store = state.store.rows, state.position.shape[-1], state.store
        lines = rows * (state.group + 1) * width if self.needs_buffers else 0
        self._logits = torch.zeros(lines, dtype=store.dtype, device=store.device)
        self._weights = torch.zeros(lines, dtype=torch.float32, device=store.device)

    @property
    def variants(self) -> Hashable:
        """What selects the code of a step: if it is equal for two states on a device, then the steps of one need no
        kernel that those of the other have not loaded. PyTorch chooses its kernels by sizes."""
        state, store = self.state, self.state.store
        return store.rows, state.heads, state.group, store.widths, store.dtype, tuple(store.capacities)

    def probe(self) -> str:
        """Loads every kernel that a step launches, as far as that is possible without running it. Returns why one of
        them can't be used; empty if all can."""
        return ""

    @property
    def needs_buffers(self) -> bool:
        """Whether attention runs as PyTorch operators."""
        return True

    @property
    def path(self) -> str:
        """What executes a step, as text for the ``decode path`` field of a result."""
        return "PyTorch operators" + (f": {self.why}" if self.why else "")

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """As ``DecodeState.write``."""
        state = self.state
        state.store.write(layer, state.target[layer], keys, values)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """As ``DecodeState.attend``."""
        state = self.state
        rows, group = state.store.rows, state.group
        keys = state.store.keys(layer)
        if state.grows:
            keys = keys[:, : state.prompts[layer] + state.added + 1]
        width = keys.shape[1]
        with span("decode attention"):
            bias = None if state.bias is None else state.bias[layer, :, None, :width].to(keys.dtype)
            if state.merge is None:
                logits = self._logits[: rows * group * width].view(rows, group, width)
                queries = query.reshape(rows, group, -1)
                given, beta = (logits, 0) if bias is None else (bias, 1)
                torch.baddbmm(given, queries, keys.transpose(1, 2), beta=beta, alpha=scale, out=logits)
            else:
                logits = state.merge.logits(layer, query.contiguous(), scale, keys, bias, self._logits)
            weights = self._weights[: logits.numel()].view(logits.shape)
            torch.softmax(logits, -1, dtype=torch.float32, out=weights)
            weights = weights[:, :group]
            if state.tracks:
                torch.sum(weights, 1, out=state.attention[layer, :, :width])
            values = state.store.values(layer)[:, :width]
            mixed = torch.bmm(weights.to(values.dtype), values)
        return mixed.view(query.shape[0], 1, query.shape[1], -1)

    def update(self) -> None:
        """Everything between two steps of a bounded cache: commits the pending merge, updates the rule's statistics
        with the step's attention, chooses what to evict, merges or stages it, and reserves a slot for the next
        token."""
        state, interval = self.state, self.state.policy.interval
        # 1. finish the merge that the last step staged
        if state.merge is not None:
            with span("merge"):
                state.merge.commit()
        # 2. update the scores; every ``interval`` steps, choose the victims and merge or stage their entries
        with span("scores"):
            if state.tracks:
                state.attention /= state.group
            rules.observe(state, state.rule)
        place = state.steps % interval
        if place == 0:
            with span("evict"):
                chosen = rules.victims(state, state.rule)
            self._absorb(chosen)
            state.free_slots(chosen)
        # 3. reserve the slot of the next token
        state.slot = state.free[..., place]
        state.reserve()

    def tensors(self) -> list[Tensor]:
        """The work buffers."""
        return [self._logits, self._weights]

    def _absorb(self, chosen: Tensor) -> None:
        """Merges or stages the entries in the slots ``chosen`` ``[layers, rows, interval]``, or drops them if the
        policy merges nothing."""
        state = self.state
        spec = state.merge_spec
        if state.merge is not None:
            state.merge.stage(chosen[..., 0])
        elif isinstance(spec, MassSpec):
            mass.merge_together(state, chosen)
        elif isinstance(spec, MergeSpec):
            merge_together(state, spec, chosen)
        elif isinstance(spec, SpreadSpec):
            spread(state, spec, chosen)
        elif isinstance(state.rule, Custom):
            state.policy.absorb_step(state, chosen)


def spread(state: DecodeState, spec: SpreadSpec, chosen: Tensor) -> None:
    """CaM's merge: with a certain probability, divides an evicted value among the values in the next slots of the
    ring."""
    assert isinstance(state.rule, Ring)
    store, first = state.store, state.rule.first[..., None]
    ring = state.usable[..., None] - first
    # 1. draw: the probability is the evicted token's attention ÷ the mean attention of the younger tokens
    born = state.position.gather(2, chosen)
    younger = state.position > born
    mean = (state.attention * younger).sum(-1, keepdim=True) / younger.sum(-1, keepdim=True)
    chance = (state.attention.gather(2, chosen) / mean).nan_to_num(0.0)
    share = (drawn(state.stream, born) < chance) & (born >= 0)
    # 2. choose the next slots; where the ring is shorter, use the evicted token's own slot, which will be overwritten
    step = torch.arange(1, min(spec.parts, state.position.shape[-1]) + 1, device=born.device)
    slots = torch.where(step < ring, first + (chosen - first + step) % ring, chosen)
    index, leaving = store.base[..., None] + slots, store.base[..., None] + chosen
    added = share[..., None].float() / spec.parts * store.read_values(leaving).float()
    store.write_values(index, (store.read_values(index).float() + added).to(store.dtype))
    state.merged += share.sum((1, 2))
