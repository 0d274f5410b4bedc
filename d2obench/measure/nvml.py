"""Reads from the NVIDIA driver (NVML): memory, clocks, power, temperature, energy, and the processes on a GPU.

No query ends a measurement. One that the driver, a container, WSL or a MIG slice does not support returns None and is
not tried again; after a driver has died all of them return None; without a driver :func:`open_gpu` returns None.

In a container the driver may list processes by their pids on the host, and a process can't see its own pid there
(pid_namespaces(7)). :func:`find_own_process` therefore allocates a block of memory: the one process of the list that
appears or grows by exactly that much is this one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from d2obench.errors import MeasureError
from d2obench.measure.memory import Row

if TYPE_CHECKING:
    import torch

COLUMNS = (
    "used_bytes",
    "process_bytes",
    "utilisation_percent",
    "sm_mhz",
    "memory_mhz",
    "power_w",
    "energy_j",
    "temperature_c",
    "slowdown",
)
SLOWDOWNS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x200: "board limit",
    0x400: "reliability limit",
}
"""The reasons in NVML's bit mask for which a GPU runs slower than it is set to. That it is idle, or that a user has set
its clocks, is none of them."""
SLOWED_SHARE = 0.1
"""Share of the samples of a request from which a slowdown counts: GPUs reach their power limit for a moment in normal
work."""
BLOCK = 66 * 2**20
"""Bytes that :func:`find_own_process` allocates: PyTorch's allocator gives this size a segment of its own, and no other
program is likely to allocate exactly as much."""

_POWER, _ENERGY = COLUMNS.index("power_w") + 1, COLUMNS.index("energy_j") + 1
_COUNTER_SPAN, _POWER_SPAN = 0.5, 2.0
"""Shortest times in seconds over which energy is reported: the energy counter advances in steps of up to 0.1 s, and
recent GPUs report power as the mean over the last second."""

Rows = Sequence[Sequence[float | None]]


class GpuProcess(NamedTuple):
    """A process that computes on the GPU; ``bytes`` is None where the driver does not tell."""

    pid: int
    name: str
    bytes: int | None


class Nvml:
    """One GPU.

    Args:
        handle: NVML's handle of it.
        library: the module ``pynvml``, or a stand-in with its functions.
        pid: the process whose memory is ``process_bytes``; by default this one.

    ``pids`` are the pids that this process may have in the driver's list; :func:`find_own_process` reduces them to one.
    """

    columns = COLUMNS

    def __init__(self, handle: Any, library: Any, pid: int | None = None) -> None:
        self._handle, self._library = handle, library
        self.pids = own_pids() if pid is None else frozenset({pid})
        self._unsupported: set[str] = set()

    def read(self) -> Row:
        """One row of ``columns``; never raises."""
        library = self._library
        memory = self.ask("nvmlDeviceGetMemoryInfo")
        rates = self.ask("nvmlDeviceGetUtilizationRates")
        own = next((process.bytes for process in self._unnamed_processes() if process.pid in self.pids), None)
        return (
            _number(getattr(memory, "used", None)),
            _number(own),
            _number(getattr(rates, "gpu", None)),
            _number(self.ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_SM)),
            _number(self.ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_MEM)),
            _number(self.ask("nvmlDeviceGetPowerUsage"), 1e-3),
            _number(self.ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3),
            _number(self.ask("nvmlDeviceGetTemperature", library.NVML_TEMPERATURE_GPU)),
            _number(self.slowdown()),
        )

    def slowdown(self) -> int | None:
        """The bits of SLOWDOWNS that are set now; None where the driver does not tell."""
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            reasons = self.ask(name)
            if isinstance(reasons, int):
                return reasons & sum(SLOWDOWNS)
        return None

    def processes(self) -> list[GpuProcess]:
        """The processes that compute on this GPU, the largest first."""
        named = [process._replace(name=_name(process.pid)) for process in self._unnamed_processes()]
        return sorted(named, key=lambda process: -(process.bytes or 0))

    def facts(self) -> dict[str, Any]:
        """Facts that don't change during a run: name, driver, limits, settings. Unsupported ones are None."""
        library = self._library
        memory = self.ask("nvmlDeviceGetMemoryInfo")
        ecc = self.ask("nvmlDeviceGetEccMode")
        mig = self.ask("nvmlDeviceGetMigMode")
        return {
            "gpu": _text(self.ask("nvmlDeviceGetName")),
            "gpu_memory_bytes": getattr(memory, "total", None),
            "driver": _text(self._call("nvmlSystemGetDriverVersion")),
            "power_limit_w": _number(self.ask("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            "sm_mhz_max": self.ask("nvmlDeviceGetMaxClockInfo", library.NVML_CLOCK_SM),
            "memory_mhz_max": self.ask("nvmlDeviceGetMaxClockInfo", library.NVML_CLOCK_MEM),
            "ecc": bool(ecc[0]) if isinstance(ecc, list | tuple) else None,
            "mig": bool(mig[0]) if isinstance(mig, list | tuple) else None,
        }

    def ask(self, name: str, *args: Any) -> Any:
        """One query about this GPU; None where it fails."""
        return self._call(name, self._handle, *args)

    def _call(self, name: str, *args: Any) -> Any:
        if name in self._unsupported:
            return None
        function: Callable[..., Any] | None = getattr(self._library, name, None)
        if function is None:
            self._unsupported.add(name)
            return None
        try:
            return function(*args)
        except Exception as problem:
            # Other errors than NVMLError occur too: old drivers lack functions, broken ones return names that can't be
            # decoded.
            if type(problem).__name__ in ("NVMLError_NotSupported", "NVMLError_FunctionNotFound"):
                self._unsupported.add(name)
            return None

    def _unnamed_processes(self) -> list[GpuProcess]:
        processes = self.ask("nvmlDeviceGetComputeRunningProcesses") or []
        return [GpuProcess(int(process.pid), "", process.usedGpuMemory) for process in processes]


def open_gpu(device: torch.device | int | None = None, library: Any | None = None) -> Nvml | None:
    """The GPU behind a torch device, or by NVML's own number; None without a driver or where it can't be matched.

    A torch device is matched by its UUID, because ``CUDA_VISIBLE_DEVICES`` renumbers devices.
    """
    library = library or _pynvml()
    if library is None:
        return None
    try:
        library.nvmlInit()
        if device is None or isinstance(device, int):
            return Nvml(library.nvmlDeviceGetHandleByIndex(device or 0), library)
    except Exception:
        return None
    for uuid in _uuids(device):
        try:
            return Nvml(library.nvmlDeviceGetHandleByUUID(uuid), library)
        except Exception:
            continue
    return None


def slowdown_names(slowdown: float | None) -> list[str]:
    """The names of the bits that are set in a value of the column ``slowdown``."""
    return [name for bit, name in SLOWDOWNS.items() if slowdown is not None and int(slowdown) & bit]


def gpu_flags(rows: Sequence[Sequence[float | None]], start: float, end: float) -> list[str]:
    """Why the GPU was slowed down between two times, and in which part of the samples: ``GPU power cap 40 % of the
    time``; only from :data:`SLOWED_SHARE` on."""
    place = COLUMNS.index("slowdown") + 1
    inside = [row[place] for row in rows if row[0] is not None and start <= row[0] <= end]
    known = [bits for bits in inside if bits is not None]
    counts: dict[str, int] = {}
    for bits in known:
        for word in slowdown_names(bits):
            counts[word] = counts.get(word, 0) + 1
    shares = {word: count / len(known) for word, count in counts.items()}
    return [f"GPU {word} {100 * share:.0f} % of the time" for word, share in shares.items() if share >= SLOWED_SHARE]


def other_processes(gpu: Nvml | None, own: frozenset[int] = frozenset()) -> list[GpuProcess]:
    """The processes that compute on the GPU, without this one and those in ``own``, the largest first."""
    return [process for process in gpu.processes() if process.pid not in own | gpu.pids] if gpu else []


def refuse_busy(gpu: Nvml | None, own: frozenset[int] = frozenset()) -> None:
    """Raises a MeasureError where processes other than this one and those in ``own`` compute on the GPU; it names
    them."""
    if others := other_processes(gpu, own):
        raise MeasureError(
            "the GPU is busy",
            why=", ".join(_show(process) for process in others[:4]),
            remedy="wait for it, choose another GPU with --device, or measure all the same with --allow-busy",
        )


def own_pids(status: Path = Path("/proc/self/status")) -> frozenset[int]:
    """The pids of this process in all namespaces that it can see (``NSpid``, proc(5))."""
    pids = {os.getpid()}
    try:
        lines = status.read_text("ascii", "replace").splitlines()
    except OSError:
        return frozenset(pids)
    for line in lines:
        if line.startswith("NSpid:"):
            pids |= {int(number) for number in line.split()[1:] if number.isdecimal()}
    return frozenset(pids)


def find_own_process(gpu: Nvml, block: Callable[[], AbstractContextManager[None]]) -> bool:
    """Finds the pid of this process in the driver's list and sets ``gpu.pids`` to it; False where that is not certain.

    Args:
        gpu: the GPU whose list is read.
        block: a context in which this process holds BLOCK more bytes of that GPU; see :func:`block_on`.
    """
    before = {process.pid: process.bytes for process in gpu.processes()}
    try:
        with block():
            after = {process.pid: process.bytes for process in gpu.processes()}
    except (RuntimeError, AssertionError):  # no memory, an exclusive GPU in use, or a torch without CUDA
        return False
    changed = [pid for pid, held in after.items() if pid not in before or (held or 0) - (before[pid] or 0) == BLOCK]
    if len(changed) != 1:
        return False
    gpu.pids = frozenset(changed)
    return True


@contextmanager
def block_on(device: torch.device) -> Iterator[None]:
    """Holds BLOCK bytes of a CUDA device."""
    import torch

    held = torch.empty(BLOCK, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


def joules(rows: Rows, start: float, end: float) -> float | None:
    """Energy in joules between two times, from the driver's energy counter, or else integrated from the power.

    None where the GPU reports neither, where the samples don't cover the time, or where the time is too short.

    Args:
        rows: ``[t, …]`` with the values of COLUMNS.
        start, end: seconds on the same time axis.
    """
    counted, power = _points(rows, _ENERGY), _points(rows, _POWER)
    if end - start >= _COUNTER_SPAN and _cover(counted, start, end):
        return _at(counted, end) - _at(counted, start)
    if end - start < _POWER_SPAN or not _cover(power, start, end):
        return None
    # The trapezoidal rule over the samples, with interpolated points at both ends.
    inside = [point for point in power if start < point[0] < end]
    edges = [(start, _at(power, start)), *inside, (end, _at(power, end))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(edges))


def joules_per_token(rows: Rows, start: float, end: float, tokens: int, idle_w: float | None) -> float | None:
    """Joules per token, without those that an idle GPU would have used in that time; never below zero."""
    spent = joules(rows, start, end)
    if spent is None or idle_w is None or tokens < 1:
        return None
    return max(0.0, spent - idle_w * (end - start)) / tokens


def idle_power(gpu: Nvml | None, seconds: float = 2.0, interval: float = 0.05) -> float | None:
    """The GPU's power in watts when nothing runs: the median over ``seconds``; None where it is unknown."""
    if gpu is None:
        return None
    readings = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        watts = gpu.read()[_POWER - 1]
        if watts is not None:
            readings.append(watts)
        time.sleep(interval)
    return median(readings) if readings else None


def _points(rows: Rows, column: int) -> list[tuple[float, float]]:
    return [(row[0], value) for row in rows if row[0] is not None and (value := row[column]) is not None]


def _cover(points: Sequence[tuple[float, float]], start: float, end: float) -> bool:
    """Whether the points reach from start to end; at either end a twentieth of the time may be missing."""
    slack = 0.05 * (end - start)
    return len(points) > 1 and points[0][0] <= start + slack and points[-1][0] >= end - slack


def _at(points: Sequence[tuple[float, float]], t: float) -> float:
    """The value at ``t``: interpolated linearly between ``points``, constant outside of them."""
    for a, b in pairwise(points):
        if a[0] <= t <= b[0]:
            return a[1] + (b[1] - a[1]) * (t - a[0]) / (b[0] - a[0]) if b[0] > a[0] else b[1]
    return points[0][1] if t < points[0][0] else points[-1][1]


def _pynvml() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml  # type: ignore[no-any-return]


def _uuids(device: torch.device) -> list[str]:
    import torch

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return [f"{kind}-{uuid}" for kind in ("GPU", "MIG")] if uuid is not None else []


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # it belongs to another user, or its number is not of this container
        return "?"


def _show(process: GpuProcess) -> str:
    held = f" holds {process.bytes / 2**30:.1f} GiB" if process.bytes else ""
    return f"process {process.pid} ({process.name}){held}"


def _number(value: Any, scale: float = 1.0) -> float | None:
    return value * scale if isinstance(value, int | float) else None


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else None
