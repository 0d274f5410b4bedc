"""Checks whether this machine is fit for measurements, says what to do if it is not, and measures how noisy it is.

:func:`checkup` yields findings. Each check is a small function; none changes anything or raises an error. Some test the
measurement itself: they time a request whose phases take known times (:func:`known_delays`).

:func:`measure_noise` times the same decode loop twice, interleaved, as if it were two versions (A/A), so that any
difference is noise. From the paired log-ratios follows the smallest true change that the gate's rule would detect four
times out of five; the rule is that the lower 98 % bound of the median log-ratio is above its limit.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from packaging.requirements import InvalidRequirement, Requirement
from torch.nn import functional

from d2obench.errors import D2OBenchError
from d2obench.measure.clock import clock_for
from d2obench.measure.disturbance import between, load
from d2obench.measure.environment import fingerprint
from d2obench.measure.instructions import why_not
from d2obench.measure.memory import ResidentMeter, probe_for
from d2obench.measure.nvml import Nvml, block_on, find_own_process, open_gpu, other_processes, slowdown_names
from d2obench.measure.phases import Mark, measure_request
from d2obench.stats.intervals import trimmed_t

State = Literal["ok", "note", "bad"]
_GIB = 2**30
_DELAY = 0.005
"""Seconds of one delay of :func:`known_delays`."""
_BATCH, _GEN = 2, 16
LEVEL, POWER = 0.98, 0.8
"""The gate's rule: the coverage of its interval; and the probability with which a change should be detected."""
ROUNDS = (8, 16, 32)
"""Numbers of rounds for which the smallest detectable change is computed."""
_TRIALS = 1000
"""Runs that are drawn for that from the measured noise."""


class Finding(NamedTuple):
    """One line of the report: ``ok``, ``note`` (worth knowing) or ``bad`` (disturbs measurements); ``remedy`` is what
    to do or type."""

    topic: str
    state: State
    text: str
    remedy: str = ""


def checkup(device: torch.device) -> Iterator[Finding]:
    """All findings about measuring on ``device``, one after the other; takes a few seconds."""
    gpu = open_gpu(device) if device.type == "cuda" else None
    yield from _software()
    yield from _device(device, gpu)
    yield from _cpu()
    yield from _space()
    yield from _model()
    yield from _memory_meter(device, gpu)
    yield from _timing(device)
    yield from _counters()
    yield from _other_load(device, gpu)


def _software() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    for line in requires("d2obench") or ():
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = wanted.name
        install = f'pip install "{name}{wanted.specifier}"'
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield Finding(name, "bad", "missing", install)
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            yield Finding(name, "bad", f"{installed}, {wanted.specifier} is needed", install)
        elif name in ("torch", "transformers"):
            yield Finding(name, "ok", installed)


