"""Decode steps on a CPU by compiled loops that run on PyTorch's own threads: one loop per layer, and one between steps.

Design. Each row (one KV head of one sequence) is processed from start to end: the new token's key and value are
written, the queries are multiplied with the keys, D2O's staged evictee is merged, the softmax is computed, scores are
recorded and values are summed. A row's logits never leave the core's cache, and keys and values are read once, at
memory bandwidth (``d2obench.cpu.language``). As PyTorch operators the same work takes a dozen launches and a dozen
temporary tensors of the cache's length. PyTorch operators (``d2obench.decode.reference``) give the same results up to
rounding and execute every state that the loops do not support.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench import cpu
from d2obench.decode.mass import PendingMass
from d2obench.decode.merge import PendingMerge
from d2obench.decode.reference import Backend
from d2obench.policies.rules import Custom, SpreadSpec
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


def offer(state: DecodeState) -> Backend | str:
    """The compiled backend for ``state``, or the reason why PyTorch operators must execute it."""
    store = state.store
    if store.quantised:
        return "the cache is quantised"
    if store.dtype != torch.float32:
        return f"there are no compiled loops for {str(store.dtype).removeprefix('torch.')}"
    if not cpu.available():
        return "compiled loops cannot run here (no numba, or PyTorch without OpenMP)"
    why_attention, why_update = _unserved_attention(state), _unserved_update(state)
    if why_attention and why_update:
        return why_attention
    return CompiledLoops(state, why_attention, why_update)


def compile_loops() -> None:
    """Compiles every loop. The first call in an environment takes a while; later ones load numba's cache. A session
    calls this when it is created, before any timing starts."""
    from d2obench.cpu import distance, nearest
    from d2obench.decode.cpu import attend, update

    assert attend.attend and update.update and nearest.nearest and distance.distance


def _unserved_attention(state: DecodeState) -> str:
    """Why the attention loop cannot execute a state; empty if it can."""
    if state.store.widths[0] % 8 or state.store.widths[1] % 16:
        return "head dims are no multiples of 8 (keys) and 16 (values)"
    if isinstance(state.merge, PendingMerge) and state.merge.spec.per_layer:
        return "a threshold per layer needs all its KV heads at once"
    return ""


def _unserved_update(state: DecodeState) -> str:
    """Why the loop between steps cannot execute a state; empty if it can."""
    if state.grows:
        return ""
    if state.policy.interval > 1:
        return "several tokens are evicted together"
    if isinstance(state.rule, Custom):
        return state.rule.why
    from d2obench.decode.cpu.update import RULES

    return "" if type(state.rule) in RULES else f"no compiled loop has the rule {type(state.rule).__name__}"


class CompiledLoops(Backend):
    """Executes decode steps by compiled loops that modify the state's tensors in place.

    Args:
        state: its tensors must not be replaced during decoding, because the loops keep their addresses.
        why_attention: why attention runs as PyTorch operators; empty if the loop runs it.
        why_update: why the work between steps runs as PyTorch operators; empty if the loop runs it.
    """

    def __init__(self, state: DecodeState, why_attention: str, why_update: str) -> None:
        compile_loops()
        self._why_attention, self._why_update = why_attention, why_update
        super().__init__(state)
        self._scratch = torch.zeros(0)
        self._new: tuple[Tensor, Tensor] | None = None
        self._layers = [] if why_attention else self._attention_arguments()
        self._between = None if why_update or state.grows else self._update_arguments()

    @property
    def needs_buffers(self) -> bool:
        return bool(self._why_attention)

    @property
    def path(self) -> str:
        if self._why_attention:
            return f"PyTorch operators, compiled CPU loop between steps: {self._why_attention}"
        if self._why_update:
            return f"compiled CPU loops, PyTorch operators between steps: {self._why_update}"
        return "compiled CPU loops"

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if self._why_attention:
            super().write(layer, keys, values)
        else:  # the attention loop of this layer writes them
            self._new = keys.contiguous(), values.contiguous()

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        if self._why_attention:
            return super().attend(layer, query, scale)
        from d2obench.decode.cpu.attend import attend

        state, arguments = self.state, self._layers[layer]
        assert self._new is not None
        (key, value), query = self._new, query.contiguous()
        out = torch.empty(query.shape[0], 1, query.shape[1], state.store.widths[1])
        arguments.query, arguments.new_key = query.data_ptr(), key.data_ptr()
        arguments.new_value, arguments.out = value.data_ptr(), out.data_ptr()
        arguments.scale = scale
        if state.grows:
            free = state.store.capacities[layer] - state.prompts[layer] - state.added - 1
            arguments.slots = self._slots[layer] - state.store.rows * free
        with span("decode attention"):
            cpu.launch(attend, arguments)
        return out

    def update(self) -> None:
        if self._between is None:
            super().update()
            return
        from d2obench.decode.cpu.update import update

        with span("evict"):
            cpu.launch(update, self._between)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self._scratch]

    def _attention_arguments(self) -> list[Any]:
        """Arguments of the attention loop for each layer, with every field that stays the same from step to step."""
        from d2obench.decode.cpu.attend import AttendArguments
        from d2obench.decode.cpu.merge import BY_MASS, BY_SIMILARITY

        state, store, merge = self.state, self.state.store, self.state.merge
        group, width = state.group, state.position.shape[-1]
        scratch_row = (group + (1 if merge is None else 2)) * max(width, group)
        self._scratch = torch.zeros(store.rows * scratch_row)
        self._slots = (store.ends - store.begins).sum(1).tolist()
        found = []
        for layer, slots in enumerate(self._slots):
            arguments = AttendArguments(
                items=store.rows, slots=slots, grows=state.grows, group=group, width=store.widths[0],
                value_width=store.widths[1], stride=width, scratch_row=scratch_row,
            )  # fmt: skip
            arguments.point(
                keys=store.key_rows, values=store.value_rows, target=state.target[layer], base=store.base[layer],
                begins=store.begins[layer], ends=store.ends[layer],
                bias=None if state.bias is None else state.bias[layer],
                attention=state.attention[layer] if state.tracks else None, scratch=self._scratch,
            )  # fmt: skip
            if merge is not None:
                arguments.point(
                    queries=merge.queries[layer], staged_value=merge.value[layer],
                    inverse_norm=merge.inverse_norm[layer], target_bias=merge.target_bias[layer],
                    similarity=merge.similarity[layer], weight=merge.weight[layer], merge_target=merge.target[layer],
                )  # fmt: skip
            if isinstance(merge, PendingMerge):
                arguments.merging, arguments.merge_keys = BY_SIMILARITY, int(merge.spec.keys)
                arguments.point(staged_key=merge.key[layer], required=merge.required[layer])
            elif isinstance(merge, PendingMass):
                arguments.merging = BY_MASS
                arguments.point(
                    staged_score=merge.score[layer], score=state.score[layer], position=state.position[layer],
                    now=state.now,
                )  # fmt: skip
            found.append(arguments)
        return found

    def _update_arguments(self) -> Any:
        """Arguments of the loop between steps, for all layers."""
        from d2obench.decode.cpu.merge import BY_MASS, BY_SIMILARITY
        from d2obench.decode.cpu.update import RULES, UpdateArguments

        state, store, merge, rule = self.state, self.state.store, self.state.merge, self.state.rule
        layers, rows, width = state.position.shape
        arguments = UpdateArguments(
            items=layers, rule=RULES.index(type(rule)), rows=rows, heads=state.heads, group=state.group, stride=width,
            width=store.widths[0], value_width=store.widths[1],
        )  # fmt: skip
        # a rule's flags, and its numbers per row: the loop reads one for each row, also where one number is for all
        every: dict[str, Any] = {"usable": state.usable, "stream": state.stream[..., 0]}
        every |= {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}  # type: ignore[arg-type]
        self._rows: dict[str, Tensor] = {}
        for name, held in every.items():
            if isinstance(held, bool):
                setattr(arguments, name, int(held))
            else:
                self._rows[name] = torch.as_tensor(held).long().expand(layers, rows).contiguous()
        if isinstance(state.merge_spec, SpreadSpec):
            arguments.parts = state.merge_spec.parts
        arguments.point(
            **self._rows, ends=store.ends, base=store.base, free=state.free, target=state.target,
            now=state.now, position=state.position, evicted=state.evicted, merged=state.merged, bias=state.bias,
            score=state.score if state.score.numel() else None, attention=state.attention if state.tracks else None,
            square=state.square if state.square.numel() else None, keys=store.key_rows, values=store.value_rows,
            factor=state.factor if state.factor.numel() else None, fresh=state.fresh if state.fresh.numel() else None,
        )  # fmt: skip
        if merge is not None:
            arguments.point(
                queries=merge.queries, staged_value=merge.value, staged_score=merge.score, weight=merge.weight,
                merge_target=merge.target, inverse_norm=merge.inverse_norm, target_bias=merge.target_bias,
            )  # fmt: skip
        if isinstance(merge, PendingMass):
            arguments.merging = BY_MASS
        elif isinstance(merge, PendingMerge):
            spec, arguments.merging = merge.spec, BY_SIMILARITY
            arguments.merge_keys, arguments.inherit = int(spec.keys), int(spec.inherit)
            arguments.important, arguments.per_layer = int(spec.targets == "important"), int(spec.per_layer)
            arguments.beta = spec.beta
            arguments.point(
                staged_key=merge.key, pending=merge.pending, similarity=merge.similarity, threshold=state.threshold,
                required=merge.required,
            )  # fmt: skip
        return arguments
