"""Peak memory of each phase, and the line of memory over time that shows where it came from.

Two sources, never mixed. The *peaks* are exact: the kernel's high-water mark of the resident set (``VmHWM``, reset
through ``/proc/self/clear_refs`` at every phase) and the CUDA allocator's own peak counters (reset likewise). The
*timeline* is sampled by a thread; it stands in for the resident peak only where the kernel won't reset its mark.
"""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from d2obench.measure.sampler import Row, Sampler, peak_between

if TYPE_CHECKING:
    import torch

PHASES = ("prefill", "compress", "decode")
_STATM, _PAGE = "/proc/self/statm", mmap.PAGESIZE


class Meter(Protocol):
    """A counter of peaks that can be set back."""

    def reset(self) -> None: ...

    def read(self) -> dict[str, int]: ...


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
    """Peaks of PyTorch's CUDA allocator: bytes requested by tensors, handed out in blocks, reserved from the driver.

    Those of several devices are added up, though they need not fall together.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._devices = devices

    def reset(self) -> None:
        import torch

        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, int]:
        import torch

        every = [torch.cuda.memory_stats_as_nested_dict(device) for device in self._devices]
        kinds = ("requested", "allocated", "reserved")
        return {f"{kind}_bytes": sum(int(of[f"{kind}_bytes"]["all"]["peak"]) for of in every) for kind in kinds}


class MemoryProbe:
    """Follows one request at a time: ``start``, ``enter`` each phase, ``stop``.

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
        """Starts the samplers and forgets what was there before."""
        self.peaks, self._spans, self._phase = {}, [], None
        self.host.start()
        if self.device:
            self.device.start()

    def enter(self, phase: str | None) -> None:
        """Closes the running phase and opens ``phase``; None pauses. Phases may come back; the higher peak stands."""
        self.host.sample()
        now = self.host.rows[-1][0] or 0.0
        if self._phase is not None:
            self._spans.append((self._phase, self._since, now))
            for meter in self.meters:
                for key, value in meter.read().items():
                    self._raise(self._phase, key, value)
        self._phase, self._since = phase, now
        if phase is not None:
            for meter in self.meters:
                meter.reset()

    def stop(self) -> None:
        """Ends the last phase and the samplers; without a resettable high-water mark, peaks come from the samples."""
        if self._phase is not None:
            self.enter(None)
        self.host.stop()
        if self.device:
            self.device.stop()
        if not any(isinstance(meter, ResidentMeter) for meter in self.meters):
            for phase, start, end in self._spans:
                self._raise(phase, "rss_bytes", peak_between(self.host.rows, 0, start, end))
        if self.device:
            for column in ("used_bytes", "process_bytes"):
                index = self.device.columns.index(column)
                for phase, start, end in self._spans:
                    self._raise(phase, f"nvml_{column}", peak_between(self.device.rows, index, start, end))

    @property
    def overhead(self) -> float:
        """Share of one core that all sampling of the last request took; known after ``stop``."""
        return self.host.overhead + (self.device.overhead if self.device else 0.0)

    def _raise(self, phase: str, key: str, value: float | None) -> None:
        if value is not None:
            held = self.peaks.setdefault(phase, {})
            held[key] = max(held.get(key, 0), int(value))


def probe_for(
    device: torch.device,
    *,
    interval: float = 0.02,
    now: Callable[[], float] = time.perf_counter,
    nvml: Any | None = None,
    beside: Sequence[torch.device] = (),
) -> MemoryProbe:
    """The probe of a device.

    Args:
        device: where the model is.
        interval: seconds between two samples of the timeline.
        now: the clock of the phase marks.
        nvml: an open :class:`d2obench.measure.nvml.Nvml` of that device, or None.
        beside: the other devices that the model lies on.
    """
    meters: list[Meter] = [ResidentMeter()] if ResidentMeter.usable() else []
    if device.type == "cuda":
        meters.append(CudaMeter(device, *beside))
    return MemoryProbe(
        meters,
        Sampler(_resident, ("rss_bytes",), interval, now),
        Sampler(nvml.read, nvml.columns, interval, now) if nvml else None,
    )


def settle(device: torch.device | None = None, beside: Sequence[torch.device] = ()) -> None:
    """Gives freed memory back to the system, so that a cell does not inherit the peaks of the one before."""
    from d2obench.cpu import memory as host_memory

    gc.collect()
    host_memory.release()
    if device is not None and device.type == "cuda":
        import torch

        for one in (device, *beside):
            torch.cuda.synchronize(one)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(one)


def unique_bytes() -> int | None:
    """USS: memory that would be freed if this process ended; None where it can't be told. Takes milliseconds."""
    try:
        return int(psutil.Process().memory_full_info().uss)
    except (psutil.Error, OSError, AttributeError):
        return None


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception means that the device's or the machine's memory ended."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(problem, RuntimeError) and any(word in str(problem) for word in words)


def _resident() -> Row:
    try:
        with open(_STATM, "rb") as file:
            return (int(file.read().split()[1]) * _PAGE,)
    except (OSError, ValueError, IndexError):
        return (float(psutil.Process().memory_info().rss),)
