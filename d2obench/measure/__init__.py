"""Measurements: time, memory, energy, operators and the state of the machine.

* ``phases`` times a request, with ``clock`` and ``memory``; ``finite`` checks its logits. ``side_by_side`` measures
  windows of decode steps. ``samples`` holds the records of both, and ``summarise`` computes figures from them.
* Inside a request: ``counters`` counts operators, ``parts`` times each part, ``profiler`` runs torch.profiler.
* The machine: ``disturbance``, ``nvml``, ``roofline``, ``environment``, and ``checkup`` for ``d2obench doctor``.

Each module returns plain records; nothing here prints or judges. They import the cache, the models and the CPU runtime
below them, and are imported by ``tasks``, ``stats``, ``run``, ``gate`` and ``cli``.
"""
