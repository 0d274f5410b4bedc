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
