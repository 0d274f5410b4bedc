"""Raw rounds of one timed cell → its figures with intervals. Reads records only; never drops a sample.

Times are summarised over rounds (steps nested in their rounds), memory is the highest over rounds with the range as
its interval, and figures that must be exact are taken from the last round, with a flag where rounds differ.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from d2obench.measure.nvml import joules_per_token
from d2obench.measure.roofline import mbu, step_bytes
from d2obench.measure.trace import RequestTrace
from d2obench.record import Value
from d2obench.stats.bootstrap import interval, paired_ratio, percentile

_PEAKS = {
    "rss_peak_bytes": ("rss_bytes", None),
    "rss_prefill_bytes": ("rss_bytes", "prefill"),
    "rss_compress_bytes": ("rss_bytes", "compress"),
    "rss_decode_bytes": ("rss_bytes", "decode"),
    "alloc_requested_bytes": ("requested_bytes", None),
    "alloc_peak_bytes": ("allocated_bytes", None),
    "alloc_reserved_bytes": ("reserved_bytes", None),
    "alloc_prefill_bytes": ("allocated_bytes", "prefill"),
    "alloc_compress_bytes": ("allocated_bytes", "compress"),
    "alloc_decode_bytes": ("allocated_bytes", "decode"),
    "nvml_used_bytes": ("nvml_used_bytes", None),
    "nvml_process_bytes": ("nvml_process_bytes", None),
}
"""Metric → the key of ``RequestTrace.peaks`` and the phase; None is all phases."""
_EXACT = ("kv_bytes", "kv_prompt_bytes", "state_bytes", "kept", "held", "merged", "evicted", "tokens_digest")
_TIMES = ("ttft_s", "prefill_s", "compress_s", "e2e_s")
_AMOUNT = re.compile(r" \(?\d.*")


class Machine(NamedTuple):
    """What the figures need to know beside the rounds; None where it was not measured.

    Args:
        weights_bytes: storage of the model's weights.
        read_bytes: the part a decode step reads, see ``roofline.read_weights_bytes``.
        bandwidth: copy bandwidth of the device in this run, bytes per second.
        idle_w: power of the idle GPU.
    """

    weights_bytes: int
    read_bytes: int | None = None
    bandwidth: float | None = None
    idle_w: float | None = None


class Summary(NamedTuple):
    """Figures by metric key, words every view must show, and what only some views use."""

    values: dict[str, Value]
    flags: tuple[str, ...]
    details: dict[str, Any]


def summarise(name: str, rounds: Sequence[RequestTrace], machine: Machine) -> Summary:
    """The figures of a cell.

    Args:
        name: the cell's id; it seeds the resampling.
        rounds: at least one, in order, the disturbed ones among them.
        machine: see :class:`Machine`.
    """
    last = rounds[-1]
    values = {
        **_latency(name, rounds),
        **_throughput(name, rounds),
        **_budget(last),
        **_memory(rounds, machine),
        **_against_machine(name, rounds, machine),
        **_sampling(name, rounds),
    }
    details: dict[str, Any] = {"kept_layers": [fmean(layer) for layer in last.kept if layer], "rounds": len(rounds)}
    if last.decode_path:
        details["decode_path"] = last.decode_path
    if last.evicted:
        details |= {"merged_layers": last.merged_layers, "evicted_layers": last.evicted_layers}
    return Summary(values, tuple(_flags(rounds)), details)


def tpot(name: str, rounds: Sequence[RequestTrace]) -> Value:
    """The median decode step with its interval; what decides whether more rounds are needed."""
    steps = [one.step_s for one in rounds if one.step_s]
    if not steps:
        return Value(None, note="one token has no decode step")
    note = "sampled decode" if rounds[-1].step_at else ""
    return Value(*interval(steps, seed=f"{name}:tpot_s"), n=sum(map(len, steps)), note=note)


def narrowness(name: str, rounds: Sequence[RequestTrace]) -> float:
    """Half the width of the TPOT interval ÷ its value; infinite where there is no interval yet."""
    found = tpot(name, rounds)
    if not found.value or found.lo is None or found.hi is None:
        return math.inf
    return (found.hi - found.lo) / 2 / found.value


def traces(rounds: Iterable[Mapping[str, Any]]) -> list[RequestTrace]:
    """Rounds as a run keeps them (``samples/<hash>.json``) → records."""
    return [msgspec.convert(one, RequestTrace) for one in rounds]


def _latency(name: str, rounds: Sequence[RequestTrace]) -> dict[str, Value]:
    found = {key: _timed(name, key, [getattr(one, key) for one in rounds]) for key in _TIMES}
    found["tpot_s"] = tpot(name, rounds)
    steps = [one.step_s for one in rounds if one.step_s]
    for key, q in (("tpot_p95_s", 0.95), ("tpot_p99_s", 0.99)) if steps else ():
        count, bounds = sum(map(len, steps)), percentile(steps, q, seed=f"{name}:{key}")
        refused = f"{count} steps can't carry a p{q * 100:.0f}"
        found[key] = Value(*bounds, n=count) if bounds else Value(None, n=count, note=refused)
    return found


def _throughput(name: str, rounds: Sequence[RequestTrace]) -> dict[str, Value]:
    rates: dict[str, Callable[[RequestTrace], tuple[float, float]]] = {
        "prefill_tok_s": lambda one: (one.prompt_tokens, one.prefill_s),
        "decode_tok_s": lambda one: (one.batch * (one.gen - 1), one.decode_s),
        "e2e_tok_s": lambda one: (one.batch * one.gen, one.e2e_s),
    }
    found = {}
    for key, rate in rates.items():
        pairs = [rate(one) for one in rounds]
        samples = [tokens / seconds for tokens, seconds in pairs if tokens > 0 and seconds > 0]
        if samples:
            found[key] = _timed(name, key, samples)
    both = [(one.decode_s, one.sampled_s) for one in rounds if one.sampled_s and one.decode_s > 0]
    if both:
        true, integrated = zip(*both, strict=True)
        error = paired_ratio(true, integrated, seed=f"{name}:sampled_error")
        found["sampled_error"] = Value(*error, n=len(both))
    measured = [(one.loop_s, sum(one.step_s)) for one in rounds if one.step_s]
    if measured:
        found["loop_overhead"] = _timed(name, "loop_overhead", [loop / steps for loop, steps in measured if steps > 0])
    return found


def _budget(last: RequestTrace) -> dict[str, Value]:
    layers = max(1, len(last.held))
    found = {
        "budget_effective": Value(last.effective),
        "budget_held": Value(sum(map(sum, last.held)) / (layers * last.prompt_tokens)),
        "kv_bytes": Value(last.kv_bytes),
        "kv_prompt_bytes": Value(last.kv_prompt_bytes),
        "state_bytes": Value(last.state_bytes),
    }
    if last.evicted:
        found["merged"] = Value(last.merged / last.evicted)
    return found


def _memory(rounds: Sequence[RequestTrace], machine: Machine) -> dict[str, Value]:
    found = {"weights_bytes": Value(machine.weights_bytes)}
    for metric, (key, phase) in _PEAKS.items():
        peaks = [peak for one in rounds if (peak := _peak(one, key, phase)) is not None]
        if peaks:
            found[metric] = _highest(peaks)
    unique = [one.uss_bytes for one in rounds if one.uss_bytes is not None]
    if unique:
        found["uss_decode_bytes"] = _highest(unique)
    on_gpu = "alloc_peak_bytes" in found
    highest = found.get("alloc_peak_bytes") or found.get("rss_peak_bytes")
    if highest and highest.value:
        kv = max(max(one.kv_bytes, one.kv_prompt_bytes) for one in rounds)
        note = "" if on_gpu else "the interpreter and its libraries are in it"
        found["workspace_bytes"] = Value(max(0.0, highest.value - machine.weights_bytes - kv), n=highest.n, note=note)
    return found


def _against_machine(name: str, rounds: Sequence[RequestTrace], machine: Machine) -> dict[str, Value]:
    found: dict[str, Value] = {}
    last = rounds[-1]
    if machine.read_bytes is not None:
        kept, held = (sum(map(sum, rows)) for rows in (last.kept, last.held))
        moved = step_bytes(machine.read_bytes, last.kv_bytes, kept, held)
        found["step_bytes"] = Value(moved)
        step = tpot(name, rounds)
        if machine.bandwidth and step.value:
            value, lo, hi = (mbu(moved, t, machine.bandwidth) if t else None for t in (step.value, step.hi, step.lo))
            found["mbu"] = Value(value, lo, hi, step.n)
    if any(one.device_timeline for one in rounds):
        per_token = [_energy(one, machine.idle_w) for one in rounds]
        known = [value for value in per_token if value is not None]
        note = "" if known else "only a part was run" if last.step_at else "too short to tell, or no power known"
        found["energy_j_tok"] = _timed(name, "energy_j_tok", known) if known else Value(None, note=note)
    return found


def _sampling(name: str, rounds: Sequence[RequestTrace]) -> dict[str, Value]:
    known = [one.sampler_overhead for one in rounds if one.sampler_overhead is not None]
    return {"sampler_overhead": _timed(name, "sampler_overhead", known)} if known else {}


def _energy(one: RequestTrace, idle_w: float | None) -> float | None:
    if one.step_at:
        return None
    return joules_per_token(one.device_timeline, 0.0, one.marks[-1][0], one.batch * one.gen, idle_w)


def _flags(rounds: Sequence[RequestTrace]) -> Iterator[str]:
    last = rounds[-1]
    yield from last.remarks
    if last.step_at:
        yield "sampled decode"
    if any(one.over for one in rounds):
        yield "keeps more than asked"
    different = [key for key in _EXACT if any(getattr(one, key) != getattr(last, key) for one in rounds)]
    if different:
        yield f"differs between rounds: {', '.join(different)}"
    flagged = [one.flags for one in rounds if one.flags]
    if flagged:
        kinds = Counter(kind for flags in flagged for kind in {_AMOUNT.sub("", flag) for flag in flags})
        yield f"{len(flagged)} of {len(rounds)} rounds: {', '.join(kind for kind, _ in kinds.most_common(3))}"


def _timed(name: str, key: str, samples: Sequence[float]) -> Value:
    return Value(*interval(samples, seed=f"{name}:{key}"), n=len(samples))


def _highest(peaks: Sequence[int]) -> Value:
    several = len(peaks) > 1
    return Value(max(peaks), min(peaks) if several else None, max(peaks) if several else None, len(peaks))


def _peak(one: RequestTrace, key: str, phase: str | None) -> int | None:
    phases = one.peaks.values() if phase is None else [one.peaks.get(phase, {})]
    return max((peaks[key] for peaks in phases if key in peaks), default=None)
