"""The decode state: what is in every slot, what a step overwrites next, and attention over slots.

One step, for every compressed layer: the new key and value go to the slot that the last step freed, attention runs
over the layer's slots, and the row of attention (mean over the query heads of a KV head) is left in ``attention``.
After the last layer :meth:`DecodeState.advance` lets the policy choose, for all layers at once, the slot that the next
token takes. A slot chosen so is an eviction. There is no concatenation, no reallocation and no host synchronisation.

Policies that merge what they evict use ``carry`` (see ``d2obench.decode.pending_merge``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench.decode import triton as kernels
from d2obench.decode.cpu import backend as host
from d2obench.decode.cpu import native
from d2obench.ranges import span
from d2obench.slots.dense import CLOSED, EMPTY, NEVER, DenseStore

if TYPE_CHECKING:
    from d2obench.policies.base import Policy

PROTECTED = 3e38
"""Score shown for a token of the recent window: evicted only when nothing but sinks is left."""


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
    ) -> None:
        self.store, self.position, self.now, self.policy = store, position, now, policy
        self.heads, self.group, self.grows, self.seed = heads, group, grows, seed
        self.prompts, self.added, self.rotary = list(prompts), 0, rotary
        self.first_layer = self.first_head = 0
        layers, rows, width = position.shape
        device = position.device
        self.tracks = policy.needs_attention and not grows
        floats = (layers, rows, width) if self.tracks else (0,)
        self.attention = torch.zeros(floats, device=device)
        self.score = torch.zeros(floats, device=device)
        self.usable = (position != CLOSED).sum(-1)
        """Slots of each row that are not CLOSED, ``[layers, rows]``."""
        self.bias: Tensor | None = None
        self.slot = torch.zeros(layers, rows, dtype=torch.long, device=device)
        self.free = torch.zeros(layers, rows, policy.interval, dtype=torch.long, device=device)
        self.target = store.base.clone()
        self.steps = 0
        self.evicted = torch.zeros(layers, dtype=torch.long, device=device)
        self.extra: dict[str, Tensor] = {}
        self.pending_merge: Any = None
        self.path: Any = None
        """The fused decode path, if one serves this state: ``d2obench.decode.cpu.backend`` or ``.kernels``."""
        self.fallback = ""
        """Why not, where one could have been expected."""
        self._loops = native.loops() if native.serves(store) and not grows and policy.interval == 1 else None
        self._work(width)

    def start(self) -> None:
        """Called once the kept entries and their scores are in place: masks what is empty, frees the first slots."""
        unused = self.position < 0
        if self.tracks:
            self.score.masked_fill_(unused, -NEVER).masked_fill_(self.position == CLOSED, NEVER)
        held, spare = (self.position >= 0).sum(-1), self.policy.interval
        full = self.prompts if self.grows else [capacity - spare for capacity in self.store.capacities]
        whole = bool((held == torch.tensor(full, device=held.device)[:, None]).all())
        slots = torch.arange(self.position.shape[-1], device=held.device)
        if self.grows:
            unused &= slots < torch.tensor(self.prompts, device=held.device)[:, None, None]
        if not whole or (spare > 1 and not self.grows):
            kind = self.store.dtype
            self.bias = torch.zeros(self.position.shape, dtype=kind, device=held.device).masked_fill_(
                unused, -torch.inf
            )
        if self.grows:
            self._append()
        else:
            width = self.position.shape[-1]
            order = slots.expand_as(self.position)
            empty = torch.where(self.position == EMPTY, order, width)
            self._free(empty.topk(spare, -1, largest=False, sorted=True).indices)
            if self.pending_merge is not None:
                self.pending_merge.take(self.slot)
            self._place()
        self._choose()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Puts the new token's key and value ``[B, H, 1, d]`` into the layer's freed slots."""
        if self.path is not None:
            self.path.write(keys, values)
            return
        self.store.write(layer, self.target[layer], keys, values)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of one new query over the layer's slots.

        Args:
            layer: index among the compressed layers.
            query: ``[B, Hq, 1, d]``.
            scale: factor of the logits.

        Returns:
            ``[B, 1, Hq, d_v]``.
        """
        if self.path is not None:
            out: Tensor = self.path.attend(layer, query, scale)
            return out
        rows, group = self.store.rows, self.group
        keys = self.store.keys(layer)
        if self.grows:
            keys = keys[:, : self.prompts[layer] + self.added + 1]
        width = keys.shape[1]
        with span("decode attention"):
            bias = None if self.bias is None else self.bias[layer, :, None, :width]
            if self.pending_merge is None:
                logits = self._logits[: rows * group * width].view(rows, group, width)
                queries = query.view(rows, group, -1)
                given, beta = (logits, 0) if bias is None else (bias, 1)
                torch.baddbmm(given, queries, keys.transpose(1, 2), beta=beta, alpha=scale, out=logits)
            else:
                logits = self.pending_merge.logits(layer, query, scale, keys, bias, self._logits)
            weights = self._weights[: logits.numel()].view(logits.shape)
            torch.softmax(logits, -1, dtype=torch.float32, out=weights)
            weights = weights[:, :group]
            if self.tracks:
                torch.sum(weights, 1, out=self.attention[layer, :, :width])
            values = self.store.values(layer)[:, :width]
            mixed = torch.bmm(weights.to(values.dtype), values)
        return mixed.view(query.shape[0], 1, query.shape[1], -1)

    def advance(self) -> None:
        """Ends a step: the policy sees its attention and frees the slot of the next token."""
        self.count()
        self.now += 1
        if self.grows:
            self.target += 1
            return
        if self.path is not None and self.path.turn():
            return
        if self.pending_merge is not None:
            with span("merge"):
                self.pending_merge.settle()
        with span("scores"):
            if self.tracks:
                self.attention /= self.group
            self.policy.observe(self)
        turn = self.steps % self.policy.interval
        if turn == 0:
            with span("evict"):
                victims = self.policy.victims(self)
            if self.pending_merge is not None:
                self.pending_merge.take(victims[..., 0])
            else:
                self.policy.absorb_step(self, victims)
            self._free(victims)
        self.slot = self.free[..., turn]
        self._place()

    def count(self) -> None:
        """Counts a step on the host: all of a step that replaying a graph of it leaves out."""
        self.steps += 1
        self.added += self.grows

    def least(self, score: Tensor, recent: Tensor | int) -> Tensor:
        """Slots of the ``interval`` lowest scores outside the last ``recent`` tokens, ``[layers, rows, interval]``.

        EMPTY slots come first, sinks and CLOSED ones (score NEVER) last; ties go to the lowest slot.
        """
        if self._loops is not None:
            window = self._window(recent)
            slot = torch.empty_like(self.slot)
            tensors = (score.contiguous(), self.position, self.now, window, self._shown, slot)
            self._loops.least(*native.arrays(*tensors))
            return slot[..., None]
        limit = (self.now[None, :, None] - recent).clamp_min(EMPTY)
        shown = torch.where(self.position > limit, PROTECTED, score)
        if self.policy.interval == 1:
            return shown.min(-1, keepdim=True).indices
        return shown.topk(self.policy.interval, -1, largest=False, sorted=True).indices

    def _window(self, recent: Tensor | int) -> Tensor:
        kind = self.position.dtype
        if isinstance(recent, int):
            return torch.full(self.slot.shape, recent, dtype=kind)
        return recent[..., 0].to(kind).expand(self.slot.shape).contiguous()

    def oldest(self, start: Tensor | int) -> Tensor:
        """Slots of the ``interval`` oldest tokens from position ``start`` on, ``[layers, rows, interval]``; EMPTY ones
        come first."""
        kept = (self.position == CLOSED) | ((self.position >= 0) & (self.position < start))
        return self.least(self.position.float().masked_fill_(kept, NEVER), 0)

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

    def places(self) -> tuple[Tensor, Tensor]:
        """The model's index of each layer, ``[layers, 1, 1]``, and of each row's KV head, ``[rows, 1]``."""
        layers, rows = self.slot.shape
        layer = self.first_layer + torch.arange(layers, device=self.slot.device)[:, None, None]
        return layer, self.first_head + (torch.arange(rows, device=self.slot.device) % self.heads)[:, None]

    def tensors(self) -> list[Tensor]:
        """Every tensor beside keys and values, for snapshots and for counting bytes."""
        fused = [] if self.path is None else self.path.tensors()
        return [*self._living(), *self.store.work(), self._logits, self._weights, *fused]

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
        self._work(width + tokens)
        self._append()
        self._choose()

    def held(self) -> Tensor:
        """Entries held per layer and row, ``[layers, rows]``; the slot freed for the next token doesn't count."""
        return (self.position >= 0).sum(-1) + (self.added if self.grows else -1)

    def _living(self) -> list[Tensor]:
        own = [self.position, self.now, self.attention, self.score, self.free, self.target, self.evicted]
        own += [*self.extra.values(), *([] if self.bias is None else [self.bias])]
        return own + ([] if self.pending_merge is None else self.pending_merge.tensors())

    def _work(self, width: int) -> None:
        rows, device = self.store.rows, self.store.device
        self._logits = torch.empty(rows * (self.group + 1) * width, dtype=self.store.dtype, device=device)
        self._weights = torch.empty(rows * (self.group + 1) * width, dtype=torch.float32, device=device)
        self._shown, self._none = torch.empty(width if self._loops else 0), torch.empty(0, 0, 0)

    def _choose(self) -> None:
        """Takes a fused path where one serves; the buffers of the other one then go."""
        chosen = host.HostDecode(self) if host.serves(self) else kernels.fused(self)
        self.path, self.fallback = (None, chosen) if isinstance(chosen, str) else (chosen, "")
        if self.path is not None:
            self._logits, self._weights = self._logits[:0].clone(), self._weights[:0].clone()

    def _append(self) -> None:
        prompts = torch.tensor(self.prompts, device=self.now.device)[:, None]
        self.target.copy_(self.store.base + prompts + self.added)

    def _free(self, slots: Tensor) -> None:
        """Evicts ``[layers, rows, interval]``; what is not overwritten before the next attention is hidden from it."""
        self.free.copy_(slots)
        self.slot = self.free[..., 0]
        if self._loops is not None:
            return
        self.evicted += (self.position.gather(2, slots) >= 0).sum((1, 2))
        if self.policy.interval > 1 and self.bias is not None:
            self.position.scatter_(2, slots, EMPTY)
            self.bias.scatter_(2, slots, -torch.inf)
            if self.tracks:
                self.score.scatter_(2, slots, -NEVER)

    def _place(self) -> None:
        """Books the freed slot for the token to come."""
        if self._loops is not None:
            score, bias = self.score if self.tracks else self._none, self._none if self.bias is None else self.bias
            tensors = (self.slot, self.store.base, self.target, self.position, self.now, self.evicted, score, bias)
            self._loops.place(*native.arrays(*tensors))
            return
        at = self.slot[..., None]
        self.position.scatter_(2, at, (self.now + 1)[None, :, None].expand(*self.slot.shape, 1))
        torch.add(self.store.base, self.slot, out=self.target)
        if self.tracks:
            self.score.scatter_(2, at, 0.0)
        if self.bias is not None:
            self.bias.scatter_(2, at, 0.0)


def capacities(budgets: Tensor, spare: int) -> Sequence[int]:
    """Slots per layer for budgets ``[layers, B]``: the largest of the batch and what comes before it is evicted."""
    return [int(most) + spare for most in budgets.amax(1).tolist()]


__all__ = ["CLOSED", "EMPTY", "NEVER", "DecodeState", "capacities"]
