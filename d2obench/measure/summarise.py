"""Computes the figures of one timed cell, with intervals, from its rounds and windows.

Times are medians over rounds; those of decode steps over windows, where the cell has any. Disturbed rounds and windows
are left out, and the flags say how many. Memory is the highest of all rounds, and its bounds are the range over them.
Figures that must be the same in every round are taken from the last one, with a flag where rounds differ.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from d2obench.measure.disturbance import is_disturbance, undisturbed
from d2obench.measure.nvml import joules_per_token
from d2obench.measure.roofline import mbu, step_bytes
from d2obench.measure.samples import Decoded, RequestTrace
from d2obench.record import Value
from d2obench.stats.intervals import highest, median, paired_ratio, percentile

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
    """Facts about model and device that some figures need; None where they were not measured.

    Args:
        weights_bytes: storage of the model's weights.
        read_bytes: bytes of them that a decode step reads, see ``roofline.read_weights_bytes``.
        bandwidth: copy bandwidth of the device in this run, bytes per second.
        idle_w: power of the idle GPU.
    """

    weights_bytes: int
    read_bytes: int | None = None
    bandwidth: float | None = None
    idle_w: float | None = None


class Summary(NamedTuple):
    """Figures by metric, flags that every view must show, and details that only some views use."""

    values: dict[str, Value]
    flags: tuple[str, ...]
    details: dict[str, Any]


def summarise(rounds: Sequence[RequestTrace], machine: Machine, windows: Decoded | None = None) -> Summary:
    """The figures of a cell.

    Args:
        rounds: at least one, in order, with the disturbed ones.
        machine: see :class:`Machine`.
        windows: its windows of decode steps, where it has any.
    """
    # timed: the rounds without a disturbance, for everything that is a time; memory and counts take all rounds
    last, timed = rounds[-1], undisturbed(rounds, lambda trace: trace.flags)
    values = {
        **_latency(timed, windows),
        **_throughput(timed, windows),
        **_budget(last),
        **_memory(rounds, machine),
        **_against_machine(timed, machine, windows),
        **_sampling(timed),
        **_instructions(timed),
    }
    details: dict[str, Any] = {"kept_layers": [fmean(layer) for layer in last.kept if layer], "rounds": len(rounds)}
    if last.decode_path:
        details["decode_path"] = last.decode_path
    if last.evicted:
        details |= {"merged_layers": last.merged_layers, "evicted_layers": last.evicted_layers}
    details |= _turns(rounds, windows)
    return Summary(values, tuple(_flags(rounds, windows)), details)


def tpot(rounds: Sequence[RequestTrace], windows: Decoded | None = None) -> Value:
    """The median decode step with its interval."""
    steps = _steps(rounds, windows)
    if not steps:
        return Value(None, note="one token has no decode step")
    sampled = windows.plan.samples if windows else bool(rounds[-1].step_at)
    note = "sampled decode" if sampled else ""
    return msgspec.structs.replace(median(steps, successive=windows is not None), note=note)


def narrowness(rounds: Sequence[RequestTrace]) -> float:
    """Half the width of the TPOT interval ÷ TPOT; 0 without decode steps, infinite where there is no interval.

    It decides whether cells without windows need more rounds.
    """
    step = tpot(rounds)
    if not step.value:
        return 0.0
    if step.lo is None or step.hi is None or step.kind == "range":
        return math.inf
    return (step.hi - step.lo) / 2 / step.value


def _steps(rounds: Sequence[RequestTrace], windows: Decoded | None) -> list[list[float]]:
    """Seconds of the decode steps of each window, or else of each round."""
    return [sample.step_s for sample in (windows.chosen.windows if windows else rounds) if sample.step_s]


def _latency(rounds: Sequence[RequestTrace], windows: Decoded | None) -> dict[str, Value]:
    figures = {key: median([getattr(trace, key) for trace in rounds]) for key in _TIMES}
    figures["tpot_s"] = tpot(rounds, windows)
    steps = _steps(rounds, windows)
    for key, q in (("tpot_p95_s", 0.95), ("tpot_p99_s", 0.99)) if steps else ():
        count = sum(map(len, steps))
        refused = Value(None, n=count, note=f"{count} steps can't carry a p{q * 100:.0f}")
        figures[key] = percentile(steps, q) or refused
    return figures


def _throughput(rounds: Sequence[RequestTrace], windows: Decoded | None) -> dict[str, Value]:
    rates: dict[str, Callable[[RequestTrace], tuple[float, float]]] = {
        "prefill_tok_s": lambda trace: (trace.prompt_tokens, trace.prefill_s),
        "decode_tok_s": lambda trace: (trace.batch * (trace.gen - 1), trace.decode_s),
        "e2e_tok_s": lambda trace: (trace.batch * trace.gen, trace.e2e_s),
    }
    # 1. Tokens per second of each phase, a sample a round.
    figures = {}
    for key, rate in rates.items():
        pairs = [rate(trace) for trace in rounds]
        samples = [tokens / seconds for tokens, seconds in pairs if tokens > 0 and seconds > 0]
        if samples:
            figures[key] = median(samples)
    # 2. Of decode a sample a sweep of windows instead, where there are any.
    if windows and windows.seconds:
        tokens = rounds[-1].batch * windows.plan.total
        rates_of_sweeps = [tokens / seconds for seconds in windows.seconds.values()]
        figures["decode_tok_s"] = median(rates_of_sweeps, successive=True)
    # 3. With decode = "both" the sampled decode time ÷ the true one; and the part of a step outside of the session.
    both = [(trace.decode_s, trace.sampled_s) for trace in rounds if trace.sampled_s and trace.decode_s > 0]
    if both:
        true, integrated = zip(*both, strict=True)
        figures["sampled_error"] = paired_ratio(true, integrated)
    measured = [(trace.loop_s, sum(trace.step_s)) for trace in rounds if trace.step_s]
    if measured:
        figures["loop_overhead"] = median([loop / steps for loop, steps in measured if steps > 0])
    return figures


def _budget(last: RequestTrace) -> dict[str, Value]:
    layers = max(1, len(last.held))
    figures = {
        "budget_effective": Value(last.effective),
        "budget_held": Value(sum(map(sum, last.held)) / (layers * last.prompt_tokens)),
        "kv_bytes": Value(last.kv_bytes),
        "kv_prompt_bytes": Value(last.kv_prompt_bytes),
        "state_bytes": Value(last.state_bytes),
    }
    if last.evicted:
        figures["merged"] = Value(last.merged / last.evicted)
    return figures


def _memory(rounds: Sequence[RequestTrace], machine: Machine) -> dict[str, Value]:
    # 1. Peaks that were measured: the highest of all rounds.
    figures = {"weights_bytes": Value(machine.weights_bytes)}
    for metric, (key, phase) in _PEAKS.items():
        peaks = [peak for trace in rounds if (peak := _peak(trace, key, phase)) is not None]
        if peaks:
            figures[metric] = highest(peaks)
    unique = [trace.uss_bytes for trace in rounds if trace.uss_bytes is not None]
    if unique:
        figures["uss_decode_bytes"] = highest(unique)
    # 2. What is neither weights nor KV.
    on_gpu = "alloc_peak_bytes" in figures
    largest = figures.get("alloc_peak_bytes") or figures.get("rss_peak_bytes")
    if largest and largest.value:
        kv = max(max(trace.kv_bytes, trace.kv_prompt_bytes) for trace in rounds)
        note = "" if on_gpu else "the interpreter and its libraries are in it"
        figures["workspace_bytes"] = Value(max(0.0, largest.value - machine.weights_bytes - kv), n=largest.n, note=note)
    return figures


def _against_machine(rounds: Sequence[RequestTrace], machine: Machine, windows: Decoded | None) -> dict[str, Value]:
    figures: dict[str, Value] = {}
    last = rounds[-1]
    kept, held = (sum(map(sum, rows)) for rows in (last.kept, last.held))
    kv = step_bytes(0, last.kv_bytes, kept, held) if last.kv_read_bytes is None else last.kv_read_bytes
    figures["kv_step_bytes"] = Value(kv)
    # 1. Bytes that a step must read, and how near its time comes to reading them at the copy bandwidth.
    if machine.read_bytes is not None:
        moved = machine.read_bytes + kv
        figures["step_bytes"] = Value(moved)
        step = tpot(rounds, windows)
        if machine.bandwidth and step.value:
            value, lo, hi = (mbu(moved, t, machine.bandwidth) if t else None for t in (step.value, step.hi, step.lo))
            figures["mbu"] = msgspec.structs.replace(step, value=value, lo=lo, hi=hi, note="")
    # 2. Energy, from the driver's samples.
    if any(trace.device_timeline for trace in rounds):
        per_token = [_energy(trace, machine.idle_w) for trace in rounds]
        known = [value for value in per_token if value is not None]
        note = "" if known else "only a part was run" if last.step_at else "too short to tell, or no power known"
        figures["energy_j_tok"] = median(known) if known else Value(None, note=note)
    return figures


def _sampling(rounds: Sequence[RequestTrace]) -> dict[str, Value]:
    known = [trace.sampler_overhead for trace in rounds if trace.sampler_overhead is not None]
    return {"sampler_overhead": median(known)} if known else {}


def _instructions(rounds: Sequence[RequestTrace]) -> dict[str, Value]:
    known = [trace.instructions for trace in rounds if trace.instructions is not None]
    return {"instructions_step": median(known)} if known else {}


def _energy(trace: RequestTrace, idle_w: float | None) -> float | None:
    if trace.step_at:
        return None
    return joules_per_token(trace.device_timeline, 0.0, trace.marks[-1][0], trace.batch * trace.gen, idle_w)


def _turns(rounds: Sequence[RequestTrace], windows: Decoded | None) -> dict[str, Any]:
    """Whether decode steps were measured in windows or in requests, in how many processes, and what was disturbed.

    ``disturbed`` is the fraction of the windows (or rounds) that were disturbed in every attempt. ``busy`` says that
    these are more than half of the windows or of the rounds: a report then gives no verdict on speed.
    """
    undisturbed_rounds = sum(not any(map(is_disturbance, trace.flags)) for trace in rounds)
    details: dict[str, Any] = {
        "turns": "windows" if windows else "requests",
        "processes": len({trace.process for trace in (windows.chosen.windows if windows else rounds)}),
        "disturbed": 1 - undisturbed_rounds / len(rounds),
        "busy": 2 * undisturbed_rounds < len(rounds),
    }
    if windows:
        plan, chosen = windows
        details["windows"] = {
            "steps": plan.steps, "lead": plan.lead, "depths": plan.depths, "sweeps": plan.sweeps,
            "planned": chosen.planned, "repeated": chosen.repeated, "disturbed": chosen.disturbed,
        }  # fmt: skip
        details["disturbed"] = chosen.disturbed / chosen.planned
        details["busy"] = details["busy"] or not chosen.left_out
    return details


def _flags(rounds: Sequence[RequestTrace], windows: Decoded | None) -> Iterator[str]:
    # 1. What is special about the request itself.
    last = rounds[-1]
    yield from last.remarks
    if windows.plan.samples if windows else last.step_at:
        yield "sampled decode"
    if any(trace.over for trace in rounds):
        yield "keeps more than asked"
    different = [key for key in _EXACT if any(getattr(trace, key) != getattr(last, key) for trace in rounds)]
    if different:
        yield f"differs between rounds: {', '.join(different)}"
    # 2. What was wrong with single rounds, and what disturbed rounds and windows.
    faults = [[flag for flag in trace.flags if not is_disturbance(flag)] for trace in rounds]
    if wrong := [flags for flags in faults if flags]:
        yield f"{len(wrong)} of {len(rounds)} rounds: {_kinds(wrong)}"
    if disturbed := [flags for trace in rounds if (flags := list(filter(is_disturbance, trace.flags)))]:
        words = "left out" if 2 * len(disturbed) <= len(rounds) else "disturbed"
        yield f"{len(disturbed)} of {len(rounds)} rounds {words}: {_kinds(disturbed)}"
    if windows and windows.chosen.disturbed:
        chosen = windows.chosen
        words = "left out" if chosen.left_out else "disturbed"
        yield f"{chosen.disturbed} of {chosen.planned} windows {words}: {_kinds(chosen.disturbances)}"


def _kinds(flags: Iterable[Iterable[str]]) -> str:
    """The three most frequent kinds of flags, without the amounts in them."""
    kinds = Counter(kind for words in flags for kind in {_AMOUNT.sub("", flag) for flag in words})
    return ", ".join(kind for kind, _ in kinds.most_common(3))


def _peak(trace: RequestTrace, key: str, phase: str | None) -> int | None:
    phases = trace.peaks.values() if phase is None else [trace.peaks.get(phase, {})]
    return max((peaks[key] for peaks in phases if key in peaks), default=None)
