"""Regression gates: two revisions measured in turns, the rules that judge their figures, baselines, and verdicts."""
