"""What one decode step does over slots: attention, scores, eviction and the merge of what was evicted.

``state`` holds the tensors and the PyTorch reference; ``cpu`` and ``triton`` are compiled forms of the same step.
Imported by ``cache`` and above; imports ``slots``, ``policies`` and ``cpu``.
"""
