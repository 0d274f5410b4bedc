"""One decode step of states of random entries: the cases, a float64 reference, and what two paths must agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from d2obench.decode.state import DecodeState
from d2obench.policies import parse_policy
from d2obench.slots.dense import CLOSED, EMPTY, DenseStore


@dataclass(frozen=True)
class Case:
    """A state of random entries. ``taken`` are the slots in use of each layer and row, of ``capacities``; what the
    rest is, EMPTY and CLOSED take turns."""

    heads: int = 2
    batch: int = 1
    group: int = 4
    widths: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.float32
    capacities: tuple[int, ...] = (21, 38)
    holes: bool = False
    policy: str = "d2o"
    splits: int | None = None

    @property
    def rows(self) -> int:
        return self.heads * self.batch


def state_of(case: Case, seed: int = 0) -> DecodeState:
    generator = torch.Generator().manual_seed(seed)
    policy, width, rows = parse_policy(case.policy), max(case.capacities), case.rows
    store = DenseStore(case.capacities, rows, case.widths, case.dtype, torch.device("cpu"))
    position = torch.full((len(case.capacities), rows, width), CLOSED, dtype=torch.int32)
    grows = policy.grows
    prompts_of = [capacity - 9 for capacity in case.capacities]
    for layer, capacity in enumerate(case.capacities):
        count = prompts_of[layer] if grows else capacity - 1
        # alike, so that merges pass: one direction, with noise
        common = torch.randn(case.widths[0], generator=generator)
        keys = (common + torch.randn(rows, count, case.widths[0], generator=generator)).to(case.dtype)
        values = torch.randn(rows, count, case.widths[1], generator=generator).to(case.dtype)
        store.fill(layer, keys, values)
        position[layer, :, :count] = torch.arange(count)
        position[layer, :, count:capacity] = EMPTY
        if case.holes:
            position[layer, 0, 3:7] = CLOSED if grows else EMPTY
            position[layer, -1, count // 2 : count] = CLOSED
    now = torch.full((rows,), width - 2, dtype=torch.int32)
    state = DecodeState(store, position, now, policy, case.heads, case.group, prompts_of, grows)
    if grows:
        state.start()
    else:
        sums = [torch.rand(case.batch, case.heads, c, generator=generator) for c in case.capacities]
        remembered = [{"threshold": torch.full((case.batch, case.heads), 0.3)} for _ in case.capacities]
        state.start(remembered, [{"sum": sum_, "square": sum_ * sum_} for sum_ in sums])
    return state


def fresh(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query, a key and a value as models leave them: views with heads behind each other."""
    made = torch.randn(case.batch, 1, case.heads * (case.group + 2) + 1, max(case.widths), generator=generator)
    made = made.to(case.dtype)
    query, key, value, _ = made.transpose(1, 2).split([case.heads * case.group, case.heads, case.heads, 1], 1)
    return query[..., : case.widths[0]], key[..., : case.widths[0]], value[..., : case.widths[1]]


def step(state: DecodeState, layer: int, new: tuple[torch.Tensor, ...]) -> torch.Tensor:
    query, key, value = new
    state.write(layer, key, value)
    query = query if state.path else query.contiguous()
    return state.attend(layer, query, query.shape[-1] ** -0.5)


def float64(state: DecodeState, layer: int, new: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[rows, G, d_v]`` and row of attention ``[rows, C]`` from what stands in the slots, in float64: the
    pending merge carried out first, then plain attention over what is filled."""
    query, key, value = new
    rows, capacity, carry = state.store.rows, state.store.capacities[layer], state.pending_merge
    keys, values = (held(layer).double().clone() for held in (state.store.keys, state.store.values))
    slot = state.target[layer] - state.store.base[layer]
    filled = state.position[layer, :, :capacity] >= 0
    if state.grows:
        filled |= torch.arange(capacity) < slot[:, None]
        filled &= state.position[layer, :, :capacity] != CLOSED if state.bias is not None else True
    line = torch.arange(rows)
    if carry is not None:
        hosts = filled.clone() if carry.spec.hosts == "all" else carry.host_bias[layer, :, :capacity] > -torch.inf
        hosts[line, slot] = False
        lost, kind = carry.key[layer].double(), state.store.dtype
        cosine = torch.cosine_similarity(lost[:, None], keys, dim=-1, eps=1e-6).masked_fill(~hosts, -torch.inf)
        best, host = cosine.max(-1)
        passed = (best - 1 >= carry.bar[layer].double() - 1e-6) & (best > -torch.inf)
        w = (torch.sigmoid(best - 1) * passed).to(kind).double()[:, None]
        values[line, host] = (values[line, host] * (1 - w) + carry.value[layer].double() * w).to(kind).double()
        if carry.spec.keys:
            keys[line, host] = keys[line, host] * (1 - w) + lost * w
    keys[line, slot], values[line, slot] = key.reshape(rows, -1).double(), value.reshape(rows, -1).double()
    filled[line, slot] = True
    queries = query.reshape(rows, state.group, -1).double() / math.sqrt(query.shape[-1])
    logits = torch.einsum("rgd,rcd->rgc", queries, keys)
    weights = logits.masked_fill(~filled[:, None], -torch.inf).softmax(-1)
    return weights @ values, weights.sum(1)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def agree(plain: DecodeState, other: DecodeState) -> None:
    """Both paths left the same behind: bookkeeping exactly, numbers to rounding."""
    for name in ("position", "target", "slot", "evicted", "now"):
        assert torch.equal(getattr(plain, name), getattr(other, name)), name
    for name in ("key_rows", "value_rows"):
        assert torch.allclose(getattr(plain.store, name), getattr(other.store, name), atol=1e-5), name
    assert torch.allclose(plain.score, other.score, atol=1e-5)
    if plain.pending_merge is not None:
        carries = plain.pending_merge, other.pending_merge
        for name in ("pending", "host"):
            assert torch.equal(*(getattr(carry, name) for carry in carries)), name
        for name in ("key", "value", "similarity", "weight", "inverse_norm", "host_bias", "bar", "score"):
            assert torch.allclose(*(getattr(carry, name) for carry in carries), atol=1e-5, equal_nan=True), name
        assert torch.allclose(*(carry.queries[:, :, -1] for carry in carries), atol=1e-5)
    for name, tensor in plain.extra.items():
        assert torch.allclose(tensor.double(), other.extra[name].double(), atol=1e-5, equal_nan=True), name


def named(case: Case) -> str:
    kind = str(case.dtype).removeprefix("torch.")
    width, value_width = case.widths
    return f"{case.policy}-g{case.group}-d{width}x{value_width}-{kind}-s{case.splits}{'-holes' * case.holes}"
