"""The fused decode path of one state: buffers, launches, and how a row is split.

Splits: as many as it takes to give every multiprocessor a program and a half, each of one block at least. A block is
what 16 KiB of keys hold: three in flight fit the shared memory of every GPU from Ampere on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench.decode.rules import rule_of
from d2obench.decode.triton import attend as attention_kernels
from d2obench.decode.triton import merge
from d2obench.decode.triton import update as turn
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

BLOCK_BYTES = 16384
CHUNK = 512
"""Slots of the row of attention that one program puts together."""
MOST_SPLITS = 64


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **meta: Any) -> None:
    """Every launch of the path goes through here."""
    kernel[grid](*given, **meta)


class FusedDecode:
    """Decode steps of a state by Triton kernels.

    Args:
        state: its tensors are worked on in place, as its own methods would.
        processors: multiprocessors of the device.
        interpreted: whether Triton's interpreter runs the kernels.
        splits: splits of every row; chosen by :meth:`splits_of` if not given.
    """

    def __init__(self, state: DecodeState, processors: int, interpreted: bool, splits: int | None = None) -> None:
        self.state, self.processors, self.interpreted = state, processors, interpreted
        store, carry = state.store, state.pending_merge
        self.rows, self.device, (key_width, value_width) = store.rows, store.device, store.widths
        wide = store.dtype == torch.float32
        padded = max(16, _power(key_width))
        self.block = min(128, max(16, BLOCK_BYTES // (padded * store.key_rows.element_size())))
        self.common = {
            "G": state.group,
            "DV": value_width,
            "DVP": max(16, _power(value_width)),
            "WATCHED": state.tracks,
        }
        self.shape = {
            "D": key_width,
            "DP": padded,
            "M": max(16, _power(state.group + (carry is not None))),
            "BLOCK": self.block,
            "WIDE": wide or interpreted,
        }
        self.biased = state.bias is not None
        self.splits = [splits or self.splits_of(capacity) for capacity in store.capacities]
        most = max(self.splits)
        floats: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self.part = torch.empty(self.rows * most * state.group * value_width if most > 1 else 1, **floats)
        self.high, self.total = (torch.empty(self.rows * most * state.group, **floats) for _ in range(2))
        self.stride = state.position.shape[-1]
        self.logits = torch.empty(self.rows * state.group * self.stride if state.tracks or carry else 1, **floats)
        self.best = torch.empty(self.rows * most, **floats)
        self.place = torch.empty(self.rows * most, dtype=torch.long, device=self.device)
        self.capacities = torch.tensor(store.capacities, device=self.device)
        self.rule = rule_of(state)
        self._new: tuple[Tensor, Tensor] | None = None
        self._dry = False

    def splits_of(self, capacity: int) -> int:
        """Splits of a row of ``capacity`` slots."""
        wanted = -(-3 * self.processors // (2 * self.rows))
        return max(1, min(wanted, capacity // self.block, MOST_SPLITS))

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Takes the new token's key and value ``[B, H, 1, d]``; attention, which follows, writes them."""
        self._new = _dense(keys), _dense(values)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """As ``DecodeState.attend``."""
        state, store = self.state, self.state.store
        assert self._new is not None
        new_key, new_value = self._new
        query = _dense(query)
        batch, heads = query.shape[:2]
        out = torch.empty(batch, 1, heads, store.widths[1], dtype=store.dtype, device=self.device)
        splits, slots = self.splits[layer], store.capacities[layer]
        bias = self.part if state.bias is None else state.bias[layer]
        attention = state.attention[layer] if state.tracks else self.part
        keys, values = store.keys(layer), store.values(layer)
        target, base = state.target[layer], store.base[layer]
        sums = out, self.part, self.high, self.total, self.logits, attention
        sizes = state.heads, slots, self.stride, splits, *query.stride()[:2]
        grid, single = (self.rows, splits), splits == 1
        with span("decode attention"):
            if state.pending_merge is None:
                self._run(
                    attention_kernels.attend, grid, *sums, query, new_key, new_value, keys, values, bias, target, base,
                    scale, *sizes, *new_key.stride()[:2], *new_value.stride()[:2], **self.common, **self.shape,
                    SINGLE=single, GROWS=state.grows, HAS_BIAS=self.biased, num_stages=2,
                )  # fmt: skip
            else:
                carry = state.pending_merge
                self._run(
                    merge.weigh, grid, self.logits, self.best, self.place, query, carry.queries[layer], new_key, keys,
                    bias, carry.inverse_norm[layer], carry.host_bias[layer], target, base, scale, *sizes,
                    *new_key.stride()[:2], G=state.group, **self.shape, HAS_BIAS=self.biased, num_stages=3,
                )  # fmt: skip
                self._run(
                    merge.mix, grid, *sums, self.best, self.place, carry.bar[layer], carry.similarity[layer],
                    carry.weight[layer], carry.host[layer], query, carry.key[layer], carry.value[layer], new_value,
                    values, target, base, scale, *sizes, *new_value.stride()[:2], **self.common, **self.shape,
                    SINGLE=single, SP=_power(splits), KEYS=carry.spec.keys, num_stages=3,
                )  # fmt: skip
            if not single:
                chunks = -(-slots // CHUNK) if state.tracks else 1
                self._run(
                    attention_kernels.join, (self.rows, chunks), *sums, slots, self.stride, splits, **self.common,
                    SP=_power(splits), CHUNK=CHUNK,
                )  # fmt: skip
        return out

    def turn(self) -> bool:
        """Does the rest of ``DecodeState.advance`` for a bounded cache, after its counters; False where the policy's
        rule has no kernel."""
        if self.rule is None:
            return False
        state, store, extra, none = self.state, self.state.store, self.state.extra, self.total
        scored, carry = self.rule == "lowest", state.pending_merge
        bias = none if state.bias is None else state.bias
        window = (extra["recent"], none, none) if scored else (none, extra["first"], extra["last"])
        scores = (state.score, state.attention) if scored else (none, none)
        carried: tuple[Any, ...] = (none,) * 15
        plan = None if carry is None else carry.spec
        if carry is not None:
            carried = (
                store.key_rows, store.value_rows, carry.queries, carry.key, carry.value, carry.pending, carry.score,
                carry.similarity, carry.host, carry.weight, carry.inverse_norm, carry.host_bias, carry.bar,
                extra["tau"], extra["merged"],
            )  # fmt: skip
        with span("evict"):
            self._run(
                turn.turn, (self.rows, len(store.capacities)), state.position, state.now, state.free, state.target,
                store.base, state.evicted, bias, self.capacities, *scores, *window, *carried,
                plan.beta if plan else 0.0, self.rows, self.stride,
                G=state.group, D=store.widths[0], DV=store.widths[1], DP=self.shape["DP"], DVP=self.common["DVP"],
                BLOCK=max(16, min(1024, _power(self.stride))), SCORED=scored, HAS_BIAS=self.biased,
                CARRIES=plan is not None, KEYS=bool(plan and plan.keys), INHERIT=bool(plan and plan.inherit),
                SMOOTH=bool(plan and plan.beta < 1),
            )  # fmt: skip
        return True

    def probe(self) -> None:
        """Compiles and loads every kernel of the path by launches of no program; raises what goes wrong."""
        state, (key_width, value_width) = self.state, self.state.store.widths
        batch = self.rows // state.heads
        kind: dict[str, Any] = {"dtype": state.store.dtype, "device": self.device}
        query = torch.zeros(batch, state.heads * state.group, 1, key_width, **kind)
        self._dry = True
        try:
            for layer in {self.splits.index(splits) for splits in self.splits}:
                self.write(query[:, : state.heads], torch.zeros(batch, state.heads, 1, value_width, **kind))
                self.attend(layer, query, 1.0)
            if not state.grows:
                self.turn()
        finally:
            self._dry, self._new = False, None

    def tensors(self) -> list[Tensor]:
        """The work buffers."""
        return [self.part, self.high, self.total, self.logits, self.best, self.place, self.capacities]

    def _run(self, kernel: Any, grid: tuple[int, int], *given: Any, **meta: Any) -> None:
        grid = (0, grid[1]) if self._dry else grid
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                launch(kernel, grid, *given, **meta)
        else:
            launch(kernel, grid, *given, **meta)


def _dense(tensor: Tensor) -> Tensor:
    """With channels next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _power(size: int) -> int:
    """The least power of two that holds ``size``."""
    return 1 << (size - 1).bit_length()
