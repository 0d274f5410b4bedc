"""Checks the GPU path on the GPU that is here: kernels, CUDA graphs, speed and memory, in one or two minutes.

Everything is checked on a few layers of Llama-3-8B with random weights. :func:`gpu_checkup` yields findings like
:func:`d2obench.measure.checkup.checkup`; a check that fails is a finding, too, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from d2obench import compiler
from d2obench.cache import Session
from d2obench.errors import in_a_line, is_device_fault, is_out_of_memory
from d2obench.measure.checkup import Finding
from d2obench.measure.clock import clock_for
from d2obench.measure.nvml import Nvml, open_gpu
from d2obench.measure.roofline import copy_bandwidth, read_weights_bytes
from d2obench.models import LoadedModel
from d2obench.models.kernels import adapt
from d2obench.models.shapes import Shape

POLICIES = {
    "bfloat16": ("full", "streaming", "h2o", "d2o", "d2o(preset=mass)"), "float16": ("full", "d2o"),
    "float32": ("full", "d2o"),
}  # fmt: skip
"""The policies whose kernels are checked, by dtype."""
NEAR = {"bfloat16": 0.1, "float16": 0.05, "float32": 1e-3}
"""Largest difference of a logit between kernels and PyTorch operators, relative to the largest logit."""
GRAPHS = (("h2o", "0.2"), ("full", None), ("h2o", "0.6"), ("d2o", "0.2"))
"""Policies and budgets whose steps are captured, one after the other."""
TIMED = (("full", None), ("d2o", "0.2"))
"""Policies and budgets whose steps are timed."""
STEPS, BATCH, PROMPT = 8, 4, 300
SPEED_LAYERS, SPEED_BATCH, SPEED_PROMPT, SPEED_STEPS = 4, 32, 1024, 32
GOOD_MBU = 0.5
"""Share of the copy bandwidth that a decode step should reach."""
BLOCK = 2**30
REPORT = "please report it with this output"


def gpu_checkup(device: torch.device) -> Iterator[Finding]:
    """All findings about the GPU path on a CUDA ``device``, one after the other."""
    gpu = open_gpu(device)
    yield from _versions(device, gpu)
    for check in (_memory, _kernels, _graphs, _speed):
        try:
            yield from check(device, gpu)
        except Exception as problem:  # a library or a driver may raise anything; it is a finding
            name = check.__name__.strip("_")
            if is_out_of_memory(problem):
                yield Finding(name, "note", "too little memory is free for this check", "end what uses the GPU")
                continue
            yield Finding(
                name, "bad", f"failed: {in_a_line(problem)}", f"measure without it: {_without(name)}; {REPORT}"
            )
            if is_device_fault(problem):
                yield Finding("GPU", "bad", "it answers nothing any more in this process", "the rest is not checked")
                return


def _without(check: str) -> str:
    return {"graphs": "D2OBENCH_GRAPH=0", "kernels": "D2OBENCH_KERNELS=0"}.get(check, "D2OBENCH_KERNELS=0")


def _versions(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    major, minor = torch.cuda.get_device_capability(device)
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    name = torch.cuda.get_device_name(device)
    yield Finding("GPU", "ok", f"{name}, {total:.0f} GiB, compute capability {major}.{minor}")
    driver = gpu.facts()["driver"] if gpu else None
    try:
        triton = f"Triton {version('triton')}"
    except PackageNotFoundError:
        triton = "no Triton"
    yield Finding("versions", "ok", f"torch {torch.__version__}, CUDA {torch.version.cuda}, {triton}, driver {driver}")
    if reason := compiler.missing(device):
        yield Finding("kernels", "bad", f"can't be used: {reason}", "figures are those of PyTorch's operators")
    if reason := compiler.off("graph"):
        yield Finding("graphs", "note", f"are switched off: {reason}", "unset D2OBENCH_GRAPH")


def _memory(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    """Whether the driver sees the memory that PyTorch allocates."""
    if gpu is None:
        yield Finding("NVML", "note", "the driver does not answer", "clocks, power and other processes stay unknown")
        return
    used = gpu.columns.index("used_bytes")
    torch.cuda.empty_cache()
    before = gpu.read()[used]
    held = torch.empty(BLOCK, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    after = gpu.read()[used]
    del held
    torch.cuda.empty_cache()
    if before is None or after is None:
        yield Finding("NVML", "note", "does not tell the used memory", "peaks come from PyTorch's allocator alone")
        return
    grown = after - before
    right = abs(grown - BLOCK) <= BLOCK // 16
    text = f"sees {grown / 2**20:.0f} MiB more after PyTorch has allocated {BLOCK / 2**20:.0f} MiB"
    yield Finding("NVML", "ok" if right else "bad", text, "" if right else "end other programs on this GPU; try again")


def _kernels(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    """Kernels against PyTorch's operators: the same prompts and the same tokens, all logits."""
    for dtype, policies in POLICIES.items():
        model = _model(device, dtype, num_hidden_layers=2, vocab_size=512)
        for policy in policies:
            fast, session = _logits(model, policy)
            reasons = [reason for reason in session.remarks if "not captured" not in reason]
            session.close()
            plain, other = _logits(model, policy, {"kernels": "compared", "graph": "compared"})
            other.close()
            apart = float((fast - plain).abs().max() / plain.abs().max())
            name = f"kernels {dtype} {policy}"
            if reasons:
                yield Finding(name, "bad", "; ".join(reasons), REPORT)
            elif not apart <= NEAR[dtype]:
                yield Finding(
                    name, "bad", f"logits differ from PyTorch's by {apart:.2g}", f"D2OBENCH_KERNELS=0; {REPORT}"
                )
            else:
                yield Finding(name, "ok", f"as PyTorch's operators to {apart:.1g} of the largest logit")


