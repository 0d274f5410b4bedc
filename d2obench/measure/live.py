"""Storage of every tensor that is alive: what a kept reference costs, whoever keeps it."""

from __future__ import annotations

import gc

import torch


def live_bytes() -> int:
    """Bytes of all tensor storages that Python can reach, each counted once, on all devices.

    Take it before and after: the difference holds the cache, the policy's state and whatever else was kept, such as a
    forgotten reference to the prompt's full keys. It is exact, where a resident set hides a few MiB.
    """
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            try:
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # a tensor without storage of its own
                continue
    storages.pop(0, None)
    return sum(storages.values())
