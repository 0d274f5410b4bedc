"""The table of metrics: name, unit, direction and statistical kind of every figure that d2obench reports.

Every view and every gate takes headers, units, directions and tolerances from here. Values are recorded in base units
(seconds, bytes, tokens per second, nats, ratios), and multiplying by ``scale`` gives the unit that is shown.

The kind says what may be assumed about repeated measurements, and thus how a gate judges them:

* ``exact``: equal in every repeat; any worse value is a regression.
* ``bounded``: nearly equal in every repeat; a value that is worse by more than ``tolerance`` is a regression.
* ``timed``: noisy; compared only within one run whose rounds take turns.
* ``ratio``: a quotient of two figures of one run; comparable between runs on similar devices.
* ``sampled``: a mean over items; compared item by item.
* ``info``: shown but not judged.
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
        key: the name in records and CSV files.
        header: the header of its column.
        unit: the unit that is shown; empty for a pure number.
        scale: the shown value is the recorded value times this.
        digits: number of digits after the point.
        direction: which direction is better.
        kind: the statistical kind, see above.
        group: what it belongs to, which decides how it is compared.
        about: the definition, in sentences that a newcomer understands.
        tolerance: the relative change that a gate tolerates; an absolute one for ``sampled``.
        headline: whether it has a column in the tables that show every cell.
        base: the recorded unit, for CSV files.
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
           "How much of the prompt the cache keeps after compression: entries kept divided by prompt tokens, over all "
           "layers, KV heads and sequences.", headline=True),
    Metric("budget_held", "held at the end", "% of prompt", 100, 1, "lower", "exact", "budget",
           "How much the cache holds when the last token has been generated: entries held divided by prompt tokens."),
    Metric("kl", "KL to full", "nats/token", 1, 4, "lower", "sampled", "quality",
           "How far the next-token distribution moves away from the full cache's: the Kullback-Leibler divergence "
           "KL(full‖policy) at each generated position, on the same text. 0 means no loss.",
           tolerance=0.02, headline=True, base="nats"),
    Metric("top1", "top-1 agreement", "%", 100, 1, "higher", "sampled", "quality",
           "At how many positions the policy and the full cache have the same most likely next token, on the same "
           "text.", tolerance=0.02, headline=True),
    Metric("kl_p99", "KL p99", "nats/token", 1, 4, "lower", "info", "quality",
           "The KL to full that 99 % of the positions stay below, of all documents together; the range is that of "
           "single documents.", headline=True, base="nats"),
    Metric("kl_p999", "KL p99.9", "nats/token", 1, 4, "lower", "info", "quality",
           "The KL to full that 99.9 % of the positions stay below; left out where there are fewer than 1,000.",
           headline=True, base="nats"),
    Metric("kl_max", "KL max", "nats/token", 1, 4, "lower", "info", "quality",
           "The KL to full of the worst position; the range is that of single documents.", headline=True, base="nats"),
    Metric("top5", "top-5 agreement", "%", 100, 1, "higher", "sampled", "quality",
           "The share of the full cache's five most likely next tokens that are among the policy's five, on the same "
           "text.", tolerance=0.02, headline=True),
    Metric("dp_rms", "RMS Δp", "% points", 100, 2, "lower", "info", "quality",
           "How far the probability of the text's own next token moves away from that under the full cache: the root "
           "of the mean square over positions.", headline=True),
    Metric("ppl", "perplexity", "", 1, 3, "lower", "sampled", "quality",
           "Perplexity of the text after the prompt: exp of the mean negative log-likelihood of its tokens.",
           tolerance=0.05, headline=True),
    Metric("nll", "negative log-likelihood", "nats/token", 1, 4, "lower", "sampled", "quality",
           "Mean negative log-likelihood of the tokens of the text after the prompt: how surprised the model is by "
           "each.", tolerance=0.02, base="nats"),
    Metric("score", "score", "%", 100, 1, "higher", "sampled", "quality",
           "The task's own official metric, as the mean over its items.", tolerance=0.05, headline=True),
    Metric("score_diff", "score − full", "points", 100, 1, "higher", "sampled", "quality",
           "The score less the full cache's, on the same items: a negative number is a loss.",
           tolerance=0.05, headline=True),
    Metric("score_strict", "strict score", "%", 100, 1, "higher", "sampled", "quality",
           "GSM8K: share of answers whose number after #### is the gold one.", tolerance=0.05),
    Metric("em", "exact match", "%", 100, 1, "higher", "sampled", "quality",
           "CoQA: share of answers that match a reference exactly, by the official rule.", tolerance=0.05),
    Metric("bleu_diff", "BLEU true − false", "points", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: BLEU to the nearest correct answer less BLEU to the nearest incorrect one.", tolerance=0.05),
    Metric("rouge1_diff", "ROUGE-1 true − false", "points", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: ROUGE-1 F to the nearest correct answer less that to the nearest incorrect one.",
           tolerance=0.05),
    Metric("rougel_diff", "ROUGE-L true − false", "points", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: ROUGE-Lsum F to the nearest correct answer less that to the nearest incorrect one.",
           tolerance=0.05),
    Metric("mc1", "MC1", "%", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: share of questions where the best answer is likelier than every incorrect one.",
           tolerance=0.05),
    Metric("mc2", "MC2", "%", 100, 1, "higher", "sampled", "quality",
           "TruthfulQA: probability of the correct answers divided by that of all answers.", tolerance=0.05),
    Metric("gold_bpb", "gold bits/byte", "bits/byte", 1, 3, "lower", "sampled", "quality",
           "How surprised the model is by the right answer: its negative log-probability divided by its length in "
           "bytes. It shows losses that a right-or-wrong score can't.",
           tolerance=0.05, headline=True, base="bits/byte"),
    Metric("gold_bpb_diff", "gold bits/byte − full", "bits/byte", 1, 3, "lower", "sampled", "quality",
           "Bits per byte of the right answer less the full cache's, on the same items: a positive number is a loss.",
           tolerance=0.05, headline=True, base="bits/byte"),
    Metric("evicted_attention", "attention evicted", "%", 100, 1, "none", "sampled", "quality",
           "Share of the attention of the prompt's last queries that goes to entries which are evicted, as a mean over "
           "layers and KV heads.", headline=True),
    Metric("target_due", "due to targets", "%", 100, 1, "none", "sampled", "quality",
           "Share of the attention of the prompt's last queries that merge targets should draw: their own and that of "
           "the entries merged into them."),
    Metric("target_drawn", "drawn by targets", "%", 100, 1, "none", "sampled", "quality",
           "Share of the attention of the prompt's last queries that merge targets do draw in the compressed cache."),
    Metric("output_error", "output error", "%", 100, 1, "lower", "sampled", "quality",
           "How far compression moves the output of an attention block for the prompt's last queries: the squared "
           "distance to the output over the full prompt divided by that output's square, as a mean over layers.",
           tolerance=0.02, headline=True),
    Metric("kl_rival", "KL − rival's", "nats/token", 1, 4, "lower", "sampled", "quality",
           "KL to full less that of another policy with the same budget, on the same text: a negative number is "
           "better.", tolerance=0.02, base="nats"),
    Metric("score_rival", "score − rival's", "points", 100, 1, "higher", "sampled", "quality",
           "The score less that of another policy with the same budget, on the same items: a positive number is "
           "better.", tolerance=0.05),
    Metric("gold_bpb_rival", "gold bits/byte − rival's", "bits/byte", 1, 3, "lower", "sampled", "quality",
           "Bits per byte of the right answer less that of another policy with the same budget, on the same items: a "
           "negative number is better.", tolerance=0.05, base="bits/byte"),
    Metric("queries_per_context", "queries per context", "", 1, 1, "none", "info", "quality",
           "How many questions were asked from one compressed context, on average, where questions were unseen when "
           "the context was compressed.", headline=True),
    Metric("length_drift", "length ÷ full", "×", 1, 3, "none", "info", "quality",
           "Tokens that were generated divided by those with the full cache, on the same items.", headline=True),
    Metric("cut", "cut at the limit", "%", 100, 1, "lower", "sampled", "quality",
           "The share of answers that were still going on when the limit of tokens was reached.",
           tolerance=0.05, headline=True),
    Metric("repeated", "repetition", "%", 100, 1, "lower", "sampled", "quality",
           "The share of the sequences of four words in an answer that have occurred before in it.",
           tolerance=0.05, headline=True),
    Metric("kv_bytes", "KV", "MiB", MIB, 2, "lower", "exact", "memory",
           "Storage of keys and values that the cache really holds at the end of decoding, counted from its tensors.",
           headline=True, base="bytes"),
    Metric("kv_prompt_bytes", "KV after compress", "MiB", MIB, 2, "lower", "exact", "memory",
           "Storage of keys and values right after the prompt has been compressed.", base="bytes"),
    Metric("kv_step_bytes", "KV read a step", "MiB", MIB, 2, "lower", "info", "memory",
           "Bytes of keys and values that a decode step reads, and of what it reads to choose among them. A policy may "
           "read less than it holds; most read what they hold, on average over the generation.",
           base="bytes"),
    Metric("state_bytes", "policy state", "MiB", MIB, 2, "lower", "exact", "memory",
           "Storage that a policy needs beside keys and values: scores, positions, thresholds, buffers.", base="bytes"),
    Metric("weights_bytes", "weights", "MiB", MIB, 1, "lower", "exact", "memory",
           "Storage of the model's parameters and buffers.", base="bytes"),
    Metric("rss_prefill_bytes", "RSS peak, prefill", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest resident memory of the process while the prompt is processed.", tolerance=0.05, base="bytes"),
    Metric("rss_compress_bytes", "RSS peak, compress", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest resident memory of the process while the cache is compressed.", tolerance=0.05, base="bytes"),
    Metric("rss_decode_bytes", "RSS peak, decode", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest resident memory of the process while tokens are generated.", tolerance=0.05, base="bytes"),
    Metric("uss_decode_bytes", "USS, decode", "MiB", MIB, 0, "lower", "info", "memory",
           "Memory that belongs to the process alone when decoding ends; a weights file that other processes map too "
           "is not in it.", base="bytes"),
    Metric("rss_peak_bytes", "RSS peak", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest resident memory of the process over the whole request.",
           tolerance=0.05, headline=True, base="bytes"),
    Metric("alloc_requested_bytes", "GPU requested peak", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest sum of the bytes that PyTorch asked its GPU allocator for.", tolerance=0.005, base="bytes"),
    Metric("alloc_peak_bytes", "GPU allocated peak", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest sum of the bytes that PyTorch's GPU allocator handed out.",
           tolerance=0.02, headline=True, base="bytes"),
    Metric("alloc_reserved_bytes", "GPU reserved peak", "MiB", MIB, 0, "lower", "info", "memory",
           "Highest sum of the bytes that PyTorch's GPU allocator held from the driver.", base="bytes"),
    Metric("alloc_prefill_bytes", "GPU allocated peak, prefill", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest allocated GPU memory while the prompt is processed.", tolerance=0.02, base="bytes"),
    Metric("alloc_compress_bytes", "GPU allocated peak, compress", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest allocated GPU memory while the cache is compressed.", tolerance=0.02, base="bytes"),
    Metric("alloc_decode_bytes", "GPU allocated peak, decode", "MiB", MIB, 0, "lower", "bounded", "memory",
           "Highest allocated GPU memory while tokens are generated.", tolerance=0.02, base="bytes"),
    Metric("nvml_used_bytes", "GPU used (NVML)", "MiB", MIB, 0, "lower", "info", "memory",
           "Highest memory in use on the GPU by all processes, as the driver reports it.", base="bytes"),
    Metric("nvml_process_bytes", "GPU used by process (NVML)", "MiB", MIB, 0, "lower", "info", "memory",
           "Highest GPU memory of this process, as the driver reports it.", base="bytes"),
    Metric("workspace_bytes", "workspace", "MiB", MIB, 0, "lower", "info", "memory",
           "Peak memory less weights and KV: activations, buffers and the runtime.", base="bytes"),
    Metric("ttft_s", "TTFT", "ms", MS, 1, "lower", "timed", "latency",
           "Time to first token: from the start of prefill until the first token is on the CPU, compression included.",
           tolerance=0.05, headline=True, base="s"),
    Metric("prefill_s", "prefill", "ms", MS, 1, "lower", "timed", "latency",
           "Time to process the prompt until its logits are there, compression not included.",
           tolerance=0.05, base="s"),
    Metric("compress_s", "compress", "ms", MS, 1, "lower", "timed", "latency",
           "Time to choose what is kept, evict the rest and merge, after prefill or between its layers.",
           tolerance=0.05, headline=True, base="s"),
    Metric("tpot_s", "TPOT", "ms", MS, 2, "lower", "timed", "latency",
           "Time per output token: the median time of a decode step, in which every sequence of the batch gets one "
           "token.", tolerance=0.05, headline=True, base="s"),
    Metric("tpot_p95_s", "TPOT p95", "ms", MS, 2, "lower", "timed", "latency",
           "The decode step time that 95 % of the steps stay below.", tolerance=0.1, headline=True, base="s"),
    Metric("tpot_p99_s", "TPOT p99", "ms", MS, 2, "lower", "timed", "latency",
           "The decode step time that 99 % of the steps stay below; left out where there are too few steps to tell.",
           tolerance=0.1, base="s"),
    Metric("e2e_s", "end to end", "s", 1, 2, "lower", "timed", "latency",
           "Time of the whole request: prefill, compression and all decode steps of the batch.",
           tolerance=0.05, base="s"),
    Metric("prefill_tok_s", "prefill", "tok/s", 1, 1, "higher", "timed", "throughput",
           "Prompt tokens of the batch divided by the time of prefill.", tolerance=0.05, base="tok/s"),
    Metric("decode_tok_s", "decode", "tok/s", 1, 1, "higher", "timed", "throughput",
           "Generated tokens of the batch per second of decoding: batch × decode steps divided by their time.",
           tolerance=0.05, headline=True, base="tok/s"),
    Metric("e2e_tok_s", "end-to-end", "tok/s", 1, 1, "higher", "timed", "throughput",
           "Generated tokens of the batch divided by the time of the whole request.",
           tolerance=0.05, headline=True, base="tok/s"),
    Metric("speedup", "decode, equal batch", "× full", 1, 3, "higher", "ratio", "throughput",
           "Decode speed relative to the full cache at the same batch: the full cache's decode time divided by the "
           "policy's, in pairs that were measured together.", tolerance=0.1, headline=True),
    Metric("speedup_e2e", "end-to-end, equal batch", "× full", 1, 3, "higher", "ratio", "throughput",
           "Speed of the whole request relative to the full cache at the same batch, in pairs that were measured "
           "together.", tolerance=0.1),
    Metric("prefill_cost", "TTFT ÷ full", "×", 1, 3, "lower", "ratio", "latency",
           "Time to first token divided by the full cache's, in pairs that were measured together: 1.1 means 10 % "
           "later.", tolerance=0.1),
    Metric("to_streaming", "decode, ÷ streaming", "× streaming", 1, 3, "higher", "ratio", "throughput",
           "Decode speed relative to StreamingLLM with the same budget, in pairs that were measured together.",
           tolerance=0.1),
    Metric("to_library", "full's decode, ÷ best library cache", "× library", 1, 3, "higher", "ratio", "throughput",
           "Decode speed of our full cache relative to the fastest cache that is not ours (hf-dynamic, hf-static, "
           "sdpa-static), in pairs that were measured together.", tolerance=0.1),
    Metric("prefill_peak_cost", "peak to first token, ÷ full", "×", 1, 3, "lower", "ratio", "memory",
           "Highest memory until the first token divided by the full cache's: allocated bytes on a GPU, else the "
           "resident memory of the process.", tolerance=0.02),
    Metric("sampled_error", "sampled ÷ true decode", "×", 1, 3, "none", "ratio", "machine",
           "Decode time estimated from a sample of steps divided by the time of all steps, in pairs that were "
           "measured together: how wrong sampled decoding is.", tolerance=0.03),
    Metric("decode_rival", "decode ÷ rival's", "×", 1, 3, "higher", "ratio", "throughput",
           "Decode speed relative to another policy with the same budget, in pairs that were measured together.",
           tolerance=0.1),
    Metric("speedup_memory", "decode, equal memory", "× full", 1, 2, "higher", "ratio", "throughput",
           "Decode tokens per second relative to the full cache where each runs the largest batch that fits one "
           "memory limit.", tolerance=0.1, headline=True),
    Metric("batch_max", "largest batch", "", 1, 0, "higher", "info", "throughput",
           "The largest batch that fits the memory limit, found by search."),
    Metric("step_bytes", "bytes a step", "MiB", MIB, 1, "lower", "exact", "machine",
           "What a decode step must read at least: the weights once, and the KV cache of every sequence.",
           base="bytes"),
    Metric("mbu", "MBU", "%", 100, 1, "higher", "timed", "machine",
           "Memory bandwidth utilisation: the bytes a decode step must move, divided by its median time and by the "
           "copy bandwidth measured in this run.", tolerance=0.1, headline=True),
    Metric("speedup_bound", "bound on speed-up", "× full", 1, 2, "none", "info", "machine",
           "The decode speed-up over the full cache if a step did nothing but read its bytes."),
    Metric("speedup_largest", "largest possible speed-up", "× full", 1, 2, "none", "info", "machine",
           "The full cache's decode step in its calmer windows, divided by the time that the policy's bytes take at "
           "the bandwidth measured in this run. A speed-up above its upper end is impossible."),
    Metric("ceiling_tok_s", "decode ceiling", "tok/s", 1, 1, "none", "info", "machine",
           "Decode tokens per second if a step did nothing but move its bytes at the copy bandwidth measured in this "
           "run.", base="tok/s"),
    Metric("loop_overhead", "loop overhead", "%", 100, 2, "lower", "timed", "machine",
           "Share of the decode time that is spent outside the model's forward pass and the policy's update.",
           tolerance=0.5),
    Metric("prefill_share", "share of prefill", "%", 100, 1, "none", "info", "machine",
           "Share of the time of prefill and compression that one part takes itself, timed by named ranges."),
    Metric("step_share", "share of a decode step", "%", 100, 1, "none", "info", "machine",
           "Share of a decode step that one part takes itself, timed by named ranges."),
    Metric("ranges_overhead", "cost of the ranges", "%", 100, 2, "lower", "info", "machine",
           "How much longer a decode step is with the named ranges on, measured in turns; the shares are distorted by "
           "as much."),
    Metric("sampler_overhead", "sampler", "% of one core", 100, 2, "none", "info", "machine",
           "CPU time of the threads that sample memory and power, divided by the time of the request."),
    Metric("energy_j_tok", "energy", "J/tok", 1, 3, "lower", "timed", "energy",
           "Energy of the device per generated token, less what it takes when idle.", tolerance=0.1, base="J"),
    Metric("merged", "merged", "% of evicted", 100, 1, "none", "exact", "budget",
           "Share of the evicted entries that were merged into an entry that is kept, instead of being lost."),
    Metric("ops_step", "operators a step", "", 1, 0, "lower", "exact", "machine",
           "PyTorch operators that run in one decode step."),
    Metric("cats_step", "concatenations a step", "", 1, 0, "lower", "exact", "machine",
           "Operators of one decode step that build a new tensor out of others, such as a concatenation."),
    Metric("waits_step", "host waits a step", "", 1, 0, "lower", "exact", "machine",
           "Operators of one decode step whose result the CPU must wait for before it can go on."),
    Metric("launches_step", "kernels a step", "", 1, 0, "lower", "exact", "machine",
           "Kernels that one decode step launches on the device."),
    Metric("fresh_step_bytes", "fresh storage a step", "MiB", MIB, 2, "lower", "exact", "memory",
           "Storage of all new tensors that one decode step makes.", base="bytes"),
    Metric("live_bytes", "tensors alive", "MiB", MIB, 2, "lower", "exact", "memory",
           "Storage of all tensors that exist while decoding, less those that existed before the request.",
           base="bytes"),
    Metric("instructions_step", "instructions a step", "million", 1e-6, 2, "lower", "timed", "machine",
           "Instructions that the processor executes in one decode step, where its counters can be read (Linux, one "
           "thread). Other load hardly changes them.", tolerance=0.02),
    Metric("flops_step", "FLOPs a step", "MFLOP", 1e-6, 2, "lower", "exact", "machine",
           "Floating-point operations of one decode step, counted from its operators.", base="flop"),
)
# fmt: on

METRICS: dict[str, Metric] = {metric.key: metric for metric in _TABLE}
"""The metrics by key, in the order in which they are shown."""


def show(key: str, value: float | None, *, unit: bool = False) -> str:
    """A value in the unit and with the digits of its metric; a missing value is ``–``."""
    metric = METRICS[key]
    if value is None:
        return "–"
    text = f"{value * metric.scale:,.{metric.digits}f}"
    return f"{text} {metric.unit}".rstrip() if unit else text
