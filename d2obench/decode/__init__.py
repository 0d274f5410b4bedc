"""One decode step over slots: attention, scores, eviction, and the merge of the evicted entry.

``state`` holds the tensors and the order of operations of a step. ``backend`` picks the code that executes it:
``reference`` (PyTorch operators, with ``merge`` for D2O), ``cpu`` (compiled loops) or ``triton`` (GPU kernels). This
package is imported by ``cache`` and everything above it; it imports ``slots``, ``policies`` and ``cpu``.
"""
