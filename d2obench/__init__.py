"""d2obench: what a KV-cache policy buys on your model and hardware, and what it costs in quality.

``d2obench.cache("d2o", budget=0.2, model=model)`` is a cache for ``model.generate(cache=…)`` (``past_key_values=…``
in transformers before 5.24); see :func:`d2obench.cache.policy_cache.cache`. It is imported when it is asked for:
``import d2obench`` loads nothing else.

A map of the code. A room imports only rooms below it; a lint rule holds that::

    cli/            the commands and their options
    study/          studies of the project's own statistics: coverage, many gates, many runs of quick
    report/         a report as plain data, made of the records once and rendered in every format
    gate/           regression gates: base and head in turns, rules, verdicts, baselines, history
    bridges/        models for other tools: lm-evaluation-harness
    run/            planning, worker processes, rounds, engines (local, Ray, Slurm), resume
    tasks/          one file a quality task
    measure/        phases, clocks, memory, NVML, disturbance, roofline, environment, profiler
    external/       caches and engines that are not ours: transformers' own, kvpress, llama.cpp
    cache/          the policy cache, compression of a prompt, sessions, CUDA graphs
    attention/      attention over a prompt, and the way into transformers' models
    decode/         a decode step over slots: the PyTorch reference, compiled loops in cpu/, kernels in triton/
    slots/          keys and values in fixed slots, dense or quantised
    policies/       one file a policy; layer budgets; the rule of merging
    models/         loading: embedded, hub, local folder, GGUF, shapes with random weights
    cpu/            what compiled loops are written in; they run on PyTorch's own threads
    texts/          generated prose
    stats/          intervals, claims that need them, ratios, Pareto front
    suite/          strict TOML and the grammar of the axes
    compiler.py     whether Triton's kernels can be used on a device
    record.py       what a run leaves on the disk
    metric.py       the one table of metrics
    ranges.py       named ranges around parts of a step, for a profiler or a timer
    plugin.py       names to classes, built in or from other packages
    errors.py       one base class, exit codes

Why the comparison is fair: all policies, the full cache included, run through transformers' own model classes, one
attention and one decode loop. A compressed layer is a fixed tensor of slots, in which a new token overwrites the
evicted one, so decoding neither concatenates nor reallocates. Caches take turns while they are timed, and ratios are
paired. A policy that keeps more than it was asked to is flagged, and every row says what executed its decode steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2obench.cache.policy_cache import cache

__all__ = ["__version__", "cache"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "cache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("d2obench.cache")  # a package that can be called
