"""Storage of keys and values in fixed slots: ``dense`` in the model's dtype, ``ragged`` likewise for KV heads that hold
different numbers of entries (``spans``), ``quantised`` in 8, 4 or 2 bits for both kinds of heads.

Imported by ``decode`` and above; imports ``policies`` and ``cpu``.
"""
