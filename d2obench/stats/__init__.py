"""Statistics, without torch.

``intervals`` gives every figure an interval or a range. ``ratios`` compares two caches that were measured in turns.
``paired`` tests two sides on the same items. ``claims`` decides which words the intervals allow, such as faster, best
or met. The coverage of the intervals is simulated by :mod:`d2obench.study.coverage`.
"""
