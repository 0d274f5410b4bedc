"""Quantised slots against a naive float64 quantiser, number by number; bytes; what a write may touch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_families import prompts, tiny_model
from torch import Tensor

from d2obench.cache import Session
from d2obench.slots.quantised import GROUP, QuantStore

ROWS, DIM = 3, 64


def naive(numbers: np.ndarray, bits: int, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Asymmetric quantisation of one group, scale and zero point in float16."""
    low = float(numbers.min()) if low is None else low
    high = float(numbers.max()) if high is None else high
    scale = float(np.float16(max((high - low) / (2**bits - 1), 1e-7)))
    zero = float(np.float16(low))
    codes = np.clip(np.round((numbers - zero) / scale), 0, 2**bits - 1)
    return codes * scale + zero


def store(capacities: list[int], bits: int, grows: bool, dtype: torch.dtype = torch.float32) -> QuantStore:
    return QuantStore(capacities, ROWS, (DIM, DIM), dtype, torch.device("cpu"), bits, grows)


def some(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(ROWS, count, DIM, generator=generator)
    keys[..., 3] = keys[..., 3] * 4 + 20  # a channel of outliers, as keys have
    return keys, torch.randn(ROWS, count, DIM, generator=generator)


def step_apart(found: np.ndarray, expected: np.ndarray, span: float, bits: int) -> bool:
    """Equal, but for numbers within float32 rounding of the edge between two codes."""
    wrong = np.abs(found - expected) > 1e-4 * max(1.0, span)
    return wrong.mean() < 1e-3 and np.abs(found - expected).max() <= 1.01 * span / (2**bits - 1) + 1e-6


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_values_are_quantised_per_token_in_groups_of_channels(bits: int) -> None:
    held = store([50], bits, grows=False)
    keys, values = some(40)
    held.fill(0, keys, values)
    found = held.values(0).double().numpy()
    for row in range(ROWS):
        for slot in range(40):
            for first in range(0, DIM, 32):
                part = values[row, slot, first : first + 32].double().numpy()
                expected = naive(part, bits)
                assert step_apart(found[row, slot, first : first + 32], expected, float(np.ptp(part)), bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_keys_are_quantised_per_channel_in_groups_of_slots(bits: int) -> None:
    held = store([100], bits, grows=False)
    keys, values = some(80)
    held.fill(0, keys, values)
    found = held.keys(0).double().numpy()
    numbers = keys.double().numpy()
    for row in range(ROWS):
        for channel in range(DIM):
            column = numbers[row, :, channel]
            for first, last in ((0, 32), (32, 64), (64, 80)):
                scope = column[first:last] if last - first == GROUP else column[-GROUP:]
                expected = naive(column[first:last], bits, float(scope.min()), float(scope.max()))
                assert step_apart(found[row, first:last, channel], expected, float(np.ptp(scope)), bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_growing_cache_keeps_its_last_group_exact_and_then_quantises_it(bits: int) -> None:
    """Groups end where the prompt ends, so a first group may be short."""
    held = store([150, 150], bits, grows=True)
    keys, values = some(110)
    for layer in (0, 1):
        held.fill(layer, keys[:, :45], values[:, :45])
    for slot in range(45, 110):
        for layer in (0, 1):
            held.write(layer, held.base[layer] + slot, keys[:, slot], values[:, slot])
    assert held.filled == [110, 110]
    found = held.keys(1).double().numpy()
    numbers = keys.double().numpy()
    for row in range(ROWS):
        for channel in (0, 3, 63):
            for first, last in ((0, 13), (13, 45), (45, 77), (77, 109)):
                column = numbers[row, first:last, channel]
                assert step_apart(found[row, first:last, channel], naive(column, bits), float(np.ptp(column)), bits)
    assert torch.equal(held.keys(1)[:, 109], keys[:, 109])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_write_within_the_range_of_its_group_touches_nothing_else(bits: int) -> None:
    held = store([40, 70], bits, grows=False)
    keys, values = some(70)
    held.fill(0, keys[:, :40], values[:, :40])
    held.fill(1, keys, values)
    before = [(held.keys(layer).clone(), held.values(layer).clone()) for layer in (0, 1)]
    slots = torch.tensor([5, 39, 12])
    firsts = [slot // GROUP * GROUP for slot in slots.tolist()]
    group = [held.keys(1)[row, first : first + GROUP] for row, first in enumerate(firsts)]
    low, high = torch.stack([part.amin(0) for part in group]), torch.stack([part.amax(0) for part in group])
    fresh_keys, fresh_values = low + (high - low) * 0.37, values[:, 20] * 3
    held.write(1, held.base[1] + slots, fresh_keys, fresh_values)
    assert torch.equal(held.keys(0), before[0][0])
    assert torch.equal(held.values(0), before[0][1])
    changed = torch.zeros(ROWS, 70, dtype=torch.bool)
    changed[torch.arange(ROWS), slots] = True
    assert torch.equal(held.keys(1)[~changed], before[1][0][~changed])
    assert torch.equal(held.values(1)[~changed], before[1][1][~changed])
    written = held.keys(1)[torch.arange(ROWS), slots]
    assert ((written - fresh_keys).abs() <= (high - low) / (2**bits - 1) * 0.51 + 1e-6).all()
    assert torch.equal(held.read_keys(held.base[1] + slots), held.keys(1)[torch.arange(ROWS), slots])
    assert torch.equal(held.read_values(held.base[1] + slots), held.values(1)[torch.arange(ROWS), slots])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_write_outside_the_range_widens_it(bits: int) -> None:
    """After many writes in a range that keeps drifting, numbers are within a few steps of what was written."""
    held = store([70], bits, grows=False)
    keys, values = some(70)
    held.fill(0, keys, values)
    true, generator = keys.clone(), torch.Generator().manual_seed(3)
    for step in range(300):
        slot = torch.randint(0, 70, (ROWS,), generator=generator)
        fresh = torch.randn(ROWS, DIM, generator=generator) * (1 + step / 100) + step / 50
        true[torch.arange(ROWS), slot] = fresh
        held.write(0, held.base[0] + slot, fresh, fresh)
    scale = held.groups.of(held.key_ranges, 0)[:, :, 0].float().repeat_interleave(GROUP, 1)[:, :70]
    assert ((held.keys(0) - true).abs() / scale).max() < 4
    assert ((held.keys(0) - true).abs() / scale).mean() < 0.5


def test_entries_that_mean_nothing_set_no_range() -> None:
    keys, values = some(40)
    real = torch.ones(ROWS, 40, dtype=torch.bool)
    real[1, 30:] = False
    spoilt = keys.masked_fill(~real[..., None], 1e4)
    clean, dirty = store([41], 4, grows=False), store([41], 4, grows=False)
    clean.fill(0, keys, values, real)
    dirty.fill(0, spoilt, values, real)
    assert torch.equal(clean.keys(0)[:, :40][real], dirty.keys(0)[:, :40][real])


@pytest.mark.parametrize("grows", [True, False])
def test_snapshots_extensions_and_zeros(grows: bool) -> None:
    held = store([64, 40], 4, grows)
    keys, values = some(40)
    held.fill(0, keys, values)
    held.fill(1, torch.zeros_like(keys), torch.zeros_like(values))
    assert (held.keys(1) == 0).all()
    assert (held.values(1) == 0).all()
    saved, before = held.snapshot(), held.keys(0).clone()
    held.write(0, held.base[0] + 40, keys[:, 0], values[:, 0])
    larger = held.extended(10)
    assert larger.capacities == [74, 50]
    assert torch.equal(larger.keys(0)[:, :41], held.keys(0)[:, :41])
    assert torch.equal(larger.values(0)[:, :41], held.values(0)[:, :41])
    held.restore(saved)
    assert torch.equal(held.keys(0)[:, :40], before[:, :40])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_storage_is_really_packed(bits: int) -> None:
    held = store([320], bits, grows=False, dtype=torch.bfloat16)
    numbers = ROWS * 320 * DIM
    codes, ranges = 2 * numbers * bits // 8, 2 * (numbers // GROUP) * 2 * 2
    assert held.bytes == codes + ranges
    assert held.bytes / (2 * numbers * 2) == (bits + 1) / 16, "of bfloat16, with one bit a number for the ranges"


def test_groups_of_a_shorter_sequence_are_its_own() -> None:
    """In a growing cache a shorter sequence stands on the right, so its groups end where they would end alone."""
    model, texts = tiny_model("llama-gqa2"), prompts(120, 60)

    def logits(given: list[list[int]]) -> Tensor:
        session = Session(model, "snapkv(window=4)+quant", "0.5", max_new=3)
        session.prefill(given)
        session.compress()
        return session.step(torch.tensor([7] * len(given)))

    assert (logits(texts)[1] - logits(texts[1:])[0]).abs().max() < 0.01


def test_kv_bytes_of_a_session_show_it() -> None:
    model = tiny_model("llama-gqa4", "bfloat16")
    sizes = {}
    for policy in ("full", "quant(bits=8)", "quant(bits=4)", "h2o", "h2o+quant"):
        budget = "0.2" if "h2o" in policy else None
        session = Session(model, policy, budget, max_new=4)
        session.prefill(prompts(500))
        session.compress()
        sizes[policy] = session.footprint().kv_bytes
    assert 0.5 < sizes["quant(bits=8)"] / sizes["full"] < 0.65
    assert 0.3 < sizes["quant(bits=4)"] / sizes["full"] < 0.4
    assert 0.3 < sizes["h2o+quant"] / sizes["h2o"] < 0.36
