"""Studies of d2obench itself, for its authors: are its verdicts, sentences and intervals right, and how often?

``faults`` are planted into a worker on purpose, ``trials`` are gates tried many times, ``gate`` runs and writes the
study of ``d2obench doctor --study``; ``quick`` asks whether the first command tells the truth on a busy machine, and
``coverage`` whether the intervals hold what they say. Nothing but ``cli`` imports this package.
"""
