"""The record of one measured request."""

from __future__ import annotations

import msgspec


class RequestTrace(msgspec.Struct):
    """Every raw value of one request; times in seconds, memory in bytes.

    ``marks`` are ``[t, phase]`` from the start of prefill, ending with ``end``; ``token`` is the first token's.
    ``step_at`` are the indices of the decode steps in ``step_s`` and empty where all were measured. ``decode_s`` is
    the time of all ``gen - 1`` steps: their sum, or the integral where sampled. ``loop_s`` is the part of the measured
    steps outside the session. ``peaks`` is phase → metric → bytes. ``kept`` and ``held`` are tokens per layer and
    sequence after compression and at the end; ``over`` says that they are more than asked. ``merged`` and ``evicted``
    count entries of all layers, ``merged_layers`` and ``evicted_layers`` those of each. ``timeline`` rows are
    ``[t, …timeline_columns]``, ``device_timeline`` likewise; ``sampler_overhead`` is the share of one core that
    taking them cost. ``sampled_s`` is the decode time to which a sampled run of the same request, made beside it,
    integrates. ``remarks`` tell what of a GPU's fast path the
    session went without. ``round``, ``order`` and ``flags`` are set by the runner; flags also say what went wrong here.
    """

    batch: int
    gen: int
    prompt_tokens: int
    ttft_s: float
    prefill_s: float
    compress_s: float
    decode_s: float
    e2e_s: float
    loop_s: float
    step_s: list[float]
    marks: list[tuple[float, str]]
    peaks: dict[str, dict[str, int]]
    kv_bytes: int
    kv_prompt_bytes: int
    state_bytes: int
    requested: float | None
    effective: float
    kept: list[list[float]]
    held: list[list[float]]
    over: bool
    merged: int
    evicted: int
    tokens_digest: str
    merged_layers: list[int] = []
    evicted_layers: list[int] = []
    step_at: list[int] = []
    uss_bytes: int | None = None
    flags: list[str] = []
    remarks: list[str] = []
    sampler_overhead: float | None = None
    sampled_s: float | None = None
    round: int = 0
    order: int = 0
    timeline: list[list[float | None]] = []
    timeline_columns: tuple[str, ...] = ()
    device_timeline: list[list[float | None]] = []
    device_columns: tuple[str, ...] = ()
