"""A stand-in for ``pynvml`` driven by a script: answers may change, stop being supported, or end with the driver."""

# ruff: noqa: N801, N802, N818
from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As NVML's own."""


class NVMLError_NotSupported(NVMLError):
    """The name the real library gives it."""


class FakeNvml:
    """The functions :class:`d2obench.measure.nvml.Nvml` calls.

    Args:
        script: query (without ``nvmlDeviceGet``) → a value, or a function of the number of calls so far.
        unsupported: queries this device does not have.
        dies_after: calls until every query fails.
    """

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(
        self, script: dict[str, Any] | None = None, unsupported: set[str] | None = None, dies_after: int = 10**9
    ):
        self.script = {
            "MemoryInfo": SimpleNamespace(total=80 * 2**30, used=10 * 2**30),
            "UtilizationRates": SimpleNamespace(gpu=97, memory=40),
            "ClockInfo": lambda n, kind: {1: 1980, 2: 2619}[kind],
            "MaxClockInfo": lambda n, kind: {1: 1980, 2: 2619}[kind],
            "PowerUsage": 500_000,
            "TotalEnergyConsumption": lambda n: 1000 * n,
            "Temperature": 55,
            "CurrentClocksEventReasons": 0,
            "ComputeRunningProcesses": [],
            "Name": b"NVIDIA Imagined",
            "EnforcedPowerLimit": 700_000,
            "EccMode": [1, 1],
            "MigMode": [0, 0],
            **(script or {}),
        }
        self.unsupported, self.dies_after = unsupported or set(), dies_after
        self.calls: Counter[str] = Counter()

    def nvmlInit(self) -> None:
        if self.dies_after <= 0:
            raise NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu{index}"

    def __getattr__(self, name: str) -> Any:
        query = name.removeprefix("nvmlDeviceGet")
        if query == name or query not in self.script:
            raise AttributeError(name)

        def ask(handle: Any, *args: Any) -> Any:
            number = self.calls[query]
            self.calls[query] += 1
            if sum(self.calls.values()) > self.dies_after:
                raise NVMLError("GPU is lost")
            if query in self.unsupported:
                raise NVMLError_NotSupported("Not Supported")
            found = self.script[query]
            return found(number, *args) if callable(found) else found

        return ask
