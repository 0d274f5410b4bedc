"""What is done to the sequences of a cache as a whole: selecting and copying them, cropping, saving and restoring.

transformers' ``generate`` selects for beam search and parallel samples, and crops for speculative decoding; sessions
save and restore. Nothing here computes attention or evicts.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from d2obench.attention.interface import AttendingCache
from d2obench.cache.devices import SplitState
from d2obench.cache.layer import PolicyLayer
from d2obench.cpu.memory import LayerBuffers
from d2obench.decode.state import DecodeState
from d2obench.errors import PolicyError

if TYPE_CHECKING:
    from d2obench.cache.compress import Layout
    from d2obench.policies.base import Policy

LIVING = ("seen", "lengths", "state", "budgets", "first", "kept", "ready", "merged_prompt", "evicted_prompt",
          "prompt_kv_bytes", "packing", "layout", "tokens")  # fmt: skip
"""Attributes of a cache that a snapshot saves, besides its layers and slots."""


class SequenceCache(AttendingCache):
    """A cache of sequences that can be selected, copied, cropped and restored. Attributes as in
    :class:`d2obench.cache.policy_cache.PolicyCache`, which is derived from it."""

    policy: Policy
    own: list[PolicyLayer]
    state: DecodeState | SplitState | None
    lengths: Tensor | None
    budgets: Tensor | None
    kept: Tensor | None
    first: tuple[Tensor, list[int]] | None
    layout: Layout
    tokens: list[Tensor]
    whole_lengths: Tensor | None
    seen: int
    ready: bool
    keeps_all: bool
    _buffers: LayerBuffers

    @abstractmethod
    def reset(self) -> None:
        """Discards all contents; the next forward pass begins a new prompt."""

    def free(self) -> None:
        """Frees the slots at once; the cache can't be used any more. A decode state and its backend refer to each
        other, so they would else stay in memory until the next garbage collection."""
        state, self.state = self.state, None
        for part in state.parts if isinstance(state, SplitState) else [state]:
            if part is not None:
                vars(part).clear()

    @abstractmethod
    def _reopen(self) -> None:
        """Turns slots back into entries."""

    def snapshot(self, decode_only: bool = False) -> Any:
        """A copy of everything that decoding changes.

        Entries of a layer are never written in place, so references to them are enough; slots are copied, unless
        ``decode_only`` allows to leave them (see :meth:`DecodeState.snapshot`).
        """
        # the cache's own fields, those of its layers, then the slots and what is known of them
        own = {name: getattr(self, name) for name in LIVING}
        return own, [dict(vars(layer)) for layer in self.layers], self.state and self.state.snapshot(decode_only)

    def restore(self, saved: Any) -> None:
        """Brings back a :meth:`snapshot`. Slots are written in place, so that a captured graph still fits them."""
        for name, old in saved[0].items():
            setattr(self, name, old)
        for layer, fields in zip(self.layers, saved[1], strict=True):
            layer.__dict__.update(fields)
        if self.state is not None:
            self.state.restore(saved[2])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replaces the sequences by a selection of them.

        Args:
            indices: int64 ``[B']``, the sequence that each new one continues, or a bool mask ``[B]``.
        """
        if not self.seen:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        chosen = indices.detach().cpu().long()
        for layer in self.layers:
            if not isinstance(layer, PolicyLayer):
                layer.batch_select_indices(indices.to(layer.keys.device))
            elif not self.ready:
                layer.select(chosen)
            elif layer.moments is not None:  # a later turn goes on with them
                layer.moments = layer.moments.select(chosen.to(layer.moments.count.device))
        assert self.lengths is not None
        self.lengths = self.lengths[chosen.to(self.lengths.device)]
        self.layout = replace(self.layout, batch=chosen.numel())
        self.tokens = [block[chosen.to(block.device)] for block in self.tokens]
        self.whole_lengths = None if self.whole_lengths is None else self.whole_lengths[chosen]
        self.budgets, self.kept = (held if held is None else held[:, chosen] for held in (self.budgets, self.kept))
        if self.first is not None:
            self.first = self.first[0][:, chosen], [self.first[1][i] for i in chosen.tolist()]
        if self.state is not None:
            self.state = self.state.select(chosen)

    def fork(self, sequences: Tensor) -> Self:
        """An independent cache of the same model for a selection of the sequences, int64 ``[B']``; this one stays as it
        is."""
        found = self._without_state({})
        found.batch_select_indices(sequences)
        found.state = None if self.state is None else self.state.select(sequences.detach().cpu().long())
        return found

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replaces every sequence by ``repeats`` adjacent copies of it."""
        self.batch_select_indices(torch.arange(self.layout.batch).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences of a beam search after a step; the same as :meth:`batch_select_indices`."""
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens, as speculative decoding requires.

        Args:
            tokens_to_remove: the negative number of tokens to remove, or 0 (as in transformers from 5.24 on); or the
                positive number of tokens to keep.

        Raises:
            PolicyError: see :meth:`_check_croppable`.
        """
        tokens = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if tokens <= 0:
            for layer in self.layers:
                if getattr(layer, "record_past", False):  # a sliding layer that keeps more than its window until now
                    layer.crop(0)
            return
        self._check_croppable()
        if tokens >= self.seen:
            self.reset()
            return
        for layer in self.layers:
            if not isinstance(layer, PolicyLayer):
                layer.crop(-tokens)
        if self.state is not None and tokens <= self.state.added:
            self.state.retract(tokens)
        else:
            if self.ready:
                self._reopen()
            assert self.lengths is not None
            self.lengths = (self.lengths - tokens).clamp_min(0)
            for layer in self.own:
                layer.crop(tokens)
        self.seen -= tokens

    def activate_past_recording(self) -> None:
        """Prepares for :meth:`crop`. transformers calls this before the first forward pass of assisted decoding.

        Raises:
            PolicyError: see :meth:`_check_croppable`.
        """
        self._check_croppable()
        super().activate_past_recording()

    def _check_croppable(self) -> None:
        """Raises a PolicyError if :meth:`crop` can't restore an earlier state."""
        if not self.is_croppable:
            raise PolicyError(
                f"a cache of the policy '{self.policy.name}' can't be cropped",
                why="what was evicted, merged, scored or quantised with the newest tokens can't be undone",
                remedy="use the policy full, or decode without an assistant",
            )

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can restore the earlier state exactly: only if everything is kept unchanged."""
        return self.keeps_all and self.policy.bits in (None, 16)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An independent copy for the same model, for a prefix that several texts share."""
        found = self._without_state(memo)
        found.state = None if self.state is None else self.state.select(torch.arange(self.layout.batch))
        return found

    def _without_state(self, memo: dict[int, Any]) -> Self:
        """A copy of everything but the slots and what is known of them."""
        found = object.__new__(type(self))
        memo[id(self)] = found
        made_anew = {"layers", "own", "state", "_buffers"}
        shared = {"policy", "budget", "mark", "rotary", "shard", "runs", "wrap", "first", "layout"}
        shared |= {"_module", "_configs"}  # the model's own
        for name, held in self.__dict__.items():
            if name not in made_anew:
                setattr(found, name, held if name in shared else copy.deepcopy(held, memo))
        found.layers = [self._copied(layer, found, memo) for layer in self.layers]
        found.own = [layer for layer in found.layers if isinstance(layer, PolicyLayer)]
        found.state = None
        found._buffers = LayerBuffers(len(found.own))
        return found

    @staticmethod
    def _copied(layer: Any, cache: Any, memo: dict[int, Any]) -> Any:
        if not isinstance(layer, PolicyLayer):
            return copy.deepcopy(layer, memo)
        found = PolicyLayer(cache, layer.index)
        held = {name: copy.deepcopy(value, memo) for name, value in layer.__dict__.items() if name != "_cache"}
        found.__dict__.update(held)
        return found
