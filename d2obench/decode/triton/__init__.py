"""The decode step on a GPU as Triton kernels: ``attend`` for attention, ``update`` for what happens between two steps,
``merge`` for D2O's merge in both. Imported by ``decode`` and ``attention``. Importing this package imports neither
Triton nor a kernel."""

WIDEST = 256
"""Largest supported head dimension: a block of keys must fit shared memory."""
MOST_QUERIES = 31
"""Largest number of query heads that share a KV head: with D2O's evictee they are the rows of one product, whose sums
must fit a program's registers."""
