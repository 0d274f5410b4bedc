"""Studies of d2obench itself: how often its verdicts, sentences and intervals are right.

``coverage`` simulates how often an interval contains the true value. ``gate`` tries the gate's rule for timed figures
many times, ``repository`` tries whole gates of a repository whose changes are known, and ``faults`` holds the faults
that are put into a worker to test a gate. ``quick`` counts the false sentences of the first command on a busy machine.
Only ``cli`` imports this package.
"""
