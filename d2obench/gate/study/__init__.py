"""A study of the gate itself: faults planted on purpose, many gates in a row. For the project, not for users."""
