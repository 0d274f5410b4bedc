"""The decode step on a CPU as compiled loops. Imported by ``decode`` alone."""
