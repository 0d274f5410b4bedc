"""Attention over a prompt, and the integration into transformers' model classes.

``interface`` registers our attention with transformers, ``families`` lists the model families that are served, and
``prompt`` computes causal attention with the statistics that policies need. Imported by ``cache``, ``external`` and
above; imports ``decode``'s Triton helpers, ``policies`` and ``models``.
"""
