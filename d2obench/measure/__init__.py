"""Measurements: time, memory, energy, operators and the state of the machine.

* One request: ``phases`` times it, with ``clock`` and ``memory``; ``finite`` checks its logits. Windows of decode steps:
  ``side_by_side``. What both leave is in ``samples``, and ``summarise`` computes figures from it.
* Inside a request: ``counters`` counts operators, ``parts`` times each part, ``profiler`` runs torch.profiler.
* The machine: ``disturbance``, ``nvml``, ``roofline``, ``environment``, and ``checkup`` for ``d2obench doctor``.

Each module returns plain records; nothing here prints or judges. They import the cache, the models and the CPU runtime
below them, and are imported by ``tasks``, ``stats``, ``run``, ``gate``, ``study``, ``report`` and ``cli``.
"""
