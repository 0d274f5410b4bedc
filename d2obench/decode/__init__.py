"""What one decode step does over slots: attention, scores, eviction and the merge of what was evicted.

``state`` holds the tensors and the sequence of a step; ``backend`` chooses who executes it: ``reference`` (PyTorch
operators, with ``merge`` for D2O), ``cpu`` (compiled loops) or ``triton`` (kernels). Imported by ``cache`` and above;
imports ``slots``, ``policies`` and ``cpu``.
"""
