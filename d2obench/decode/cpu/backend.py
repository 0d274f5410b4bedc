"""The decode path of a CPU: compiled loops on PyTorch's own threads, one a layer and one between steps.

Design. The new token's key and value are written, the queries of a KV head multiplied with its keys, D2O's pending
evictee merged on the way (``d2obench.decode.pending_merge``), softmax taken, scores noted and values mixed, row by
row: a row's
logits never leave the core's cache, and keys and values are read once, at the speed of memory
(``d2obench.cpu.language``). As operators the same are a dozen launches and as many tensors of the cache's length.
The PyTorch path of ``DecodeState`` gives the same results to rounding; it is the reference, and serves everything else:
other dtypes and devices, quantised slots, a threshold per layer, and a machine without the team.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench import cpu
from d2obench.compiler import interpreted
from d2obench.decode.cpu import native
from d2obench.decode.rules import rule_of
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


def serves(state: DecodeState) -> bool:
    """Whether the loop can attend for a state."""
    store, carry = state.store, state.pending_merge
    whole = store.widths[0] % 8 == 0 and store.widths[1] % 16 == 0
    return native.serves(store) and whole and not interpreted() and (carry is None or not carry.spec.per_layer)


class HostDecode:
    """Attention of a state by the compiled loop; its tensors are worked on in place, as its own methods would.

    Args:
        state: a state that :func:`serves` says yes to.
    """

    def __init__(self, state: DecodeState) -> None:
        from d2obench.decode.cpu import attend as host_loops
        from d2obench.decode.cpu import update as host_turn

        self.state, self._loop, self._turn = state, host_loops.attend, host_turn.turn
        rows, group, width = state.store.rows, state.group, state.position.shape[-1]
        self.share = (group + 2 if state.pending_merge is not None else group + 1) * max(width, group)
        self.room = torch.empty(rows * self.share)
        self._new: tuple[Tensor, Tensor] | None = None
        self._words = [self._layer(layer) for layer in range(len(state.store.capacities))]
        self._capacities = torch.tensor(state.store.capacities)
        self._all = self._between() if rule_of(state) == "lowest" else None

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Takes the new token's key and value ``[B, H, 1, d]``; attention, which follows, writes them."""
        self._new = keys.contiguous(), values.contiguous()

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """As ``DecodeState.attend``."""
        state, words = self.state, self._words[layer]
        assert self._new is not None
        key, value = self._new
        query = query.contiguous()
        out = torch.empty(query.shape[0], 1, query.shape[1], state.store.widths[1])
        words[2], words[3], words[4], words[5] = query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()
        words[15] = cpu.bits(scale)
        if state.grows:
            words[9] = state.prompts[layer] + state.added + 1
        with span("decode attention"):
            cpu.launch(self._loop, words)
        return out

    def turn(self) -> bool:
        """Does the rest of ``DecodeState.advance`` for a bounded cache, after its counters; False where the policy's
        rule has no loop."""
        if self._all is None:
            return False
        with span("evict"):
            cpu.launch(self._turn, self._all)
        return True

    def tensors(self) -> list[Tensor]:
        """The work buffers."""
        return [self.room, self._capacities]

    def _layer(self, layer: int) -> cpu.Arguments:
        """What doesn't change from step to step: none of these tensors is replaced while the state decodes."""
        state, store, carry = self.state, self.state.store, self.state.pending_merge
        capacity = store.capacities[layer]
        carried: tuple[Any, ...] = (0,) * 10
        if carry is not None:
            held = (
                carry.queries, carry.key, carry.value, carry.inverse_norm, carry.host_bias, carry.bar,
                carry.similarity, carry.weight, carry.host,
            )  # fmt: skip
            carried = *(tensor[layer].data_ptr() for tensor in held), int(carry.spec.keys)
        return cpu.Arguments(
            0, store.rows, 0, 0, 0, 0,
            store.keys(layer).data_ptr(), store.values(layer).data_ptr(), capacity, capacity,
            state.target[layer].data_ptr(), store.base[layer].data_ptr(), state.group, *store.widths, 0,
            0 if state.bias is None else state.bias[layer].data_ptr(),
            state.attention[layer].data_ptr() if state.tracks else 0,
            state.position.shape[-1], self.room.data_ptr(), self.share, *carried,
        )  # fmt: skip

    def _between(self) -> cpu.Arguments:
        """What the loop between two steps works on, all layers."""
        state, store, carry, extra = self.state, self.state.store, self.state.pending_merge, self.state.extra
        layers, rows, width = state.position.shape
        carried: tuple[Any, ...] = (0,) * 20
        if carry is not None:
            held = (
                carry.queries, carry.key, carry.value, carry.similarity, carry.weight, carry.host, carry.pending,
                extra["tau"], extra["merged"], carry.score, carry.inverse_norm, carry.host_bias, carry.bar,
            )  # fmt: skip
            plan = carry.spec
            carried = (
                store.key_rows.data_ptr(), store.value_rows.data_ptr(), *store.widths,
                *(tensor.data_ptr() for tensor in held), cpu.bits(plan.beta), int(plan.keys), int(plan.inherit),
            )  # fmt: skip
        tensors = (
            self._capacities, store.base, state.free, state.target, state.now, state.position, state.evicted,
        )  # fmt: skip
        scored = (state.score, state.attention, extra["recent"])
        assert all(tensor.is_contiguous() for tensor in (*tensors, *scored))
        return cpu.Arguments(
            0, layers, rows, width, *(tensor.data_ptr() for tensor in tensors),
            0 if state.bias is None else state.bias.data_ptr(), *(tensor.data_ptr() for tensor in scored),
            state.group, *carried,
        )  # fmt: skip