def _device(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    if device.type != "cuda":
        seen = open_gpu()
        name = seen.facts()["gpu"] if seen else None
        if name and not torch.cuda.is_available():
            how = "install the CUDA build of torch: see pytorch.org/get-started"
            yield Finding("GPU", "bad", f"{name} is here but this torch can't use it", how)
        else:
            yield Finding("GPU", "note", "none in use: the CPU is measured")
        return
    facts = gpu.facts() if gpu else {}
    name = facts.get("gpu") or torch.cuda.get_device_name(device)
    total = torch.cuda.get_device_properties(device).total_memory / _GIB
    yield Finding("GPU", "ok", f"{name}, {total:.0f} GiB, CUDA {torch.version.cuda}")
    if gpu is None:
        yield Finding("NVML", "note", "the driver does not answer", "clocks, power and other processes stay unknown")
        return
    limit = f", power limit {facts['power_limit_w']:.0f} W" if facts["power_limit_w"] else ""
    ecc = {True: ", ECC on", False: ", ECC off", None: ""}[facts["ecc"]]
    yield Finding("driver", "ok", f"{facts['driver']}{limit}{ecc}")
    if slow := slowdown_names(gpu.slowdown()):
        remedy = "let the GPU cool or raise its power limit"
        yield Finding("clocks", "bad", f"slowed down now: {', '.join(slow)}", remedy)
    missing = [name for name, value in zip(gpu.columns, gpu.read(), strict=True) if value is None]
    if missing:
        yield Finding("NVML", "note", f"does not tell {', '.join(missing)}", "those figures stay empty")


def _cpu() -> Iterator[Finding]:
    facts = fingerprint()
    yield Finding("CPU", "ok", f"{facts['cpu']}, {facts['cores']} cores, torch uses {facts['threads']} threads")
    if facts["threads"] and facts["usable_cores"] and facts["threads"] > facts["usable_cores"]:
        fix = f"OMP_NUM_THREADS={facts['usable_cores']}"
        yield Finding("threads", "bad", f"more threads than the {facts['usable_cores']} usable cores", f"set {fix}")
    governor = facts["governor"]
    if governor and governor != "performance":
        remedy = "sudo cpupower frequency-set -g performance"
        yield Finding("governor", "bad", f"{governor}: clocks follow the load", remedy)


def _space() -> Iterator[Finding]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    yield Finding("memory", "ok", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free")
    if psutil.swap_memory().used > _GIB // 4 and memory.available < memory.total // 10:
        yield Finding("swap", "bad", "the machine is swapping", "end what fills its memory")
    low = disk.free < _GIB
    yield Finding("disk", "bad" if low else "ok", f"{disk.free / _GIB:.1f} GiB free", "free some" if low else "")


def _model() -> Iterator[Finding]:
    from d2obench.models.embedded import Embedded

    source = Embedded()
    if source.folder.is_dir():
        yield Finding("model", "ok", "embedded is in the cache")
        return
    try:
        source.check()
        yield Finding("model", "note", "embedded is fetched on first use", "d2obench models pull embedded")
    except D2OBenchError as problem:
        yield Finding("model", "bad", f"embedded can't be fetched: {problem.what}", problem.remedy)


def _memory_meter(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    if ResidentMeter.usable():
        yield Finding("RSS peaks", "ok", "exact: the kernel's high-water mark can be reset")
    else:
        yield Finding("RSS peaks", "note", "sampled: the kernel's high-water mark can't be reset here")
    probe = probe_for(device, nvml=gpu)
    probe.start()
    time.sleep(1.0)
    probe.stop()
    for name, sampler in (("memory sampler", probe.host), ("NVML sampler", probe.device)):
        if sampler is not None:
            state: State = "ok" if sampler.overhead < 0.02 else "bad"
            yield Finding(name, state, f"takes {sampler.overhead:.2%} of one core, {len(sampler.rows)} rows a second")


def _timing(device: torch.device) -> Iterator[Finding]:
    for name, delay in known_delays(device).items():
        text = f"a delay of {delay.true * 1e3:.2f} ms is timed as {delay.measured * 1e3:.2f} ms"
        remedy = "" if delay.right else "end other programs and try again"
        yield Finding(f"timed {name}", "ok" if delay.right else "bad", text, remedy)


def _counters() -> Iterator[Finding]:
    why = why_not()
    text = f"can't be counted: {why}" if why else 'can be counted: add "instructions_step" to gate.metrics'
    yield Finding("instructions", "note" if why else "ok", text)


def _other_load(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    before = load()
    time.sleep(1.0)
    flags = between(before, load()).flags()
    yield Finding("other load", "bad" if flags else "ok", ", ".join(flags) or "calm", "end it" if flags else "")
    if gpu is not None:  # the checks above used the GPU, so this process is in the driver's list by now
        find_own_process(gpu, lambda: block_on(device))
    for process in other_processes(gpu):
        text = f"process {process.pid} ({process.name}) computes on the GPU"
        yield Finding("GPU in use", "bad", text, "end it, or use --allow-busy")


class Delay(NamedTuple):
    """What a phase really took and what was measured, in seconds."""

    true: float
    measured: float

    @property
    def right(self) -> bool:
        """Whether both agree within 5 % and half a millisecond."""
        return abs(self.measured - self.true) <= 0.05 * self.true + 0.0005


def known_delays(device: torch.device) -> dict[str, Delay]:
    """Times a request whose prefill takes four delays, its compression two, and each decode step one.

    On a CPU a delay is a busy wait of 5 ms. It takes longer if other programs use the CPU, so its true length is read
    from a separate clock. On a GPU a delay is a spinning kernel, for which the host does not wait; its true length is
    measured before, by the wall clock while the host does wait.
    """
    delay = _kernel_delay(device) if device.type == "cuda" else _wait
    sessions: list[_DelaySession] = []

    def factory(mark: Mark) -> _DelaySession:
        sessions.append(_DelaySession(mark, delay, device))
        return sessions[0]

    trace = measure_request(factory, [[1]] * _BATCH, _GEN, clock=clock_for(device), memory=probe_for(device))
    spent = sessions[0].spent
    return {
        "TTFT": Delay(sum(spent["prefill"]) + sum(spent["compress"]), trace.ttft_s),
        "prefill": Delay(sum(spent["prefill"]), trace.prefill_s),
        "compress": Delay(sum(spent["compress"]), trace.compress_s),
        "TPOT": Delay(median(spent["decode"]), median(trace.step_s)),
    }


class _DelaySession:
    """A session that only waits. Prefill and compression alternate, as with a policy that compresses layer by layer."""

    def __init__(self, mark: Mark, delay: Callable[[], float], device: torch.device) -> None:
        self._mark, self._delay = mark, delay
        self._logits = torch.zeros(_BATCH, 8, device=device)
        self.spent: dict[str, list[float]] = {"prefill": [], "compress": [], "decode": []}

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        for phase in ("prefill", "prefill", "compress", "prefill", "prefill"):
            self._mark(phase)
            self.spent[phase].append(self._delay())
        return self._logits

    def compress(self) -> None:
        self._mark("compress")
        self.spent["compress"].append(self._delay())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.spent["decode"].append(self._delay())
        return self._logits

    def skip_to(self, tokens: int) -> None:
        """Does nothing: every step takes the same time."""

    def footprint(self) -> Any:
        return SimpleNamespace(
            kv_bytes=0, prompt_kv_bytes=0, state_bytes=0, requested=None, effective=1.0, kept=[], held=[], over=False,
            merged=0, evicted=0, merged_layers=[], evicted_layers=[], read_bytes=None,
        )  # fmt: skip

    def close(self) -> None:
        """Nothing is held."""


def _wait() -> float:
    start = time.monotonic_ns()
    while (taken := time.monotonic_ns() - start) < _DELAY * 1e9:
        pass
    return taken * 1e-9


def _kernel_delay(device: torch.device) -> Callable[[], float]:
    """A function that launches a kernel of about one delay and returns how long such a kernel takes."""

    def launch(cycles: int) -> None:
        with torch.cuda.device(device):
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

    def wall(cycles: int) -> float:
        torch.cuda.synchronize(device)
        before = time.perf_counter()
        launch(cycles)
        torch.cuda.synchronize(device)
        return time.perf_counter() - before

    # 1. The first launch loads the kernel. 2. The cycles of one delay follow from a shorter kernel.
    # 3. Its true length is the shortest of ten, since anything else on the machine only adds to the wall clock.
    wall(1000)
    cycles = int(1_000_000 * _DELAY / min(wall(1_000_000) for _ in range(5)))
    true = min(wall(cycles) for _ in range(10))

    def delay() -> float:
        launch(cycles)
        return true

    return delay


class Noise(NamedTuple):
    """The result of an A/A run.

    Args:
        pairs: the median step of arm A and of arm B in each round, in seconds.
        single: the standard deviation of the logarithms of one arm's rounds.
        paired: the standard deviation of the log-ratios B ÷ A.
        offset: the median ratio B ÷ A less 1; it is noise alone.
        detectable: number of rounds → the smallest relative change that is detected with probability POWER.
    """

    pairs: list[tuple[float, float]]
    single: float
    paired: float
    offset: float
    detectable: dict[int, float]


class DecodeLoop:
    """A stand-in for a model's decode step: reads weights and a cache once a step, with small operators between.

    They are far larger than the caches of a processor: about 100 MB on a CPU and 800 MB on a GPU.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        large = device.type == "cuda"
        width, layers, self._heads, batch, held = (2048, 6, 16, 8, 1024) if large else (512, 4, 8, 4, 1024)
        kind = torch.bfloat16 if large else torch.float32
        rng = torch.Generator(device).manual_seed(seed)

        def weights(*shape: int) -> torch.Tensor:
            drawn: torch.Tensor = torch.randn(*shape, generator=rng, device=device, dtype=kind)
            return drawn.div_(shape[0] ** 0.5)

        matrices = ((width, 3 * width), (width, 3 * width), (3 * width, width))
        self._layers = [tuple(weights(*shape) for shape in matrices) for _ in range(layers)]
        cache = (batch, self._heads, held, width // self._heads)
        self._cache = [(weights(*cache), weights(*cache)) for _ in range(layers)]
        self._state = weights(batch, width)

    @torch.inference_mode()
    def step(self) -> None:
        """One step; its result feeds the next."""
        x = self._state
        for (mix, up, down), (keys, values) in zip(self._layers, self._cache, strict=True):
            query = (functional.rms_norm(x, x.shape[-1:]) @ mix).chunk(3, -1)[0].view(x.shape[0], self._heads, 1, -1)
            x = x + functional.scaled_dot_product_attention(query, keys, values).flatten(1)
            x = x + functional.silu(functional.rms_norm(x, x.shape[-1:]) @ up) @ down
        self._state = functional.rms_norm(x, x.shape[-1:])


def measure_noise(
    device: torch.device, seconds: float = 60.0, steps: int = 8, progress: Callable[[float], None] | None = None
) -> Noise:
    """Measures the A/A noise for about ``seconds``, in at least eight rounds.

    Args:
        device: where the loops run.
        seconds: how long to measure.
        steps: decode steps of each arm in a round; their median is the sample.
        progress: called with the part of the time that is over, from 0 to 1.
    """
    arms = (DecodeLoop(device, 0), DecodeLoop(device, 1))
    clock = clock_for(device)

    def sample(arm: DecodeLoop) -> float:
        clock.start()
        stamps = [clock.stamp()]
        for _ in range(steps):
            arm.step()
            stamps.append(clock.stamp())
        return float(np.median(np.diff(clock.read(stamps))))

    for arm in arms:
        sample(arm)
    pairs: list[tuple[float, float]] = []
    begin = time.monotonic()
    while len(pairs) < ROUNDS[0] or time.monotonic() - begin < seconds:
        if len(pairs) % 2:
            b, a = sample(arms[1]), sample(arms[0])
        else:
            a, b = sample(arms[0]), sample(arms[1])
        pairs.append((a, b))
        if progress:
            progress(min(1.0, (time.monotonic() - begin) / max(seconds, 1e-9)))
    return noise_of(pairs)


def noise_of(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Noise:
    """The figures of an A/A run of two or more rounds; the same ``seed`` gives the same figures."""
    logs = np.log(np.asarray(pairs, dtype=np.float64))
    ratios = logs[:, 1] - logs[:, 0]
    return Noise(
        list(pairs),
        single=float(logs.std(axis=0, ddof=1).mean()),
        paired=float(ratios.std(ddof=1)),
        offset=float(np.expm1(np.median(ratios))),
        detectable={n: _detectable(ratios, n, seed) for n in ROUNDS},
    )


def _detectable(ratios: np.ndarray, rounds: int, seed: int) -> float:
    """The smallest relative change whose lower bound is above 0 with probability POWER."""
    # 1. Draw many runs of ``rounds`` log-ratios from the measured noise, centred on no change.
    rng = np.random.default_rng(seed)
    noise = ratios - np.median(ratios)
    runs = noise[rng.integers(0, len(noise), (_TRIALS, rounds))]
    # 2. The lower bound of each run's median.
    lower, _ = trimmed_t(runs, LEVEL)
    # 3. A change shifts all bounds alike. It must lift the bound at the quantile 1 − POWER to 0.
    return float(np.expm1(-np.quantile(lower, 1 - POWER)))
