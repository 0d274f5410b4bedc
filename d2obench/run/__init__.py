"""Runs suites: checks and plans them, measures their cells in worker processes, and writes what survives a kill.

``check`` and ``plan`` say what runs, ``schedule`` how much of it in the time there is, ``engines`` where. ``runner``
measures one group of cells, ``speed`` the timed ones. ``worker`` is the other process, ``worker_client`` talks to it.
``run_log`` and ``run_folder`` write what comes out. Only ``bridges``, ``gate``, ``report`` and ``cli`` import this.
"""
