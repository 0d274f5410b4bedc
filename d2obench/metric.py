"""The one metric table: name, unit, direction and statistical kind of every figure d2obench reports.

Every view (console, markdown, CSV, HTML, gate) takes headers, units, directions and tolerances from here and
nowhere else. Values are recorded in base units (seconds, bytes, tokens per second, nats, ratios); ``scale`` turns
one into the unit shown.

Kinds, after the assumption each carries (see ``d2obench.gate.verdict``):

* ``exact``: the same on every repeat; any worse value is a regression.
* ``bounded``: nearly the same; worse than ``tolerance`` is a regression.
* ``timed``: noisy; only compared inside one interleaved run.
* ``ratio``: a quotient of two figures of one run; comparable between runs on like devices.
* ``sampled``: a mean over items; compared item by item.
* ``info``: shown, never judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher", "none"]
Kind = Literal["exact", "bounded", "timed", "ratio", "sampled", "info"]
Group = Literal["budget", "quality", "memory", "latency", "throughput", "energy", "machine"]


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Args:
        key: the name in records and CSV.
        header: the column header.
        unit: the unit shown; empty for a pure number.
        scale: shown value = recorded value × scale.
        digits: digits after the point when shown.
        direction: which way is better.
        kind: the statistical kind, see the module's head.
        group: where it stands in a report.
        about: the definition.
        tolerance: the relative change a gate lets pass; absolute for ``sampled``.
        headline: whether it is a column of the headline table.
        base: the unit recorded, for CSV.
    """

    key: str
    header: str
    unit: str
    scale: float
    digits: int
    direction: Direction
    kind: Kind
    group: Group
    about: str
    tolerance: float = 0.0
    headline: bool = False
    base: str = ""


