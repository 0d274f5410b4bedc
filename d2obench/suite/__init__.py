"""What is asked for: the TOML of a suite, the grammar of its axes, its targets. Imports no torch."""
