"""Regression gates: base and head measured in turns, the rules that judge them, baselines, verdicts.

Imported by ``report`` and ``cli``; imports ``run``.
"""
