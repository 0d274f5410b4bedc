"""Is this machine fit to measure? What is here, what is missing, and what to type. Each check is one small function
that gives findings; none of them changes anything or raises."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from packaging.requirements import InvalidRequirement, Requirement

from d2obench.errors import D2OBenchError
from d2obench.measure.disturbance import between, load
from d2obench.measure.environment import fingerprint
from d2obench.measure.identity import block_on, recognise
from d2obench.measure.memory import ResidentMeter, probe_for
from d2obench.measure.nvml import Nvml, open_gpu, strangers, words
from d2obench.measure.selftest import known_delays

State = Literal["ok", "note", "bad"]
_GIB = 2**30


class Finding(NamedTuple):
    """One line: ``ok``, worth a ``note``, or ``bad`` for measuring; ``remedy`` is what to do or type."""

    topic: str
    state: State
    text: str
    remedy: str = ""


def checkup(device: torch.device) -> Iterator[Finding]:
    """All findings for measuring on ``device``, one after the other; takes a few seconds."""
    gpu = open_gpu(device) if device.type == "cuda" else None
    yield from _software()
    yield from _device(device, gpu)
    yield from _cpu()
    yield from _space()
    yield from _model()
    yield from _memory_meter(device, gpu)
    yield from _timing(device)
    yield from _others(device, gpu)


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
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "bad", "missing", f'pip install "{name}{wanted.specifier}"')
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield Finding(
                name, "bad", f"{found}, {wanted.specifier} is needed", f'pip install "{name}{wanted.specifier}"'
            )
        elif name in ("torch", "transformers"):
            yield Finding(name, "ok", found)


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
    held = torch.cuda.get_device_properties(device).total_memory / _GIB
    yield Finding("GPU", "ok", f"{name}, {held:.0f} GiB, CUDA {torch.version.cuda}")
    if gpu is None:
        yield Finding("NVML", "note", "the driver does not answer", "clocks, power and other processes stay unknown")
        return
    limit = f", power limit {facts['power_limit_w']:.0f} W" if facts["power_limit_w"] else ""
    ecc = {True: ", ECC on", False: ", ECC off", None: ""}[facts["ecc"]]
    yield Finding("driver", "ok", f"{facts['driver']}{limit}{ecc}")
    slow = words(gpu.slowdown())
    if slow:
        yield Finding(
            "clocks", "bad", f"slowed down now: {', '.join(slow)}", "let the GPU cool or raise its power limit"
        )
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
        yield Finding(
            "governor", "bad", f"{governor}: clocks follow the load", "sudo cpupower frequency-set -g performance"
        )


def _space() -> Iterator[Finding]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    yield Finding("memory", "ok", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free")
    if psutil.swap_memory().used > _GIB // 4 and memory.available < memory.total // 10:
        yield Finding("swap", "bad", "the machine is swapping", "end what fills its memory")
    little = disk.free < _GIB
    yield Finding("disk", "bad" if little else "ok", f"{disk.free / _GIB:.1f} GiB free", "free some" if little else "")


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
    for name, found in known_delays(device).items():
        text = f"a delay of {found.true * 1e3:.2f} ms is timed as {found.found * 1e3:.2f} ms"
        yield Finding(f"timed {name}", "ok" if found.right else "bad", text, "" if found.right else "calm the machine")


def _others(device: torch.device, gpu: Nvml | None) -> Iterator[Finding]:
    before = load()
    time.sleep(1.0)
    flags = between(before, load()).flags()
    yield Finding("other load", "bad" if flags else "ok", ", ".join(flags) or "calm", "end it" if flags else "")
    if gpu is not None:  # this process has used the GPU by now, and may stand there by another number
        recognise(gpu, lambda: block_on(device))
    for owner in strangers(gpu):
        text = f"process {owner.pid} ({owner.name}) computes on the GPU"
        yield Finding("GPU in use", "bad", text, "end it, or use --allow-busy")
