"""Slots of KV heads with unequal numbers of entries: the store against dictionaries, and what it takes in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import prompts, tiny_model

from d2obench.cache import Session
from d2obench.errors import PolicyError
from d2obench.policies import parse_policy
from d2obench.policies.sharing import Sharing
from d2obench.slots.dense import CLOSED, EMPTY
from d2obench.slots.quantised import GROUP, QuantStore, RaggedQuantStore
from d2obench.slots.ragged import RaggedStore

CPU = torch.device("cpu")
POLICIES = ["d2o(preset=mass,heads=true)", "adakv(score=h2o)", "adakv(score=snapkv(window=8,decode=slide))",
            "adakv(score=snapkv(window=8))"]  # fmt: skip


def made(begins: list[list[int]], ends: list[list[int]]) -> tuple[RaggedStore, dict[tuple[int, ...], int]]:
    """A store whose key at (layer, row, slot) is filled with a number of its own, and these numbers; values are their
    negatives."""
    store = RaggedStore(torch.tensor(begins), torch.tensor(ends), (4, 6), torch.float32, CPU)
    held: dict[tuple[int, ...], int] = {}
    for layer, rows in enumerate(zip(begins, ends, strict=True)):
        keys = torch.full((len(begins[0]), max(ends[layer]), 1), -99.0)
        for row, (begin, end) in enumerate(zip(*rows, strict=True)):
            for slot in range(begin, end):
                held[layer, row, slot] = len(held) + 1
                keys[row, slot] = float(len(held))
        store.fill(layer, keys.expand(-1, -1, 4), -keys.expand(-1, -1, 6))
    return store, held


def compare(store: RaggedStore, held: dict[tuple[int, ...], int]) -> None:
    assert store.slots == len(held) == len(store.key_rows) == len(store.value_rows)
    for (layer, row, slot), number in held.items():
        assert store.keys(layer)[row, slot].tolist() == [number] * 4
        assert store.values(layer)[row, slot].tolist() == [-number] * 6
        at = store.base[layer, row] + slot
        assert store.read_keys(at[None])[0, 0] == number and store.read_values(at[None])[0, 0] == -number
    for layer, capacity in enumerate(store.capacities):
        assert store.keys(layer).shape == (store.rows, capacity, 4)
        assert set(store.keys(layer)[..., 0].flatten().tolist()) <= {*map(float, held.values()), 0.0}


def test_every_slot_has_its_own_place() -> None:
    compare(*made([[0, 0, 0], [0, 0, 0]], [[3, 1, 5], [2, 2, 1]]))
    compare(*made([[2, 0], [1, 3]], [[6, 6], [4, 4]]))


def test_rows_are_selected_extended_and_restored() -> None:
    store, held = made([[2, 0], [1, 3]], [[6, 6], [4, 4]])
    chosen = [1, 1, 0]
    compare(
        store.selected(torch.tensor(chosen)),
        {(layer, i, slot): n for (layer, row, slot), n in held.items() for i, one in enumerate(chosen) if one == row},
    )
    longer = store.extended(2)
    assert longer.slots == len(held) + 2 * 4 and longer.capacities == [8, 6]
    assert all(longer.keys(at)[row, slot, 0] == number for (at, row, slot), number in held.items())
    saved = store.snapshot()
    store.write(0, store.base[0] + 5, torch.zeros(2, 4), torch.zeros(2, 6))
    assert store.keys(0)[:, 5].abs().sum() == 0
    store.restore(saved)
    compare(store, held)


def test_placeholders_repeat_what_a_row_holds() -> None:
    store, held = made([[2, 0]], [[6, 6]])
    store.repeat([4], 2)
    assert store.keys(0)[:, 4:, 0].tolist() == [[held[0, 0, 2], held[0, 0, 3]], [held[0, 1, 0], held[0, 1, 1]]]


def test_slots_follow_from_positions() -> None:
    position = torch.tensor([[[0, 3, EMPTY, CLOSED], [5, EMPTY, CLOSED, CLOSED]]])
    keys, values = torch.arange(3.0)[:, None].expand(-1, 4), torch.arange(3.0)[:, None].expand(-1, 6)
    store = RaggedStore.of_positions(position, (4, 6), torch.float32, ([keys], [values]))
    assert store.slots == 5 and store.ends.tolist() == [[3, 2]]
    assert store.keys(0)[0, :2, 0].tolist() == [0, 1] and store.values(0)[1, 0, 0] == 2


# --- quantised slots --------------------------------------------------------------------------------------------------


def quantised(begins: list[list[int]], ends: list[list[int]], bits: int, grows: bool) -> RaggedQuantStore:
    return RaggedQuantStore(torch.tensor(begins), torch.tensor(ends), (64, 32), torch.float32, CPU, bits, grows)


def some(rows: int, count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_each_head_is_quantised_as_if_it_were_alone(bits: int) -> None:
    """Bit by bit like a store of one head, also after writes that widen ranges; a head of 7 slots fills no group."""
    sizes = [[70, 33, 7], [32, 64, 5]]
    store = quantised([[0] * 3] * 2, sizes, bits, grows=False)
    alone = [[QuantStore([size], 1, (64, 32), torch.float32, CPU, bits, False) for size in row] for row in sizes]
    for layer, row in enumerate(sizes):
        keys, values = some(3, max(row), 64, layer), some(3, max(row), 32, layer + 5)
        real = torch.arange(max(row)) < torch.tensor(row)[:, None]
        store.fill(layer, keys, values, real)
        for head, size in enumerate(row):
            alone[layer][head].fill(0, keys[head : head + 1, :size], values[head : head + 1, :size])
    for turn in range(20):
        slot = torch.tensor([[(turn * 7 + head) % size for head, size in enumerate(row)] for row in sizes])
        fresh = some(6, 1, 64, turn).view(2, 3, 64) * (1 + turn / 5), some(6, 1, 32, turn).view(2, 3, 32)
        store.write_keys(store.base + slot, fresh[0])
        store.write_values(store.base + slot, fresh[1])
        for layer in (0, 1):
            for head in range(3):
                own, at = alone[layer][head], slot[layer, head, None]
                own.write(0, at, fresh[0][layer, head, None], fresh[1][layer, head, None])
                place = (store.base + slot)[layer, head, None]
                assert torch.equal(store.read_keys(place), own.read_keys(at))
                assert torch.equal(store.read_values(place), own.read_values(at))
    for layer, row in enumerate(sizes):
        for head, size in enumerate(row):
            assert torch.equal(store.keys(layer)[head, :size], alone[layer][head].keys(0)[0])
            assert torch.equal(store.values(layer)[head, :size], alone[layer][head].values(0)[0])
    assert store.bytes == sum(own.bytes for row in alone for own in row)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_heads_that_grow_are_quantised_like_padded_ones(bits: int) -> None:
    begins, count, size = [[0, 11, 40], [3, 0, 20]], 45, 120
    store = quantised(begins, [[size] * 3] * 2, bits, grows=True)
    padded = QuantStore([size] * 2, 3, (64, 32), torch.float32, CPU, bits, True)
    for layer in (0, 1):
        real = torch.arange(count) >= torch.tensor(begins[layer])[:, None]
        keys, values = (some(3, count, width, layer) * real[..., None] for width in (64, 32))
        for held in (store, padded):
            held.fill(layer, keys, values, real)
    for slot in range(count, count + 40):
        for layer in (0, 1):
            for held in (store, padded):
                held.write(layer, held.base[layer] + slot, some(3, 1, 64, slot)[:, 0], some(3, 1, 32, slot)[:, 0])
    chosen = torch.tensor([2, 0, 2])
    pairs = [
        (store, padded),
        (store.extended(9), padded.extended(9)),
        (store.selected(chosen), padded.selected(chosen)),
    ]
    for one, other in pairs:
        assert one.filled == other.filled == [count + 40] * 2
        for layer in (0, 1):
            for head in range(3):
                begin = int(one.begins[layer, head])
                found, expected = one.keys(layer)[head], other.keys(layer)[head]
                assert torch.equal(found[begin : count + 40], expected[begin : count + 40])
                assert torch.equal(
                    one.values(layer)[head, begin : count + 40], other.values(layer)[head, begin : count + 40]
                )
    saved, before = store.snapshot(), store.keys(1).clone()
    store.write(1, store.base[1] + 85, some(3, 1, 64)[:, 0], some(3, 1, 32)[:, 0])
    store.restore(saved)
    assert torch.equal(store.keys(1)[:, :85], before[:, :85])


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_quantised_bytes_are_those_of_the_entries(policy: str, bits: int) -> None:
    """Beside unquantised ones: codes of the same slots; and ranges, of which a head has a group more than it fills."""
    plain, packed = opened(policy, 200, 137), opened(f"{policy}+quant(bits={bits})", 200, 137)
    assert torch.equal(plain.cache.state.held(), packed.cache.state.held())
    store, biases = packed.cache.state.store, 4 * packed.cache.state.biased
    slots = plain.cache.state.store.slots
    assert store.slots == slots and plain.footprint().kv_bytes == slots * (2 * 16 * 4 + biases)
    heads = store.ends.numel()
    ranges = 2 * 16 * 2 * (slots / GROUP + 2 * heads) + slots * 2 * 2
    opened_groups = heads * GROUP * 16 * 4 if packed.cache.state.grows else 0
    codes = slots * 2 * 16 * bits // 8
    assert codes < packed.footprint().kv_bytes <= codes + ranges + opened_groups + slots * biases


# --- whole caches ----------------------------------------------------------------------------------------------------


def opened(policy: str, *lengths: int, budget: str = "0.5", **given: Any) -> Session:
    session = Session(tiny_model("llama-deep", **given), policy, budget, max_new=3)
    session.prefill(prompts(*lengths))
    session.compress()
    return session


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_those_of_the_entries(policy: str, dtype: str) -> None:
    """Of the slots, all but those reserved for new tokens hold an entry, and the heads' lengths do differ."""
    session = opened(policy, 200, 137, dtype=dtype)
    state, found = session.cache.state, session.footprint()
    held = state.held()
    assert not state.grows or session.max_new == 3
    entries = int(held.sum())
    heads = held.view(5, 2, 2)
    assert (heads[..., 0] != heads[..., 1]).float().mean() > 0.5
    each = 2 * 16 * (4 if dtype == "float32" else 2) + (4 if state.biased else 0)
    reserved = (3 if state.grows else 1) * held.numel()
    assert found.kv_bytes == found.prompt_kv_bytes == (entries + reserved) * each
    assert found.kv_bytes - reserved * each <= sum(map(sum, found.kept)) * 2 * each * 1.0001
    assert entries == pytest.approx(0.5 * 337 * 5 * 2, abs=20)


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_a_layer_holds_as_much_as_without_sharing(policy: str) -> None:
    session = opened(policy, 80, 51, budget="0.3")
    total = session.cache.state.held().sum()
    for token in range(3):
        session.step(torch.tensor([token + 3, token + 4]))
    assert session.cache.state.held().sum() == total
    assert session.footprint().kv_bytes == session.footprint().prompt_kv_bytes


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("streaming", "has no scores"), ("tova", "judges the KV heads"), ("d2o(preset=released)", "judges the"),
        ("adakv", "a budget of its own"), ("d2o(preset=mass,heads=true)", "a budget of its own"),
        ("nothing", "unknown policy"),
    ],
)  # fmt: skip
def test_what_adakv_cannot_wrap_says_so(score: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        parse_policy(f"adakv(score={score})")


def test_a_safeguard_is_a_part() -> None:
    with pytest.raises(PolicyError, match="safeguard is 2"):
        parse_policy("adakv(safeguard=2)")


# --- AdaKV's rule ----------------------------------------------------------------------------------------------------


def test_a_head_gets_what_its_scores_win() -> None:
    """Two heads of six entries, of which the last is certain; three entries a head."""
    rank = torch.tensor([[[9.0, 8, 7, 6, 0, 1e20], [5, 4, 3, 2, 1, 1e20]]])
    keep = torch.tensor([3])
    # four of the first head's entries win: 1 + 0.8·4 + 0.2·2 = 4.6, and 1 + 0.2·2 = 1.4 for the other
    assert Sharing(0.2).budgets(rank, rank > 1e19, keep).tolist() == [[5, 1]]
    assert Sharing(0.0).budgets(rank, rank > 1e19, keep).tolist() == [[5, 1]]
    assert Sharing(1.0).budgets(rank, rank > 1e19, keep).tolist() == [[3, 3]]
    # the best of each head is forced, which are the certain ones; the four best of the rest are the first head's
    assert Sharing(0.4, "forced").budgets(rank, rank > 1e19, keep).tolist() == [[5, 1]]
    assert Sharing(0.7, "forced").budgets(rank, rank > 1e19, keep).tolist() == [[4, 2]]


@pytest.mark.parametrize("form", ["capacity", "forced"])
def test_a_layers_sum_is_exact(form: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    rank = torch.rand(3, 5, 40, generator=generator) ** torch.tensor([1, 2, 3, 4, 5])[:, None]
    rank[1, :, :25] = -torch.inf  # padding
    certain = torch.arange(40).expand_as(rank) >= 36
    rank = rank.masked_fill(certain & (rank > -torch.inf), 1e20)
    for alpha in (0.0, 0.2, 0.33, 1.0):
        for keep in (1, 3, 4, 7, 15, 39):
            found = Sharing(alpha, form).budgets(rank, certain, torch.tensor([keep] * 3))
            assert found.sum(1).tolist() == [5 * keep] * 3
            assert (found >= min(4, keep) * (form == "capacity")).all()