MS, MIB = 1e3, 1 / 2**20
# fmt: off
_TABLE = (
    Metric("budget_effective", "kept", "% of prompt", 100, 1, "none", "exact", "budget",
           "entries kept after compression ÷ prompt tokens, over all layers, heads and sequences", headline=True),
    Metric("budget_held", "held at the end", "% of prompt", 100, 1, "lower", "exact", "budget",
           "entries held when the last token is out ÷ prompt tokens"),
    Metric("kl", "KL to full", "nats/token", 1, 4, "lower", "sampled", "quality",
           "KL(full‖policy) per generated position, teacher-forced on the same text", 0.02, True, "nats"),
    Metric("top1", "top-1 agreement", "%", 100, 1, "higher", "sampled", "quality",
           "positions where policy and full cache have the same most likely token", 0.02, True),
    Metric("ppl", "perplexity", "", 1, 3, "lower", "sampled", "quality",
           "exp of the mean negative log-likelihood of the text after the prompt", 0.05, True),
    Metric("nll", "negative log-likelihood", "nats/token", 1, 4, "lower", "sampled", "quality",
           "mean negative log-likelihood of the text after the prompt", 0.02, base="nats"),
    Metric("score", "score", "%", 100, 1, "higher", "sampled", "quality",
           "the task's own official metric, mean over items", 0.05, True),
    Metric("score_diff", "score − full", "points", 100, 1, "higher", "sampled", "quality",
           "difference of the score to the full cache, paired on the same items", 0.05, True),
    Metric("score_strict", "strict score", "%", 100, 1, "higher", "sampled", "quality",
           "GSM8K: the number after #### is the gold one", 0.05),
    Metric("em", "exact match", "%", 100, 1, "higher", "sampled", "quality",
           "CoQA: official exact match over the references", 0.05),
    Metric("bleu_diff", "BLEU true − false", "points", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: BLEU to the nearest correct answer less that to the nearest incorrect one", 0.05),
    Metric("rouge1_diff", "ROUGE-1 true − false", "points", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: ROUGE-1 F to the nearest correct answer less that to the nearest incorrect one", 0.05),
    Metric("rougel_diff", "ROUGE-L true − false", "points", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: ROUGE-Lsum F to the nearest correct answer less that to the nearest incorrect one", 0.05),
    Metric("mc1", "MC1", "%", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: the best answer is likelier than every incorrect one", 0.05),
    Metric("mc2", "MC2", "%", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: probability of the correct answers ÷ that of all answers", 0.05),
    Metric("gold_bpb", "gold bits/byte", "bits/byte", 1, 3, "lower", "sampled", "quality",
           "negative log-probability of the gold answer ÷ its bytes; sees what exact match can't", 0.05, True,
           "bits/byte"),
    Metric("gold_bpb_diff", "gold bits/byte − full", "bits/byte", 1, 3, "lower", "sampled", "quality",
           "difference of gold bits/byte to the full cache, paired on the same items", 0.05, True, "bits/byte"),
    Metric("kl_rival", "KL − rival's", "nats/token", 1, 4, "lower", "sampled", "quality",
           "KL to full less that of another policy at the same budget, paired on the same text", 0.02, base="nats"),
    Metric("score_rival", "score − rival's", "points", 100, 1, "higher", "sampled", "quality",
           "score less that of another policy at the same budget, paired on the same items", 0.05),
    Metric("gold_bpb_rival", "gold bits/byte − rival's", "bits/byte", 1, 3, "lower", "sampled", "quality",
           "gold bits/byte less that of another policy at the same budget, paired on the same items", 0.05,
           base="bits/byte"),
    Metric("length_drift", "length drift", "×", 1, 3, "none", "info", "quality",
           "generated length, policy ÷ full"),
    Metric("kv_bytes", "KV", "MiB", MIB, 2, "lower", "exact", "memory",
           "storage of keys and values really held at the end of decoding, counted from the tensors", 0.0, True,
           "bytes"),
    Metric("kv_prompt_bytes", "KV after compress", "MiB", MIB, 2, "lower", "exact", "memory",
           "storage of keys and values right after compression", base="bytes"),
    Metric("state_bytes", "policy state", "MiB", MIB, 2, "lower", "exact", "memory",
           "storage of scores, positions, thresholds and buffers beside keys and values", base="bytes"),
    Metric("weights_bytes", "weights", "MiB", MIB, 1, "lower", "exact", "memory",
           "storage of the model's parameters and buffers", base="bytes"),
    Metric("rss_prefill_bytes", "RSS peak, prefill", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest resident set of the process while the prompt is read", 0.05, base="bytes"),
    Metric("rss_compress_bytes", "RSS peak, compress", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest resident set while the cache is compressed", 0.05, base="bytes"),
    Metric("rss_decode_bytes", "RSS peak, decode", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest resident set while tokens are generated", 0.05, base="bytes"),
    Metric("uss_decode_bytes", "USS, decode", "MiB", MIB, 0, "lower", "info", "memory",
           "memory that is the process's own when decoding ends; a weights file that others map too is not in it",
           base="bytes"),
    Metric("rss_peak_bytes", "RSS peak", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest resident set over all phases", 0.05, True, "bytes"),
    Metric("alloc_requested_bytes", "GPU requested peak", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest sum of bytes asked of the device allocator", 0.005, base="bytes"),
    Metric("alloc_peak_bytes", "GPU allocated peak", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest sum of bytes handed out by the device allocator", 0.02, True, "bytes"),
    Metric("alloc_reserved_bytes", "GPU reserved peak", "MiB", MIB, 0, "lower", "info", "memory",
           "highest sum of bytes the allocator holds from the driver", base="bytes"),
    Metric("alloc_prefill_bytes", "GPU allocated peak, prefill", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest allocated bytes while the prompt is read", 0.02, base="bytes"),
    Metric("alloc_compress_bytes", "GPU allocated peak, compress", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest allocated bytes while the cache is compressed", 0.02, base="bytes"),
    Metric("alloc_decode_bytes", "GPU allocated peak, decode", "MiB", MIB, 0, "lower", "bounded", "memory",
           "highest allocated bytes while tokens are generated", 0.02, base="bytes"),
    Metric("nvml_used_bytes", "GPU used (NVML)", "MiB", MIB, 0, "lower", "info", "memory",
           "highest memory in use on the device, all processes", base="bytes"),
    Metric("nvml_process_bytes", "GPU used by process (NVML)", "MiB", MIB, 0, "lower", "info", "memory",
           "highest memory of this process as NVML tells it", base="bytes"),
    Metric("workspace_bytes", "workspace", "MiB", MIB, 0, "lower", "info", "memory",
           "peak less weights and KV", base="bytes"),
    Metric("ttft_s", "TTFT", "ms", MS, 1, "lower", "timed", "latency",
           "start of prefill to the first token on the host, compression included", 0.05, True, "s"),
    Metric("prefill_s", "prefill", "ms", MS, 1, "lower", "timed", "latency",
           "start of prefill to its logits, compression not included", 0.05, base="s"),
    Metric("compress_s", "compress", "ms", MS, 1, "lower", "timed", "latency",
           "time of selecting, evicting and merging after (or between the layers of) prefill", 0.05, True, "s"),
    Metric("tpot_s", "TPOT", "ms", MS, 2, "lower", "timed", "latency",
           "median time of a decode step", 0.05, True, "s"),
    Metric("tpot_p95_s", "TPOT p95", "ms", MS, 2, "lower", "timed", "latency",
           "95th percentile of the decode steps", 0.10, True, "s"),
    Metric("tpot_p99_s", "TPOT p99", "ms", MS, 2, "lower", "timed", "latency",
           "99th percentile of the decode steps; left out where there are too few", 0.10, base="s"),
    Metric("e2e_s", "end to end", "s", 1, 2, "lower", "timed", "latency",
           "prefill, compression and all decode steps of the batch", 0.05, base="s"),
    Metric("prefill_tok_s", "prefill", "tok/s", 1, 1, "higher", "timed", "throughput",
           "batch × prompt tokens ÷ prefill time", 0.05, base="tok/s"),
    Metric("decode_tok_s", "decode", "tok/s", 1, 1, "higher", "timed", "throughput",
           "batch × decode steps ÷ their time", 0.05, True, "tok/s"),
    Metric("e2e_tok_s", "end-to-end", "tok/s", 1, 1, "higher", "timed", "throughput",
           "batch × generated tokens ÷ the whole request", 0.05, True, "tok/s"),
    Metric("speedup", "decode, equal batch", "× full", 1, 3, "higher", "ratio", "throughput",
           "decode time of full ÷ policy, paired inside each round", 0.10, True),
    Metric("speedup_e2e", "end-to-end, equal batch", "× full", 1, 3, "higher", "ratio", "throughput",
           "end-to-end time of full ÷ policy, paired inside each round", 0.10),
    Metric("prefill_cost", "TTFT ÷ full", "×", 1, 3, "lower", "ratio", "latency",
           "prefill and compression ÷ the full cache's prefill, paired inside each round", 0.10),
    Metric("to_streaming", "decode, ÷ streaming", "× streaming", 1, 3, "higher", "ratio", "throughput",
           "decode time of streaming ÷ policy at the same budget, paired inside each round", 0.10),
    Metric("to_library", "full's decode, ÷ best library cache", "× library", 1, 3, "higher", "ratio", "throughput",
           "decode time of the fastest cache that is not ours (hf-dynamic, hf-static, sdpa-static) ÷ full, paired in "
           "each round", 0.10),
    Metric("prefill_peak_cost", "peak to first token, ÷ full", "×", 1, 3, "lower", "ratio", "memory",
           "highest memory of prefill and compression ÷ full's: allocated bytes on a GPU, else the resident set", 0.02),
    Metric("sampled_error", "sampled ÷ true decode", "×", 1, 3, "none", "ratio", "machine",
           "time of all decode steps integrated from a sampled run ÷ measured in a full one, paired inside each round",
           0.03),
    Metric("decode_rival", "decode ÷ rival's", "×", 1, 3, "higher", "ratio", "throughput",
           "decode speed ÷ that of another policy at the same budget, paired inside each round", 0.10),
    Metric("speedup_memory", "decode, equal memory", "× full", 1, 2, "higher", "ratio", "throughput",
           "decode tok/s of policy ÷ full, each at its own largest batch under one memory limit", 0.10, True),
    Metric("batch_max", "largest batch", "", 1, 0, "higher", "info", "throughput",
           "the largest batch that fits the memory limit, found by search"),
    Metric("step_bytes", "bytes a step", "MiB", MIB, 1, "lower", "exact", "machine",
           "what a decode step must read: weights and KV", base="bytes"),
    Metric("mbu", "MBU", "%", 100, 1, "higher", "timed", "machine",
           "bytes a decode step must move ÷ its median time ÷ the copy bandwidth measured in this run", 0.10, True),
    Metric("speedup_bound", "bound on speed-up", "× full", 1, 2, "none", "info", "machine",
           "decode speed-up if memory traffic were all: step bytes of full ÷ policy"),
    Metric("speedup_largest", "largest possible speed-up", "× full", 1, 2, "none", "info", "machine",
           "full's step in its calmer windows ÷ the time that the policy's step bytes take at the measured bandwidth; "
           "a speed-up above the upper end is impossible"),
    Metric("ceiling_tok_s", "decode ceiling", "tok/s", 1, 1, "none", "info", "machine",
           "decode tok/s if a step only had to move its bytes at the copy bandwidth measured in this run",
           base="tok/s"),
    Metric("loop_overhead", "loop overhead", "%", 100, 2, "lower", "timed", "machine",
           "decode time outside the model's forward and the policy's update", 0.5),
    Metric("prefill_share", "share of prefill", "%", 100, 1, "none", "info", "machine",
           "own time of a part ÷ prefill and compression, timed by ranges"),
    Metric("step_share", "share of a decode step", "%", 100, 1, "none", "info", "machine",
           "own time of a part ÷ the decode step, timed by ranges"),
    Metric("ranges_overhead", "cost of the ranges", "%", 100, 2, "lower", "info", "machine",
           "decode step with the ranges on ÷ off, less 1, in turns; what the shares are distorted by"),
    Metric("sampler_overhead", "sampler", "% of one core", 100, 2, "none", "info", "machine",
           "CPU time of the threads that sample memory and power ÷ the time of the request"),
    Metric("energy_j_tok", "energy", "J/tok", 1, 3, "lower", "timed", "energy",
           "device energy per generated token, net of idle", 0.10, base="J"),
    Metric("merged", "merged", "% of evicted", 100, 1, "none", "exact", "budget",
           "evicted entries that were merged into a kept one"),
    Metric("ops_step", "operators a step", "", 1, 0, "lower", "exact", "machine",
           "aten operators dispatched in one decode step"),
    Metric("cats_step", "concatenations a step", "", 1, 0, "lower", "exact", "machine",
           "operators of one decode step that build a new tensor out of others"),
    Metric("waits_step", "host waits a step", "", 1, 0, "lower", "exact", "machine",
           "operators of one decode step whose result the host must know before it goes on"),
    Metric("launches_step", "kernels a step", "", 1, 0, "lower", "exact", "machine",
           "kernels launched on the device in one decode step"),
    Metric("fresh_step_bytes", "fresh storage a step", "MiB", MIB, 2, "lower", "exact", "memory",
           "storage of all new tensors that one decode step makes", base="bytes"),
    Metric("live_bytes", "tensors alive", "MiB", MIB, 2, "lower", "exact", "memory",
           "storage of all tensors alive in decoding, less those alive before the request", base="bytes"),
    Metric("flops_step", "FLOPs a step", "MFLOP", 1e-6, 2, "lower", "exact", "machine",
           "floating-point operations of one decode step, as counted from its operators", base="flop"),
)
# fmt: on

METRICS: dict[str, Metric] = {metric.key: metric for metric in _TABLE}
"""Metric by key, in display order."""


def show(key: str, value: float | None, *, unit: bool = False) -> str:
    """``value`` as the metric shows it; a missing value is ``–``."""
    metric = METRICS[key]
    if value is None:
        return "–"
    text = f"{value * metric.scale:,.{metric.digits}f}"
    return f"{text} {metric.unit}".rstrip() if unit else text
