"""Statistics of samples: bootstrap intervals, paired tests, Pareto fronts. Imports no torch."""
