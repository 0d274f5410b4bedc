"""From entries to slots, layer by layer: selection, merging, and the position of what every slot holds.

Peak memory depends on whether a layer's budget depends on other layers.

If it does not, the cache packs each layer right after its attention over the prompt, and frees the layer's full keys
and values before the next layer runs. So the peak is the slots plus the prompt of a single layer.

If it does (D2O's Eq. 5 divides one budget among all layers), the full keys and values of all layers exist when the
prompt ends, as in a full cache, together with O(L) column sums per layer. From then on memory only falls. The entries
that a layer keeps are copied to tensors of their own size, and its full ones are freed. The slots of all layers are
allocated once no full layer is left: first those of the keys, then those of the values, and each copy is freed as it is
moved to its slots. For a budget of ρ the peak is therefore ``max(1, 1.5·ρ)`` times the prompt's keys and values, plus
the kept entries of one layer. Slots of KV heads with unequal numbers of entries are always allocated at the end. A
policy that can bound its budgets earlier (``cake``) evicts as layer after layer reads the prompt
(``d2obench.cache.cascade``); its peak is then ``1.5·ρ`` times the prompt's keys and values, plus those of one layer.

Prompts of many sequences can be read in groups, one after the other (``d2obench.cache.groups``): the full entries of a
single group then exist at a time.

A GPU is not waited for in any layer: budgets are known on both sides, and sizes follow from the host's. Only policies
whose KV heads share out a layer's entries by their ranks (``adakv``), hold unequal numbers of them, or are cut before
their budgets are known (``cake``) read sizes from the GPU, and a layer whose budget holds the whole prompt asks once
for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2obench.attention.prompt import kept_stats
from d2obench.cache.layer import PolicyLayer
from d2obench.decode.state import DecodeState, capacities
from d2obench.errors import PolicyError
from d2obench.policies.base import RECENT, Entries, Kept, Policy, Stats, per_row, pick, select
from d2obench.ranges import span
from d2obench.slots.dense import CLOSED, EMPTY, DenseStore
from d2obench.slots.quantised import QuantStore, RaggedQuantStore
from d2obench.slots.ragged import RaggedStore, owned


@dataclass(frozen=True)
class Layout:
    """The sizes and types that the entries of all layers share.

    Args:
        batch: number of sequences.
        heads: number of KV heads.
        widths: head dimension of keys and of values.
        first_head: index in the model of the first KV head; not 0 if a layer's heads are divided among ranks.
    """

    batch: int
    heads: int
    widths: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    first_head: int = 0


class Packing:
    """Compresses layer after layer and fills their slots.

    Args:
        policy: the policy that selects and merges.
        layout: sizes and types of the entries.
        lengths: int64 ``[B]``, tokens of each sequence so far.
        budgets: entries that each layer keeps, int64 ``[layers, B]``, or that each KV head keeps, ``[layers, B, H]``.
        counts: entries of each layer, including padding.
        spare: additional slots for tokens to come.
        everything: keep all entries, whatever the policy says.
        grows: whether decoding appends tokens.
        early: whether layers are added one by one while the prompt is read, so that slots must be allocated now.
        seed: seed for policies that draw random numbers.
        first: index of the first of these layers among all ``layers``; not 0 if layers are on several devices.
    """

    def __init__(
        self,
        policy: Policy,
        layout: Layout,
        lengths: Tensor,
        budgets: Tensor,
        counts: Sequence[int],
        spare: int,
        *,
        everything: bool,
        grows: bool,
        early: bool,
        seed: int,
        first: int = 0,
        layers: int = 0,
    ) -> None:
        self.policy, self.layout, self.lengths, self.budgets, self.spare = policy, layout, lengths, budgets, spare
        self.everything, self.grows, self.seed = everything, grows, seed
        self.first, self.layers = first, layers or len(counts)
        self.ragged = policy.ragged and not everything
        self._there = budgets.to(layout.device)
        self.sizes: list[int] = []
        """Number of slots of a KV head in each layer; the largest number if they differ."""
        if not self.ragged:
            most = [min(int(row.max()), count) for row, count in zip(budgets, counts, strict=True)]
            self.sizes = [count + spare for count in most] if grows else list(capacities(budgets, spare))
        self.prompts: list[int] = []
        """Number of slots in each layer that kept entries may take."""
        self.position: list[Tensor] = []
        self.memory: list[dict[str, Tensor]] = []
        self.scores: list[Stats] = []
        self._merged: list[Tensor | int] = []
        self._evicted: list[Tensor | int] = []
        self._waiting: list[list[Tensor]] = [[], [], []]
        self.store: DenseStore | None = self._new_store() if early and not self.ragged else None

    def add(self, layer: PolicyLayer) -> None:
        """Compresses the next layer, stores what it keeps, and frees its entries."""
        assert layer.keys is not None and layer.values is not None
        # 1. the layer's entries, and how many of them may stay
        position = layer.positions()
        at = layer.index - self.first
        total, keep = position.shape[2], self._there[at]
        if self.everything:
            index = torch.arange(total, device=position.device).expand_as(position)
            self._hold(at, layer.keys, layer.values, position >= 0)
        else:
            # 2. the policy selects and merges; ``remembered`` is what it hands over to decoding
            entries = layer.entries(self.layers, self.lengths, self.seed, self.layout.first_head)
            kept, remembered, keep = compress(self.policy, entries, self.budgets[at], keep)
            stats = entries.stats
            del entries
            if self.grows:
                kept = to_the_right(kept)
            index = kept.index
            # 3. count what was evicted; the statistics of the kept entries are their first scores
            self.memory.append(remembered)
            self._evicted.append(kept.leaving.sum())
            self._merged.append(remembered["merged"].sum() if "merged" in remembered else 0)
            self.scores.append(kept_stats(stats, index.clamp_max(total - 1)))
            # 4. free the layer's full keys and values before the kept ones are stored
            layer.keys = layer.values = None
            self._hold(at, kept.keys, kept.values, kept.filled)
        # 5. record the position of the entry in every slot
        self.prompts.append(index.shape[2])
        if self.ragged:
            self.sizes.append((index.shape[2] if self.grows else int(keep.max())) + self.spare)
        shape = (*position.shape[:2], self.sizes[at])
        own = torch.full(shape, CLOSED, dtype=torch.int32, device=self.layout.device)
        record_positions(own, index, position, None if self.grows else keep + self.spare)
        self.position.append(own.flatten(0, 1))
        layer.clear()

    def finish(self, group: int, rotary: Tensor | None) -> DecodeState:
        """The decode state, after every layer was added; arguments as in :class:`DecodeState`."""
        policy, heads, width = self.policy, self.layout.heads, max(self.sizes)
        position = torch.stack([pad(own, (0, width - own.shape[1]), value=CLOSED) for own in self.position])
        store = self.store or self._new_store(self._waiting, position)
        now = (self.lengths - 1).to(torch.int32).repeat_interleave(heads)
        state = DecodeState(
            store, position, now, policy, heads, group, self.prompts, self.grows, self.seed, rotary,
            self.first, self.layout.first_head,
        )  # fmt: skip
        if self.everything:
            state.start()
        else:
            state.start(self.memory, self.scores)
        return state

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """Entries merged and entries evicted in each layer, over its sequences and KV heads."""
        none = [0] * len(self.budgets)
        return _read(self._merged) or none, _read(self._evicted) or none

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held so far."""
        waiting = [tensor.untyped_storage().nbytes() for tensor in (*self._waiting[0], *self._waiting[1])]
        return (self.store.bytes if self.store else 0) + sum(waiting)

    def _hold(self, layer: int, keys: Tensor, values: Tensor, real: Tensor) -> None:
        rows = [held.flatten(0, 1) for held in (keys, values, real)]
        if self.ragged:  # without the slots that stay empty
            rows[:2] = (held[rows[2]] for held in rows[:2])
        if self.store is not None:
            self.store.fill(layer, *rows)
        else:
            for column, held in zip(self._waiting, rows, strict=True):
                column.append(held)

    def _new_store(self, parts: list[list[Tensor]] | None = None, position: Tensor | None = None) -> DenseStore:
        layout, bits = self.layout, self.policy.bits
        rows = layout.batch * layout.heads
        if self.ragged:
            assert parts is not None and position is not None
            if bits in (None, 16):
                return RaggedStore.of_positions(position, layout.widths, layout.dtype, parts[:2])
            return self._new_ragged_quant_store(parts, position, bits)
        if bits in (None, 16):
            return DenseStore(self.sizes, rows, layout.widths, layout.dtype, layout.device, parts and parts[:2])
        store = QuantStore(self.sizes, rows, layout.widths, layout.dtype, layout.device, bits, self.grows)
        for layer in range(len(self.sizes) if parts else 0):
            store.fill(layer, *(column.pop(0) for column in parts or ()))
        return store

    def _new_ragged_quant_store(self, parts: list[list[Tensor]], position: Tensor, bits: int) -> RaggedQuantStore:
        layout = self.layout
        store = RaggedQuantStore(*owned(position), layout.widths, layout.dtype, layout.device, bits, self.grows)
        for layer, count in enumerate(self.prompts):
            real = position[layer, :, :count] >= 0
            keys, values = (
                torch.zeros(*real.shape, width, dtype=layout.dtype, device=layout.device) for width in layout.widths
            )
            keys[real], values[real] = parts[0].pop(0), parts[1].pop(0)
            store.fill(layer, keys, values, real)
        return store