def _graphs(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    """Two shapes are captured, then a third one that needs other kernels, and each again."""
    model = _model(device, "bfloat16", num_hidden_layers=2, vocab_size=512)
    for policy, budget in GRAPHS:
        name = f"graph {policy}{'@' + budget if budget else ''}"
        plain, other = _logits(model, policy, {"graph": "compared"}, budget)
        other.close()
        for _ in range(2):
            found, session = _logits(model, policy, {}, budget)
            reason, captured = session._steps.reason, session._steps.captured
            session.close()
        if not captured:
            yield Finding(name, "bad", f"not captured: {reason}", f"D2OBENCH_GRAPH=0 measures without graphs; {REPORT}")
            if compiler.ending():
                return
        elif not torch.equal(found, plain):
            yield Finding(name, "bad", "a replay computes something else", f"D2OBENCH_GRAPH=0; {REPORT}")
        else:
            yield Finding(name, "ok", "replays compute what single steps do")


def _speed(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    """A decode step against the time in which its bytes can be read."""
    model = _model(device, "bfloat16", num_hidden_layers=SPEED_LAYERS)
    bandwidth = copy_bandwidth(device, seconds=0.5).best
    yield Finding("bandwidth", "ok", f"{bandwidth / 1e9:,.0f} GB/s, read and written")
    weights, clock = read_weights_bytes(model.model), clock_for(device)
    for policy, budget in TIMED:
        session = _opened(model, policy, budget, SPEED_STEPS + 8, SPEED_BATCH, SPEED_PROMPT)
        tokens = torch.zeros(SPEED_BATCH, dtype=torch.long, device=device)
        with torch.inference_mode():
            for _ in range(8):
                session.step(tokens)
            clock.start()
            stamps = [clock.stamp()]
            for _ in range(SPEED_STEPS):
                session.step(tokens)
                stamps.append(clock.stamp())
        times = clock.read(stamps)
        steps = [b - a for a, b in pairwise(times)]
        bound = (weights + session.footprint().kv_bytes) / bandwidth
        share, path = bound / median(steps), session.decode_path
        session.close()
        text = f"{median(steps) * 1e3:.2f} ms, {share:.0%} of what the bandwidth allows; {path}".replace("%", " %")
        good = share >= GOOD_MBU
        remedy = "" if good else "d2obench profile quick --device cuda shows where the time goes"
        yield Finding(f"step {policy}{'@' + budget if budget else ''}", "ok" if good else "note", text, remedy)


def _model(device: torch.device, dtype: str, **changes: Any) -> LoadedModel:
    """Some layers of Llama-3-8B with random weights."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None  # noqa: E731
    with torch.no_grad():
        loaded = Shape("llama-3-8b", **changes).load(getattr(torch, dtype), device, progress)
    adapt(loaded.model)
    return loaded


def _opened(model: LoadedModel, policy: str, budget: str | None, steps: int, batch: int, prompt: int) -> Session:
    """A session that has read and compressed random prompts, of different lengths where there are few."""
    session = Session(model, policy, budget, max_new=steps)
    generator, vocabulary = torch.Generator().manual_seed(0), model.model.config.vocab_size
    lengths = [prompt - 7 * row if batch <= BATCH else prompt for row in range(batch)]
    session.prefill([torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths])
    session.compress()
    session.prepare()
    return session


def _logits(
    model: LoadedModel, policy: str, off: dict[str, str] | None = None, budget: str | None = "0.2"
) -> tuple[torch.Tensor, Session]:
    """All logits of some decode steps with given tokens; ``off`` are parts of the GPU path that are not used.

    Without ``off``, graphs are not used, so that the kernels themselves run.
    """
    compiler.switch_off({"graph": "kernels are compared"} if off is None else off)
    try:
        session = _opened(model, policy, None if policy == "full" else budget, STEPS, BATCH, PROMPT)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, model.model.config.vocab_size, (STEPS, BATCH), generator=generator).to(model.device)
        return torch.stack([session.step(one) for one in tokens]).float(), session
    finally:
        compiler.switch_off({})
