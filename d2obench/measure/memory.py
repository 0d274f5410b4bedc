"""Measures memory: the peak of each phase, memory over time, and the tensors that exist.

The *peaks* of a phase are exact. They come from counters that are reset when a phase begins: the kernel's high-water
mark of the resident set (``VmHWM``, reset through ``/proc/self/clear_refs``) and the peak counters of PyTorch's CUDA
allocator. The *timeline* comes from a thread that reads memory every few milliseconds (:class:`Sampler`). A peak is
taken from it only where no counter can be reset: of the resident set on some kernels, and of a GPU as its driver sees
it.
"""

from __future__ import annotations

import atexit
import gc
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import psutil

if TYPE_CHECKING:
    import torch


PHASES = ("prefill", "compress", "decode")
GPU_INTERVAL = 0.1
"""Seconds between two samples of a GPU: a row takes nine queries of the driver, which itself updates its figures ten
times a second. Energy comes from the driver's counter, so that it needs no more."""
_STATM, _PAGE = "/proc/self/statm", mmap.PAGESIZE
Row = tuple[float | None, ...]
"""Time and values of one reading; None where a value is unknown."""


class Sampler:
    """A thread that collects rows ``(t, *read())`` every few milliseconds and measures what that costs.

    Args:
        read: returns a value for each of ``columns``, None where it is unknown; it must not raise.
        columns: the names of the values, with units, for example ``rss_bytes``.
        interval: seconds between two readings.
        now: the clock of ``t``; the same that the phase marks come from.
    """

    def __init__(
        self,
        read: Callable[[], Row],
        columns: Sequence[str],
        interval: float = 0.02,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.columns = tuple(columns)
        self.rows: list[Row] = []
        self._read, self._interval, self._now = read, interval, now
        self._busy = self._alive = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def sample(self) -> None:
        """Adds a row now; called at every change of phase, so that even a short phase has a row."""
        with self._lock:
            before = time.thread_time()
            t = self._now()
            self.rows.append((t, *self._read()))
            self._busy += time.thread_time() - before

    def start(self) -> None:
        """Discards all rows and starts the thread."""
        self.stop()
        self.rows, self._busy, self._alive = [], 0.0, time.perf_counter()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="d2obench-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after one last row; does nothing where none runs."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self.sample()
        self._thread = None
        self._alive = time.perf_counter() - self._alive

    @property
    def overhead(self) -> float:
        """Share of one core that the sampling took, in [0, 1]; known after ``stop``."""
        return self._busy / self._alive if self._alive > 0 else 0.0

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self._interval)


def peak_between(rows: Sequence[Row], column: int, start: float, end: float) -> float | None:
    """The highest value of ``column`` with ``start <= t <= end``; None where there is none.

    Column 0 is the first one after the time.
    """
    inside = [
        value
        for row in rows
        if row[0] is not None and start <= row[0] <= end and (value := row[column + 1]) is not None
    ]
    return max(inside, default=None)


class Meter(Protocol):
    """A counter of peaks that can be reset."""

    def reset(self) -> None:
        """The peak counts from now on."""

    def read(self) -> dict[str, int]:
        """Peaks in bytes since the last reset, by name."""


