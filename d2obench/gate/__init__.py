"""Regression gates: two revisions measured in turns, or a run judged by a committed baseline.

``worktree`` checks out the revisions, ``arm`` is one side with its worker process, ``rounds`` measures both sides in
turns, and ``gate`` does all of this for a suite. ``rules`` has one rule for each kind of metric, and ``compare``
applies them to the figures of two cells or two runs. ``baseline`` holds the figures that a run is judged by, and
``verdict`` is the result.
"""
