"""Studies of d2obench itself, for its authors: is a verdict of the gate right, and how often?

``faults`` are planted into a worker on purpose, ``trials`` are gates tried many times, ``gate`` runs and writes the
study of ``d2obench doctor --study``. Nothing but ``cli`` imports this package.
"""
