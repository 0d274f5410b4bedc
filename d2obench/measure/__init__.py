"""Measurements: time, memory, energy, operators and the state of the machine.

Each module measures one thing and returns plain records; nothing here prints or judges. Modules import the cache, the
models and the CPU runtime below them, and are imported by ``tasks``, ``run``, ``gate``, ``bridges`` and ``cli``.
"""
