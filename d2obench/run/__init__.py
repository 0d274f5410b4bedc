"""Runs suites: checks and plans them, measures their cells in worker processes, and writes rows and samples.

The way of a run through these modules:

1. ``check`` finds what is wrong with the suite, and ``plan`` lists its cells and groups them.
2. ``runner`` measures group after group on this machine, or ``ray_engine`` on a cluster (``ray_cluster``,
   ``ray_device``); ``slurm`` writes a script whose tasks run shards. ``schedule`` cuts rounds and items where the time
   is limited, using ``predict``.
3. ``speed`` measures a group of timed cells in requests and ``speed_windows`` in windows of decode steps; ``speed_row``
   makes the rows.
4. ``worker`` is the process that does the work; its operations without a model are in ``worker_machine``.
   ``worker_client`` starts it and talks to it, with the threads that ``openmp_wait`` sets. ``isolated_workers`` are for
   other libraries, ``tensor_parallel`` lets several processes share one model.
5. ``run_folder`` writes everything to the disk, and ``progress`` tells the display.

Only ``gate``, ``study`` and ``cli`` import this package.
"""
