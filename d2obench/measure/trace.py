"""The record of one measured request."""

from __future__ import annotations

import msgspec


class RequestTrace(msgspec.Struct):
    """Every raw value of one request. Times are in seconds and count from the start of prefill; memory is in bytes.

    Args:
        batch: sequences decoded together.
        gen: tokens that each sequence generated.
        prompt_tokens: tokens of all prompts together.
        ttft_s: time to the first token, with compression.
        prefill_s, compress_s: time of these phases.
        decode_s: time of all ``gen - 1`` decode steps: their sum, or the integral where only some were measured.
        e2e_s: the whole request.
        loop_s: time of the measured steps outside of the session.
        step_s: every measured decode step.
        marks: ``[t, phase]``, ending with the phase ``end``; ``token`` is when the first token was on the host.
        peaks: phase → metric → bytes.
        kv_bytes, kv_prompt_bytes: bytes of keys and values at the end, and right after the prompt.
        state_bytes: bytes of the policy's state.
        requested, effective: the share of the prompt that was asked for and that was kept.
        kept, held: entries of each layer and sequence after compression and at the end.
        over: whether these are more than asked for.
        merged, evicted: number of entries, over all layers.
        tokens_digest: identifies the generated tokens.
        merged_layers, evicted_layers: number of entries of each layer.
        step_at: the index of each step in ``step_s``; empty where all steps were measured.
        uss_bytes: memory that belongs to this process alone, after the request.
        flags: what disturbed or spoiled the request; set by the runner and by the measurement.
        remarks: why a GPU's faster path was not used.
        decode_path: what executed a decode step, in words.
        sampler_overhead: the share of one core that sampling took.
        sampled_s: the integrated decode time of a sampled run of the same request, made beside it.
        round, process, order: set by the runner: which round, in which worker process of the group (from 0), and the
            place in the round.
        timeline, device_timeline: rows ``[t, …]`` with the values of ``timeline_columns`` or ``device_columns``.
        timeline_columns, device_columns: the names of these values.
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
    decode_path: str = ""
    sampler_overhead: float | None = None
    sampled_s: float | None = None
    round: int = 0
    process: int = 0
    order: int = 0
    timeline: list[list[float | None]] = []
    timeline_columns: tuple[str, ...] = ()
    device_timeline: list[list[float | None]] = []
    device_columns: tuple[str, ...] = ()
