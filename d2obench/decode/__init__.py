"""One decode step over slots: attention, scores, eviction, and the merge of the evicted entry.

``state`` holds the tensors and the order of operations of a step. ``backend`` picks the code that executes it:
``reference`` (PyTorch operators, with ``rules`` for each kind of rule, ``merge`` for D2O's merge and ``mass`` for the
merge by mass), ``cpu`` (compiled loops) or ``triton`` (GPU kernels). This package is imported by ``cache`` and
everything above it; it imports ``slots``, ``policies`` and ``cpu``.

To add a policy with a kind of decode rule of its own, compiled for a CPU, three files are touched:

1. the policy's file: the rule as a dataclass derived from :class:`d2obench.policies.rules.DecodeRule`;
2. ``rules``: the rule in PyTorch operators, a class and its entry in the table ``STEPS``. The rule now runs everywhere;
   results say that PyTorch operators do it between steps;
3. ``cpu/update``: a branch of the loop, and the rule's entry in the table ``RULES`` there; its fields reach the loop by
   their names. ``triton/update`` is where a kernel would follow.

If the policy is in ``tests/test_conformance.py``, beside a slow model of it in ``tests/reference``, every backend that
executes it is compared with that model.
"""
