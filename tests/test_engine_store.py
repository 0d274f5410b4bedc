"""The storage of slots: a layout must not be seen from outside."""

from __future__ import annotations

import torch

from d2obench.engine.slots import DenseStore
from d2obench.engine.transposed import TransposedStore

CAPACITIES, ROWS, WIDTHS = [5, 3, 7], 4, (6, 2)


def filled(kind):
    """A store after every kind of access, each over given numbers."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    parts = [[numbers(ROWS, n - 1, width) for n in CAPACITIES] for width in WIDTHS]
    store = kind(CAPACITIES, ROWS, WIDTHS, torch.float32, torch.device("cpu"), parts)
    for layer, capacity in enumerate(CAPACITIES):
        slots = torch.randint(0, capacity, (ROWS,), generator=generator)
        store.write(layer, store.base[layer] + slots, numbers(2, 2, 1, WIDTHS[0]), numbers(2, 2, 1, WIDTHS[1]))
    index = store.base + torch.tensor([[4], [2], [6]])
    store.write_keys(index, numbers(*index.shape, WIDTHS[0]))
    store.write_values(index[1], numbers(ROWS, WIDTHS[1]))
    saved = store.snapshot()
    store.repeat([1, 1, 2], 2)
    repeated = [store.keys(layer).clone() for layer in range(3)]
    store.restore(saved)
    larger = store.extended(3)
    return store, larger, repeated, (store.read_keys(index), store.read_values(index[0]))


def test_both_layouts_hold_the_same():
    (rows, more_rows, *said), (lanes, more_lanes, *same) = filled(DenseStore), filled(TransposedStore)
    for one, other in ((rows, lanes), (more_rows, more_lanes)):
        for layer in range(3):
            assert torch.equal(one.keys(layer), other.keys(layer))
            assert torch.equal(one.values(layer), other.values(layer))
        assert one.bytes == other.bytes
    for repeated, again in zip(said[0], same[0], strict=True):
        assert torch.equal(repeated, again)
    assert all(torch.equal(read, too) for read, too in zip(said[1], same[1], strict=True))


def test_a_product_with_the_queries_reads_slots_side_by_side():
    store = filled(TransposedStore)[0]
    assert store.keys(0).transpose(1, 2).is_contiguous()
