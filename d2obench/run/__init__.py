"""Runs suites: checks and plans, a worker process per device, interleaved groups, records that survive a kill."""
