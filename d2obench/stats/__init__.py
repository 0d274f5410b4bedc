"""Statistics, without torch: what the samples can carry, and what may be said because of it.

``intervals`` gives every figure its interval or range, ``claims`` decides which words and marks they allow, ``paired``
tests two arms on the same items, ``coverage`` shows by simulation that the intervals hold what they say. The package
imports the record and the metric table alone; everything from ``tasks`` and ``measure`` upwards may import it.
"""
