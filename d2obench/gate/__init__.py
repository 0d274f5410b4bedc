"""Regression gates: two revisions measured in turns, or a run judged by a committed baseline; and their history.

``worktree`` checks out the revisions, ``environments`` makes what each is imported from, ``arm`` is one side with its
worker process, ``rounds`` measures both sides in turns, ``sides`` compares them cell by cell, and ``gate`` does all of
this for a suite; ``command`` compares what a command of the user's writes instead. ``rules`` has one rule for each kind
of metric, and ``compare`` applies them to the figures of two cells or two runs. ``baseline`` holds the figures that a
run is judged by, and ``verdict`` is the result. ``history`` keeps figures over time, and ``setup`` writes a suite and a
workflow for a repository.
"""
