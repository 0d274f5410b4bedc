"""A request divided among ranks, and their answers made one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def share(args: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """A request as one rank gets it: with its own GPU, and its part of a memory limit."""
    found = dict(args)
    if str(found.get("device", "")).startswith("cuda"):
        found["device"] = f"cuda:{rank}"
    for key in ("axes", "cell"):
        if isinstance(found.get(key), Mapping):
            found[key] = share(found[key], rank, ranks)
    if found.get("limit"):
        found["limit"] = int(found["limit"]) // ranks
    return found


def combined(op: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank 0's answer, with the bytes and rates of all ranks added up."""
    found = dict(answers[0])
    if op == "bandwidth":
        return {**found, **{key: _total(answers, key) for key in ("bytes_per_s", "median")}}
    if op == "rates":
        return {key: _total(answers, key) for key in found}
    if op == "count":
        found |= {key: _total(answers, key) for key in ("flops_step", "fresh_step_bytes", "live_bytes") if key in found}
    models = [found, *answers[1:]] if op == "load" else [answer.get("model") for answer in answers]
    if all(isinstance(model, Mapping) and "weights_bytes" in model for model in models):
        held = {key: _total(models, key) for key in ("weights_bytes", "weights_read_bytes")}
        found = {**found, **held} if op == "load" else {**found, "model": {**found["model"], **held}}
    if op == "measure":
        found["trace"] = _trace([answer["trace"] for answer in answers])
    return found


def _trace(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank 0's trace with the memory of all: peaks are added phase by phase, though they need not fall together."""
    first = dict(traces[0])
    first["peaks"] = {
        phase: {key: _total([trace["peaks"].get(phase, {}) for trace in traces], key) for key in peaks}
        for phase, peaks in first["peaks"].items()
    }
    if first.get("uss_bytes") is not None:
        first["uss_bytes"] = _total(traces, "uss_bytes")
    first["flags"] = list(dict.fromkeys(flag for trace in traces for flag in trace["flags"]))
    if len({trace["tokens_digest"] for trace in traces}) > 1:
        first["flags"].append("the ranks' tokens differ")
    return first


def _total(parts: Sequence[Any], key: str) -> Any:
    return sum(part.get(key) or 0 for part in parts)
