"""Decode steps on a GPU by Triton kernels: which states they support, their buffers and launches, and how rows are
split.

Every variant of a kernel that the steps of a state launch is compiled and loaded before the first step
(:meth:`TritonKernels.probe`), and what they compute is compared with PyTorch operators
(``d2obench.decode.triton.verify``). If either fails, PyTorch operators execute the state, and its decode path states
the reason. With ``TRITON_INTERPRET=1`` in the environment, Triton's interpreter runs the kernels on a CPU; this
is slow and meant for tests.

A row is split over as many programs as give every multiprocessor one and a half of them, as long as each has at least
one block of slots. A block is the number of slots whose keys take 16 KiB, because three such blocks in flight fit the
shared memory of every GPU since Ampere.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2obench.compiler import ALIGNMENT, end_process, launch, variant
from d2obench.decode.mass import PendingMass
from d2obench.decode.merge import PendingMerge
from d2obench.decode.reference import Backend
from d2obench.decode.triton import MOST_QUERIES, WIDEST
from d2obench.decode.triton.verify import difference
from d2obench.errors import in_a_line, is_device_fault, is_out_of_memory
from d2obench.policies.rules import Custom, LowestScore, LowestWeightedScore, Ring
from d2obench.ranges import span

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

BLOCK_BYTES = 16384
CHUNK = 512
"""Slots of the attention weights that one program of ``join`` computes."""
MOST_SPLITS = 64


_loaded: set[Hashable] = set()
"""The variants that this process has loaded."""
_refused: dict[Hashable, str] = {}
"""Why variants can't be used: they did not compile, or the device can't load them."""
_verified: dict[Hashable, str] = {}
"""What steps with certain variants compute that PyTorch's operators don't; empty if nothing."""


def offer(state: DecodeState) -> Backend | str:
    """The Triton backend for ``state``, or the reason why PyTorch operators must execute it."""
    if reason := _unserved(state):
        return reason
    device = state.store.device
    onto = device.type == "cuda"
    try:
        processors = torch.cuda.get_device_properties(device).multi_processor_count if onto else 4
        made = TritonKernels(state, processors, interpreted=not onto)
        return (made.probe() or _disproved(made) if onto else "") or made
    except Exception as problem:  # for example an installation of Triton that can't be imported
        if is_out_of_memory(problem) or is_device_fault(problem):
            raise
        return f"the kernels can't be used ({in_a_line(problem)})"


def _disproved(made: TritonKernels) -> str:
    """Why the kernels of a state can't be trusted; empty if they compute what PyTorch operators do. Compared once for
    the variants that the state uses."""
    state, variants = made.state, made.variants
    if variants not in _verified:
        first = torch.zeros(1, dtype=torch.long)
        try:
            fast, plain = state.copied(first), state.copied(first)
            fast.backend = TritonKernels(fast, made.processors, made.interpreted, made.splits)
            _verified[variants] = difference(fast, plain)
        except torch.cuda.OutOfMemoryError:  # no room for copies beside the cache: a later, smaller one is compared
            return ""
    what = _verified[variants]
    return f"the kernels don't compute what PyTorch does: {what}" if what else ""


def _unserved(state: DecodeState) -> str:
    """Why the kernels cannot execute a state; empty if they can."""
    store = state.store
    if store.quantised:
        return "the cache is quantised"
    if store.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"there are no kernels for {str(store.dtype).removeprefix('torch.')}"
    if max(store.widths) > WIDEST:
        return f"heads have {max(store.widths)} channels, more than {WIDEST}"
    if state.group > MOST_QUERIES:
        return f"{state.group} query heads share a KV head, more than {MOST_QUERIES}"
    if isinstance(state.merge, PendingMerge) and state.merge.spec.per_layer:
        return "a threshold per layer needs all its KV heads at once"
    return ""


def _unserved_update(state: DecodeState) -> str:
    """Why the kernel between steps cannot execute a state that the attention kernels support; empty if it can."""
    rule, spec = state.rule, state.merge_spec
    if state.policy.interval > 1:
        return "several tokens are evicted together"
    if isinstance(rule, Custom):
        return rule.why
    if isinstance(rule, LowestScore | LowestWeightedScore):
        if isinstance(rule, LowestScore) and rule.normalised:
            return "no kernel normalises scores"
        if isinstance(state.merge, PendingMerge) and state.merge.spec.targets != "all":
            return "no kernel chooses among merge targets"
        return ""
    if isinstance(rule, Ring) and spec is None:
        return ""
    return "" if rule is None else f"no kernel has the rule {type(rule).__name__}"


class TritonKernels(Backend):
    """Executes decode steps by Triton kernels.

    Args:
        state: its tensors are modified in place.
        processors: number of multiprocessors of the device.
        interpreted: whether Triton's interpreter runs the kernels.
        splits: number of splits of every row, or of the rows of each layer; :meth:`splits_of` chooses it if not given.
    """

    length_on_device = True

    def __init__(
        self, state: DecodeState, processors: int, interpreted: bool, splits: int | Sequence[int] | None = None
    ) -> None:
        super().__init__(state)
        self.processors, self.interpreted, self._why_update = processors, interpreted, _unserved_update(state)
        store, merge = state.store, state.merge
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
            "M": max(16, _power(state.group + (merge is not None))),
            "BLOCK": self.block,
            "WIDE": wide or interpreted,
        }
        self.biased = state.bias is not None
        if splits is None:
            splits = [self.splits_of(capacity) for capacity in store.capacities]
        self.splits = [splits] * len(store.capacities) if isinstance(splits, int) else list(splits)
        most = max(self.splits)
        floats: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self.part = torch.empty(self.rows * most * state.group * value_width if most > 1 else 1, **floats)
        self.high, self.total = (torch.empty(self.rows * most * state.group, **floats) for _ in range(2))
        self.stride = state.position.shape[-1]
        self.logits = torch.empty(self.rows * state.group * self.stride if state.tracks or merge else 1, **floats)
        self.best = torch.empty(self.rows * most, **floats)
        self.place = torch.empty(self.rows * most, dtype=torch.long, device=self.device)
        rule, none = state.rule, self.total
        self.recent = self.sinks = none
        if isinstance(rule, LowestScore | LowestWeightedScore):
            self.recent = rule.recent.long().contiguous()
        if isinstance(rule, LowestWeightedScore):
            sinks = torch.as_tensor(rule.sinks, device=self.device).long()
            self.sinks = sinks.expand(len(store.capacities), self.rows).contiguous()
        self.first = rule.first.long().contiguous() if isinstance(rule, Ring) else none
        self._new: tuple[Tensor, Tensor] | None = None
        self._noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None
        """Where launches are noted instead of made; None to make them."""

    @property
    def needs_buffers(self) -> bool:
        return False

    @property
    def path(self) -> str:
        ran = "Triton kernels (interpreted)" if self.interpreted else "Triton kernels"
        return f"{ran}, PyTorch operators between steps: {self._why_update}" if self._why_update else ran

    def splits_of(self, capacity: int) -> int:
        """Number of splits of a row of ``capacity`` slots."""
        wanted = -(-3 * self.processors // (2 * self.rows))
        return max(1, min(wanted, capacity // self.block, MOST_SPLITS))

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Remembers the new token's key and value; the attention kernel of this layer writes them."""
        self._new = _dense(keys), _dense(values)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        from d2obench.decode.triton import attend as kernels
        from d2obench.decode.triton import merge as merging

        state, store = self.state, self.state.store
        assert self._new is not None
        new_key, new_value = self._new
        query = _dense(query)
        batch, heads = query.shape[:2]
        out = torch.empty(batch, 1, heads, store.widths[1], dtype=store.dtype, device=self.device)
        splits = self.splits[layer]
        bias = self.part if state.bias is None else state.bias[layer]
        attention = state.attention[layer] if state.tracks else self.part
        keys, values, ends = store.key_rows, store.value_rows, store.ends[layer]
        target, base = state.target[layer], store.base[layer]
        sums = out, self.part, self.high, self.total, self.logits, attention
        sizes = state.heads, self.stride, splits, *query.stride()[:2]
        grid, single = (self.rows, splits), splits == 1
        with span("decode attention"):
            if state.merge is None:
                self._run(
                    kernels.attend, grid, *sums, query, new_key, new_value, keys, values, bias, target, base,
                    store.begins[layer], ends, scale, *sizes, *new_key.stride()[:2], *new_value.stride()[:2],
                    **self.common, **self.shape,
                    SINGLE=single, GROWS=state.grows, HAS_BIAS=self.biased, num_stages=2,
                )  # fmt: skip
            else:
                merge, mass = state.merge, isinstance(state.merge, PendingMass)
                required, key = self.total, self.part  # a merge by mass needs neither
                if isinstance(merge, PendingMerge):
                    required, key = merge.required[layer], merge.key[layer]
                self._run(
                    merging.weigh, grid, self.logits, self.best, self.place, query, merge.queries[layer], new_key, keys,
                    bias, merge.inverse_norm[layer], merge.target_bias[layer], target, base, ends, scale, *sizes,
                    *new_key.stride()[:2], G=state.group, **self.shape, HAS_BIAS=self.biased, num_stages=3,
                )  # fmt: skip
                self._run(
                    merging.mix, grid, *sums, self.best, self.place, required, merge.similarity[layer],
                    merge.weight[layer], merge.target[layer], merge.score[layer], state.score[layer],
                    state.position[layer], state.now, query, key, merge.value[layer], new_value,
                    values, target, base, ends, scale, *sizes, *new_value.stride()[:2], **self.common, **self.shape,
                    SINGLE=single, SP=_power(splits), KEYS=not mass and merge.spec.keys, MASS=mass, num_stages=3,
                )  # fmt: skip
            if not single:
                chunks = -(-store.capacities[layer] // CHUNK) if state.tracks else 1
                self._run(
                    kernels.join, (self.rows, chunks), *sums, ends, self.stride, splits, **self.common,
                    SP=_power(splits), CHUNK=CHUNK,
                )  # fmt: skip
        return out

    def update(self) -> None:
        if self._why_update:
            super().update()
            return
        from d2obench.decode.triton.update import update

        state, store, none, merge, rule = self.state, self.state.store, self.total, self.state.merge, self.state.rule
        bias = none if state.bias is None else state.bias
        weighted = rule if isinstance(rule, LowestWeightedScore) else None
        scored = isinstance(rule, LowestScore | LowestWeightedScore)
        window = self.recent, self.sinks, self.first, state.usable
        scores = (state.score, state.attention) if scored else (none, none)
        weights = (state.factor, state.fresh) if weighted else (none, none)
        merges: tuple[Any, ...] = (store.key_rows, store.value_rows, *(none,) * 13)
        spec = merge.spec if isinstance(merge, PendingMerge) else None
        if isinstance(merge, PendingMass):
            merges = (
                store.key_rows, store.value_rows, merge.queries, none, merge.value, none, merge.score, none,
                merge.target, merge.weight, merge.inverse_norm, merge.target_bias, none, none, state.merged,
            )  # fmt: skip
        if isinstance(merge, PendingMerge):
            merges = (
                store.key_rows, store.value_rows, merge.queries, merge.key, merge.value, merge.pending, merge.score,
                merge.similarity, merge.target, merge.weight, merge.inverse_norm, merge.target_bias, merge.required,
                state.threshold, state.merged,
            )  # fmt: skip
        with span("evict"):
            self._run(
                update, (self.rows, len(store.capacities)), state.position, state.now, state.free, state.target,
                store.base, state.evicted, bias, store.ends, *scores, *weights, *window, *merges,
                spec.beta if spec else 0.0, self.rows, self.stride,
                G=state.group, D=store.widths[0], DV=store.widths[1], DP=self.shape["DP"], DVP=self.common["DVP"],
                BLOCK=max(16, min(1024, _power(self.stride))), SCORED=scored, HAS_BIAS=self.biased,
                MERGES=spec is not None, KEYS=bool(spec and spec.keys), INHERIT=bool(spec and spec.inherit),
                SMOOTH=bool(spec and spec.beta < 1), MASS=isinstance(merge, PendingMass),
                WEIGHTED=weighted is not None, NORMALISED=bool(weighted and weighted.normalised),
                NORMS=bool(weighted and weighted.value_norms),
            )  # fmt: skip

    @property
    def variants(self) -> Hashable:
        own = frozenset(variant(kernel, given, meta) for kernel, given, meta in self._launches())
        return (own, super().variants) if self._why_update else own

    def probe(self) -> str:
        """Compiles and loads every variant that a step launches and this process has not loaded yet, by launching it
        with an empty grid.

        Returns:
            Why one of them can't be used; empty if all can.

        Raises:
            RuntimeError: the device is out of memory, or broken.
        """
        for kernel, given, meta in self._launches():
            made = variant(kernel, given, meta)
            if made in _refused:
                return _refused[made]
            if made in _loaded:
                continue
            try:
                launch(kernel, (0, 1), *given, **meta)
            except Exception as problem:  # a compiler may raise anything; PyTorch operators are the fallback
                if is_out_of_memory(problem) or is_device_fault(problem):
                    end_process(f"a kernel could not be loaded ({in_a_line(problem)})")
                    raise
                _refused[made] = f"the kernels did not compile ({in_a_line(problem)})"
                return _refused[made]
            _loaded.add(made)
        return ""

    def _launches(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """The launches of a step in layers that differ, and between steps: kernel, arguments, and constants. Nothing
        runs."""
        state, (key_width, value_width) = self.state, self.state.store.widths
        # 1. layers differ in their splits, and in the alignment of their keys and values where entries are of odd sizes
        layers: Sequence[int] = range(len(self.splits))
        if all(width * state.store.dtype.itemsize % ALIGNMENT == 0 for width in state.store.widths):
            layers = [self.splits.index(splits) for splits in dict.fromkeys(self.splits)]
        # 2. a step with a token of any content
        batch = self.rows // state.heads
        kind: dict[str, Any] = {"dtype": state.store.dtype, "device": self.device}
        query = torch.empty(batch, state.heads * state.group, 1, key_width, **kind)
        new = query[:, : state.heads], torch.empty(batch, state.heads, 1, value_width, **kind)
        noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._noted = noted
        try:
            for layer in layers:
                self.write(layer, *new)
                self.attend(layer, query, 1.0)
            if not state.grows and not self._why_update:
                self.update()
        finally:
            self._noted = self._new = None
        return noted

    def tensors(self) -> list[Tensor]:
        """The work buffers."""
        return [self.part, self.high, self.total, self.logits, self.best, self.place]

    def _run(self, kernel: Any, grid: tuple[int, int], *given: Any, **meta: Any) -> None:
        if self._noted is not None:
            self._noted.append((kernel, given, meta))
        else:
            launch(kernel, grid, *given, **meta)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, copied if its channels are not contiguous in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _power(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()