def _read(counts: Sequence[Tensor | int]) -> list[int]:
    """Counts of all layers, read from their device at once."""
    tensors = [count for count in counts if isinstance(count, Tensor)]
    found = iter(torch.stack(tensors).tolist() if tensors else ())
    return [int(next(found)) if isinstance(count, Tensor) else count for count in counts]


def compress(
    policy: Policy, entries: Entries, keep: Tensor, there: Tensor | None = None
) -> tuple[Kept, dict[str, Tensor], Tensor]:
    """Selects the entries that a layer keeps and lets the policy merge the others into them.

    Args:
        policy: the policy.
        entries: the layer's entries.
        keep: number of entries to keep of each sequence, int64 ``[B]``, or of each KV head, ``[B, H]``; on the CPU.
        there: the same on the device of the entries, if it is there already.

    Returns:
        The kept entries after merging; what ``policy.absorb`` returned (empty if nothing was evicted); and ``there``,
        or if the policy shares the entries out over the heads, what it gives to each, ``[B, H]``.
    """
    # 1. if everything fits, nothing is copied; ranking completes the policy's own statistics
    policy.describe(entries)
    position = entries.position
    total, fewest = position.shape[2], int(keep.min())
    there = keep.to(position.device) if there is None else there
    if fewest >= total and not bool((position < 0).any()):
        if type(policy).describe is not Policy.describe:
            policy.rank(entries, there)
        everything = torch.arange(total, device=position.device).expand_as(position)
        return Kept(everything, everything[..., :0], total, entries.keys, entries.values), {}, there
    # 2. choose the kept and the evicted entries by the policy's ranks
    with span("evict"):
        rank = policy.rank(entries, there)
        if policy.sharing is None:
            given = there
            index, evicted = select(rank, given, min(int(keep.max()), total), fewest)
        else:
            given = policy.sharing.budgets(rank, rank >= RECENT, there)
            index, evicted = select(rank, given, min(int(given.max()), total))
    # 3. copy the kept entries, and merge the evicted ones into the copy
    kept = Kept(index, evicted, total, pick(entries.keys, index), pick(entries.values, index))
    with span("merge"):
        return kept, policy.absorb(entries, kept, there), given


