"""The one place for errors: a base class with an exit code, caught once in ``d2obench.cli``.

The text of an error says what is wrong, why, and what to type instead, on one line.
Exit codes: 1 a gate found a regression, 2 a wrong input or a run that can't go on, 130 stopped by the user.
"""

from __future__ import annotations


class D2OBenchError(Exception):
    """Base of every error a user can meet.

    Args:
        what: the fact, for example ``unknown policy 'h20'``.
        why: the reason, if the fact does not carry it.
        remedy: what to type or change.
    """

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}; {self.remedy}" if self.remedy else text


class UsageError(D2OBenchError):
    """A wrong word on the command line: a budget, a shape, a batch, an option."""


class SuiteError(D2OBenchError):
    """A suite file that can't be read; names the file and the key."""


class PolicyError(D2OBenchError):
    """An unknown policy, an unknown parameter, or a value outside its range."""


class ModelError(D2OBenchError):
    """A model that can't be found, fetched, verified or run by this engine."""


class DataError(D2OBenchError):
    """A data set that is missing or malformed; names the file, line and field."""


class RecordError(D2OBenchError):
    """A run folder that can't be written or does not hold what it should."""


class MeasureError(D2OBenchError):
    """A machine that is not fit for the asked measurement."""


class WorkerError(D2OBenchError):
    """A worker process that can't be started or that ended without an answer."""


class OutOfMemory(D2OBenchError):  # noqa: N818 - a result, not a fault
    """The device's or the machine's memory ended; a cell's status, never the end of a run."""


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
_BROKEN = (
    "illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure",
    "launch timed out", "illegal instruction", "invalid program counter", "hardware stack error", "uncorrectable",
    "GPU has fallen off",
)  # fmt: skip


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception means that the memory of the device or of the machine ran out. Triton, cuBLAS and the CPU's
    allocator raise other classes than PyTorch's CUDA allocator does."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    return isinstance(problem, RuntimeError) and any(phrase in str(problem) for phrase in _NO_MEMORY)


def is_device_fault(problem: BaseException) -> bool:
    """Whether an exception is an error of CUDA after which every further call of the process fails ("sticky")."""
    return isinstance(problem, RuntimeError) and any(phrase in str(problem) for phrase in _BROKEN)


def in_a_line(problem: BaseException) -> str:
    """An exception of a library in one short line: its class, and the first line of its text."""
    return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:120]}"
