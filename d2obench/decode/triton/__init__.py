"""The decode step on a GPU as Triton kernels: ``attend`` for attention, ``update`` for what happens between two steps,
``merge`` for D2O's merge in both. Imported by ``decode`` and ``attention``. Importing this package imports neither
Triton nor a kernel."""

WIDEST = 256
"""Most channels of a head: a block of them must fit shared memory."""
