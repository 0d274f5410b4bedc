"""Prompts of a batch that are read in groups of sequences, one after the other.

If layers are compressed together, the full keys and values of all of them exist until a prompt ends. Each group is read
by a cache of its own and compressed before the next one is read, so that only one group's full entries exist at a time;
what the groups keep is then brought together in the slots of the whole batch. A sequence is treated as if the batch had
been read together: budgets, ranks and merges look at one sequence at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2obench.slots.dense import CLOSED

if TYPE_CHECKING:
    from d2obench.cache.compress import Packing

BEFORE = {"threshold": -torch.inf}
"""What decoding begins with where nothing was evicted, if it is not 0."""


def joined(parts: Sequence[Packing]) -> Packing:
    """The sequences of several packings in one, in their order; its ``finish`` makes the slots of all of them.

    Args:
        parts: every layer was added to each of them, and none has slots; they are used up.
    """
    # 1. sizes: as many slots as the largest needs
    found = copy.copy(parts[0])
    found.layout = replace(parts[0].layout, batch=sum(part.layout.batch for part in parts))
    found.lengths, found.budgets = torch.cat([p.lengths for p in parts]), torch.cat([p.budgets for p in parts], 1)
    found.sizes = [max(sizes) for sizes in zip(*(part.sizes for part in parts), strict=True)]
    found.prompts = [max(counts) for counts in zip(*(part.prompts for part in parts), strict=True)]
    found.position, found.memory, found.scores = [], [], []
    found._merged, found._evicted, found._waiting = [], [], [[], [], []]
    shapes = [(part.layout.batch, part.layout.heads) for part in parts]
    for layer, (size, count) in enumerate(zip(found.sizes, found.prompts, strict=True)):
        # 2. what is known of the entries; a group that lost nothing in a layer has no thresholds or biases there
        found.position.append(torch.cat([_wider(part.position[layer], size, value=CLOSED) for part in parts]))
        found._merged.append(sum(part._merged[layer] for part in parts))
        found._evicted.append(sum(part._evicted[layer] for part in parts))
        found.memory.append(_together([part.memory[layer] for part in parts], shapes))
        wide = [{name: _wider(held, count) for name, held in part.scores[layer].items()} for part in parts]
        found.scores.append(_together(wide, [(*shape, count) for shape in shapes]))
        # 3. the entries themselves; those of the parts are freed as they are copied
        for column, held in enumerate(found._waiting):
            entries = [part._waiting[column].pop(0) for part in parts]
            if column == 2 or not found.ragged:  # where heads differ in size, entries are not padded
                entries = [_wider(one, count, dim=1) for one in entries]
            held.append(torch.cat(entries))
    return found


def _together(parts: Sequence[dict[str, Tensor]], shapes: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of several groups in one for each name; a group without one gets its beginning, in its shape."""
    found = {}
    for name, example in {name: held for part in parts for name, held in part.items()}.items():
        missing = BEFORE.get(name, 0.0)
        found[name] = torch.cat(
            [
                part[name] if name in part else example.new_full(shape, missing)
                for part, shape in zip(parts, shapes, strict=True)
            ]
        )
    return found


def _wider(held: Tensor, size: int, dim: int = -1, value: float = 0) -> Tensor:
    """``held`` with ``value`` behind it, up to a size along a dimension."""
    missing = size - held.shape[dim]
    behind = [0, 0] * ((held.dim() - 1 - dim) % held.dim()) + [0, missing]
    return pad(held, behind, value=value) if missing else held