def record_positions(own: Tensor, index: Tensor, position: Tensor, usable: Tensor | None) -> None:
    """Writes the position of the token in each of a layer's slots.

    Args:
        own: int32 ``[B, H, C]``, all CLOSED; written in place.
        index: int64 ``[B, H, n]``, index of the entry in each of the first n slots; N for none.
        position: int64 ``[B, H, N]``, positions of the entries, negative for padding.
        usable: number of usable slots of each sequence, ``[B]``, or of each KV head, ``[B, H]``; None if decoding
            appends after the first n.
    """
    count, total = index.shape[2], position.shape[2]
    if usable is None:
        own[..., count:] = EMPTY
    else:
        slots = torch.arange(own.shape[2], device=own.device)
        own[:] = torch.where(slots < per_row(usable, own.device), EMPTY, CLOSED)
    true = position.gather(2, index.clamp_max(total - 1)).to(own.dtype)
    own[..., :count] = torch.where((true >= 0) & (index < total), true, own[..., :count])


def to_the_right(kept: Kept) -> Kept:
    """The same entries with empty slots moved from the right end to the left, so that decoded tokens can be
    appended."""
    count = kept.index.shape[2]
    empty = count - kept.filled.sum(-1, keepdim=True)
    if empty.device.type == "cpu" and not bool(empty.any()):  # a GPU would have to be waited for
        return kept
    order = (torch.arange(count, device=kept.index.device) - empty) % count
    keys, values = (held.gather(2, order[..., None].expand_as(held)) for held in (kept.keys, kept.values))
    return Kept(kept.index.gather(2, order), kept.evicted, kept.total, keys, values)


def bounded(budgets: Tensor, lengths: Tensor, max_new: int | None, name: str) -> Tensor:
    """Budgets ``[layers, B]`` or ``[layers, B, H]`` in which −1 (keep everything, and grow) is replaced by the number
    of slots needed.

    Raises:
        PolicyError: there are such layers and ``max_new`` is not known.
    """
    if not bool((budgets < 0).any()):
        return budgets
    if max_new is None:
        raise PolicyError(f"policy '{name}' has layers that grow", remedy="give max_new, the tokens to generate")
    needed = (lengths.cpu() + max_new).view(-1, *[1] * (budgets.dim() - 2))
    return torch.where(budgets < 0, needed, budgets)