class ResidentMeter:
    """The kernel's high-water mark of this process's resident set (proc(5): ``clear_refs`` value 5, ``VmHWM``)."""

    def reset(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def read(self) -> dict[str, int]:
        with open("/proc/self/status", "rb") as file:
            text = file.read()
        return {"rss_bytes": int(text[text.index(b"VmHWM:") + 6 :].split(None, 1)[0]) * 1024}

    @classmethod
    def usable(cls) -> bool:
        """Whether this kernel lets the mark be reset and read."""
        try:
            cls().reset()
            return cls().read()["rss_bytes"] > 0
        except (OSError, ValueError, IndexError):
            return False


class CudaMeter:
    """Peaks of PyTorch's CUDA allocator: bytes requested by tensors, allocated in blocks, reserved from the driver.

    The peaks of several devices are added up, although they may have been reached at different times.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._devices = devices

    def reset(self) -> None:
        import torch

        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, int]:
        import torch

        stats = [torch.cuda.memory_stats_as_nested_dict(device) for device in self._devices]
        kinds = ("requested", "allocated", "reserved")
        return {f"{kind}_bytes": sum(int(of[f"{kind}_bytes"]["all"]["peak"]) for of in stats) for kind in kinds}


class MemoryProbe:
    """Measures the memory of one request at a time: ``start``, then ``enter`` at every phase, then ``stop``.

    Args:
        meters: counters of peaks, reset at every change of phase.
        host: samples the resident set; its first column is ``rss_bytes``.
        device: samples the GPU through NVML, where there is one.
    """

    def __init__(self, meters: Sequence[Meter], host: Sampler, device: Sampler | None = None) -> None:
        self.meters, self.host, self.device = tuple(meters), host, device
        self.peaks: dict[str, dict[str, int]] = {}
        self._phase: str | None = None
        self._spans: list[tuple[str, float, float]] = []
        self._since = 0.0

    def start(self) -> None:
        """Discards the last request and starts the samplers."""
        self.peaks, self._spans, self._phase = {}, [], None
        self.host.start()
        if self.device:
            self.device.start()

    def enter(self, phase: str | None) -> None:
        """Ends the present phase and begins ``phase``, or with None a pause without peaks.

        A phase may be entered several times; its highest peak counts.
        """
        # 1. One row of the timeline at the boundary gives it its time on the samplers' clock.
        self.host.sample()
        now = self.host.rows[-1][0] or 0.0
        # 2. Read the exact peaks of the phase that ends. Its span of time is kept for peaks that only sampling gives.
        if self._phase is not None:
            self._spans.append((self._phase, self._since, now))
            for meter in self.meters:
                for key, value in meter.read().items():
                    self._note_peak(self._phase, key, value)
        # 3. Reset the counters, so that the next phase does not inherit the peak of this one.
        self._phase, self._since = phase, now
        if phase is not None:
            for meter in self.meters:
                meter.reset()

    def stop(self) -> None:
        """Ends the last phase and the samplers, and adds the peaks that only the samples give."""
        if self._phase is not None:
            self.enter(None)
        self.host.stop()
        if self.device:
            self.device.stop()
        # 1. The resident peak, where the kernel's mark can't be reset.
        if not any(isinstance(meter, ResidentMeter) for meter in self.meters):
            for phase, start, end in self._spans:
                self._note_peak(phase, "rss_bytes", peak_between(self.host.rows, 0, start, end))
        # 2. What NVML says about the GPU: it has no counter of peaks.
        if self.device:
            for column in ("used_bytes", "process_bytes"):
                index = self.device.columns.index(column)
                for phase, start, end in self._spans:
                    self._note_peak(phase, f"nvml_{column}", peak_between(self.device.rows, index, start, end))

    @property
    def overhead(self) -> float:
        """Share of one core that all sampling of the last request took; known after ``stop``."""
        return self.host.overhead + (self.device.overhead if self.device else 0.0)

    def _note_peak(self, phase: str, key: str, value: float | None) -> None:
        if value is not None:
            peaks = self.peaks.setdefault(phase, {})
            peaks[key] = max(peaks.get(key, 0), int(value))


def probe_for(
    device: torch.device,
    *,
    interval: float = 0.02,
    now: Callable[[], float] = time.perf_counter,
    nvml: Any | None = None,
    beside: Sequence[torch.device] = (),
) -> MemoryProbe:
    """The memory probe of a device.

    Args:
        device: where the model is.
        interval: seconds between two samples of the timeline; a GPU is not sampled more often than every
            :data:`GPU_INTERVAL`.
        now: the clock of the phase marks.
        nvml: an open :class:`d2obench.measure.nvml.Nvml` of that device, or None.
        beside: the other devices that the model is spread over.
    """
    meters: list[Meter] = [ResidentMeter()] if ResidentMeter.usable() else []
    if device.type == "cuda":
        meters.append(CudaMeter(device, *beside))
    return MemoryProbe(
        meters,
        Sampler(_resident, ("rss_bytes",), interval, now),
        Sampler(nvml.read, nvml.columns, max(interval, GPU_INTERVAL), now) if nvml else None,
    )


def settle(device: torch.device | None = None, beside: Sequence[torch.device] = ()) -> None:
    """Returns freed memory to the system, so that the peaks of one cell do not include memory of the previous one."""
    from d2obench.cpu import memory as host_memory

    gc.collect()
    host_memory.release()
    if device is not None and device.type == "cuda":
        import torch

        for gpu in (device, *beside):
            torch.cuda.synchronize(gpu)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(gpu)


def unique_bytes() -> int | None:
    """USS: the memory that would be freed if this process ended; None where it is unknown. The call takes some
    milliseconds."""
    try:
        return int(psutil.Process().memory_full_info().uss)
    except (psutil.Error, OSError, AttributeError):
        return None


def live_bytes() -> int:
    """Bytes of all tensor storages that Python can reach, on all devices, each storage counted once.

    The difference between two readings is the cache, the policy's state, and anything else that a request has kept,
    such as a forgotten reference to the prompt's full keys. It is exact, whereas a resident set changes by some MiB for
    no visible reason.
    """
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            try:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # a tensor without storage of its own
                continue
    storages.pop(0, None)
    return sum(storages.values())


class GarbageCollection:
    """Keeps long-lived objects out of Python's garbage collection while requests are timed.

    A full collection in the middle of a decode step would visit every object that torch and transformers have made.
    ``gc.freeze`` exempts all objects that exist, and ``gc.unfreeze`` ends that for all of them at once. A worker
    exempts its model for as long as it is loaded, so the end of a timed request must not unfreeze then:
    ``_model_exempt`` says so. Objects that are exempt when the interpreter ends are never freed, which some libraries
    report as leaks, so the exemption ends before that.
    """

    _model_exempt = False

    @classmethod
    def exempt_model(cls) -> None:
        """Exempts everything that exists now, until :meth:`release_model`: for a worker that has loaded a model."""
        gc.collect()
        gc.freeze()
        cls._model_exempt = True
        atexit.unregister(gc.unfreeze)  # so that it is registered once, however many models are loaded
        atexit.register(gc.unfreeze)

    @classmethod
    def release_model(cls) -> None:
        """Ends :meth:`exempt_model`; the model can be collected again."""
        gc.unfreeze()
        cls._model_exempt = False

    @classmethod
    def begin_timing(cls) -> None:
        """Exempts everything that exists now, until :meth:`end_timing`."""
        if not cls._model_exempt:
            gc.freeze()

    @classmethod
    def end_timing(cls) -> None:
        """Ends :meth:`begin_timing`; a model that is exempt stays so."""
        if not cls._model_exempt:
            gc.unfreeze()


def _resident() -> Row:
    try:
        with open(_STATM, "rb") as file:
            return (int(file.read().split()[1]) * _PAGE,)
    except (OSError, ValueError, IndexError):
        return (float(psutil.Process().memory_info().rss),)
