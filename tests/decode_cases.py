"""States of random entries, and one decode step of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from d2obench.decode.state import DecodeState
from d2obench.policies import parse_policy
from d2obench.policies.base import Policy
from d2obench.slots.dense import CLOSED, EMPTY, DenseStore
from d2obench.slots.ragged import RaggedStore


@dataclass(frozen=True)
class Case:
    """A state of random entries that fill all slots of each layer but the one for the next token. Each row has fewer
    slots than its layer by as many as are ``missing``, if that is given."""

    heads: int = 2
    batch: int = 1
    group: int = 4
    widths: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.float32
    capacities: tuple[int, ...] = (21, 38)
    policy: str | Policy = "d2o"
    missing: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.heads * self.batch


def state_of(case: Case, seed: int = 0) -> DecodeState:
    generator = torch.Generator().manual_seed(seed)
    policy = parse_policy(case.policy) if isinstance(case.policy, str) else case.policy
    width, rows = max(case.capacities), case.rows
    store = DenseStore(case.capacities, rows, case.widths, case.dtype, torch.device("cpu"))
    position = torch.full((len(case.capacities), rows, width), CLOSED, dtype=torch.int32)
    filled = [capacity - (9 if policy.grows else 1) for capacity in case.capacities]
    for layer, (capacity, count) in enumerate(zip(case.capacities, filled, strict=True)):
        # alike, so that merges pass: one direction, with noise
        common = torch.randn(case.widths[0], generator=generator)
        keys = (common + torch.randn(rows, count, case.widths[0], generator=generator)).to(case.dtype)
        store.fill(layer, keys, torch.randn(rows, count, case.widths[1], generator=generator).to(case.dtype))
        position[layer, :, :count] = torch.arange(count)
        position[layer, :, count:capacity] = EMPTY
    if case.missing:
        store = shortened(store, position, case.missing, policy.grows)
    now = torch.full((rows,), width - 2, dtype=torch.int32)
    state = DecodeState(store, position, now, policy, case.heads, case.group, filled, policy.grows)
    if policy.grows:
        state.start()
    else:
        sums = [torch.rand(case.batch, case.heads, c, generator=generator) for c in case.capacities]
        remembered = [{"threshold": torch.full((case.batch, case.heads), 0.3)} for _ in case.capacities]
        state.start(remembered, [{"sum": sum_, "square": sum_ * sum_} for sum_ in sums])
    return state


def shortened(store: DenseStore, position: torch.Tensor, missing: tuple[int, ...], grows: bool) -> RaggedStore:
    """A store with the same contents, but for what is missing in each row: the first slots in a cache that grows, the
    last ones in another. Positions are changed in place."""
    for layer, capacity in enumerate(store.capacities):
        for row, gone in enumerate(missing):
            if grows:
                position[layer, row, :gone] = CLOSED
            else:
                position[layer, row, capacity - gone : capacity] = CLOSED
                position[layer, row, capacity - gone - 1] = EMPTY
    found = RaggedStore.of_positions(position, store.widths, store.dtype, ([], []))
    for layer in range(len(store.capacities)):
        found.fill(layer, store.keys(layer), store.values(layer))
    return found


def fresh(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query, a key and a value as models leave them: views with heads behind each other."""
    made = torch.randn(case.batch, 1, case.heads * (case.group + 2) + 1, max(case.widths), generator=generator)
    made = made.to(case.dtype)
    query, key, value, _ = made.transpose(1, 2).split([case.heads * case.group, case.heads, case.heads, 1], 1)
    return query[..., : case.widths[0]], key[..., : case.widths[0]], value[..., : case.widths[1]]


def step(state: DecodeState, layer: int, new: tuple[torch.Tensor, ...]) -> torch.Tensor:
    query, key, value = new
    state.write(layer, key, value)
    return state.attend(layer, query, query.shape[-1] ** -0.5)
