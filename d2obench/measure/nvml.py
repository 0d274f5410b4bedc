"""What the NVIDIA driver tells about a GPU: memory, clocks, power, heat, and who else is on it.

Nothing here ends a measurement. A query that a driver, a container, WSL or a MIG slice does not support is None and
is not asked again; a driver that dies in the middle gives None from then on; without one, :func:`open_gpu` is None.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from d2obench.errors import MeasureError
from d2obench.measure.identity import own_pids
from d2obench.measure.sampler import Row

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
"""Bits of the clocks-event reasons that slow a GPU below what it was set to; idle and user-set clocks are not here."""


class Owner(NamedTuple):
    """A process that computes on the GPU; ``bytes`` is None where the driver does not tell."""

    pid: int
    name: str
    bytes: int | None


class Nvml:
    """One GPU.

    Args:
        handle: NVML's handle of it.
        library: the module ``pynvml``, or a stand-in with its functions.
        pid: the process whose memory is ``process_bytes``; this one where it is not given.

    ``pids`` are the numbers this process may have in the driver's list; ``identity.recognise`` makes sure of them.
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
        mine = next((owner.bytes for owner in self._processes() if owner.pid in self.pids), None)
        return (
            _number(getattr(memory, "used", None)),
            _number(mine),
            _number(getattr(rates, "gpu", None)),
            _number(self.ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_SM)),
            _number(self.ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_MEM)),
            _number(self.ask("nvmlDeviceGetPowerUsage"), 1e-3),
            _number(self.ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3),
            _number(self.ask("nvmlDeviceGetTemperature", library.NVML_TEMPERATURE_GPU)),
            _number(self.slowdown()),
        )

    def slowdown(self) -> int | None:
        """The bits of SLOWDOWNS that hold now."""
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            found = self.ask(name)
            if isinstance(found, int):
                return found & sum(SLOWDOWNS)
        return None

    def owners(self) -> list[Owner]:
        """Processes that compute on this GPU, the largest first."""
        named = [Owner(owner.pid, _name(owner.pid), owner.bytes) for owner in self._processes()]
        return sorted(named, key=lambda owner: -(owner.bytes or 0))

    def facts(self) -> dict[str, Any]:
        """What does not change during a run: name, driver, limits, settings; missing where unsupported."""
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
            # Not only NVMLError: old drivers lack symbols, broken ones hand out names that can't be decoded.
            if type(problem).__name__ in ("NVMLError_NotSupported", "NVMLError_FunctionNotFound"):
                self._unsupported.add(name)
            return None

    def _processes(self) -> list[Owner]:
        found = self.ask("nvmlDeviceGetComputeRunningProcesses") or []
        return [Owner(int(process.pid), "", process.usedGpuMemory) for process in found]


def open_gpu(device: torch.device | int | None = None, library: Any | None = None) -> Nvml | None:
    """The GPU behind a torch device, or by NVML's own number; None without a driver or where it can't be matched.

    A torch device is matched by its UUID, since ``CUDA_VISIBLE_DEVICES`` renumbers devices.
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


def strangers(gpu: Nvml | None, own: frozenset[int] = frozenset()) -> list[Owner]:
    """Processes other than this one and ``own`` that compute on the GPU, the largest first."""
    return [owner for owner in gpu.owners() if owner.pid not in own | gpu.pids] if gpu else []


def refuse_busy(gpu: Nvml | None, own: frozenset[int] = frozenset()) -> None:
    """Raises MeasureError where processes other than this one and ``own`` compute on the GPU; tells who."""
    if others := strangers(gpu, own):
        raise MeasureError(
            "the GPU is busy",
            why=", ".join(_show(owner) for owner in others[:4]),
            remedy="wait for it, choose another GPU with --device, or measure all the same with --allow-busy",
        )


def words(slowdown: float | None) -> list[str]:
    """The names of the bits of a ``slowdown`` value."""
    return [name for bit, name in SLOWDOWNS.items() if slowdown is not None and int(slowdown) & bit]


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
    except psutil.Error:  # of another user, or counted from outside this container
        return "?"


def _show(owner: Owner) -> str:
    held = f" holds {owner.bytes / 2**30:.1f} GiB" if owner.bytes else ""
    return f"process {owner.pid} ({owner.name}){held}"


def _number(value: Any, scale: float = 1.0) -> float | None:
    return value * scale if isinstance(value, int | float) else None


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else None
