"""From the raw values of a timed cell to its row: figures, ratios to the full cache, and the words to show with them.

Times are compared only where they were measured beside each other: decode steps in windows of the same sweep, or where
a cell has none in the same round of requests, as everything else is. With equal batch the ratios are ``speedup``,
``speedup_e2e`` and ``prefill_cost``. With batch ``max`` each policy runs at its own largest batch, so throughputs are
compared instead (``speedup_memory``). The two kinds are never mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.measure.roofline import largest_speedup
from d2obench.measure.summarise import Machine, Summary, summarise
from d2obench.measure.trace import RequestTrace
from d2obench.measure.windows import decoded
from d2obench.record import Value
from d2obench.run.progress import Display
from d2obench.run.run_log import RunLog, Samples
from d2obench.run.worker_client import Client, again
from d2obench.stats.ratios import FULL, against_full
from d2obench.tasks.base import Cell, shape_of


class DeviceRates:
    """Copy bandwidth and idle power of each device: measured when first needed, once a run."""

    def __init__(self, client: Client, watcher: Display) -> None:
        self._client, self._watcher = client, watcher
        self._known: dict[tuple[str, str], Mapping[str, float | None]] = {}

    def bandwidth(self, device: str) -> float | None:
        """Bytes per second that a copy on ``device`` reads and writes; None where it could not be measured."""
        return self._measured(device, "bandwidth", "bytes_per_s", "copy bandwidth")

    def typical_bandwidth(self, device: str) -> float | None:
        """The median of the copies whose best is :meth:`bandwidth`."""
        return self._measured(device, "bandwidth", "median", "copy bandwidth")

    def idle_w(self, device: str) -> float | None:
        """Watts that ``device`` takes while nothing runs on it; None on a CPU."""
        return self._measured(device, "idle", "idle_w", "idle power")

    def known(self, device: str) -> dict[str, float | None]:
        """Both, for the details of a row."""
        return {"copy_bytes_per_s": self.bandwidth(device), "idle_w": self.idle_w(device)}

    def _measured(self, device: str, op: str, key: str, words: str) -> float | None:
        """One figure, by the worker's operation ``op``; a failure is noted once and leaves the figure out."""
        if (op, device) not in self._known:
            try:
                self._known[op, device] = again(lambda: self._client.call(op, {"device": device}))
            except D2OBenchError as problem:
                self._known[op, device] = {}
                self._watcher.note(f"the {words} of {device} could not be measured: {problem}")
        found = self._known[op, device].get(key)
        return None if found is None else float(found)


class SpeedRows:
    """Writes the rows of one group of timed cells.

    Args:
        cells: the whole group, those that have ended already among them.
        samples: the raw rounds of each cell, by cell id.
        ledger: takes the rows.
        rates: of the devices.
    """

    def __init__(
        self, cells: Sequence[Cell], samples: Mapping[str, Samples], ledger: RunLog, rates: DeviceRates
    ) -> None:
        self._cells, self._samples, self._ledger, self._rates = list(cells), samples, ledger, rates
        self._summaries: dict[str, Summary] = {}

    def write(self, cell: Cell) -> None:
        """Ends a cell as ``ok``, with everything its rounds tell."""
        samples = self._samples[cell.id]
        summary = self._summary(cell)
        counts = {key: Value(count) for key, count in samples.data["counts"].items()}
        values = summary.values | counts | self._against_full(cell, summary)
        if cell.batch == "max":
            values["batch_max"] = Value(samples.data["batch"], note=samples.data["limit"])
        self._ledger.end(
            cell,
            "ok",
            values=values,
            details=summary.details
            | {key: samples.data.get(key) for key in ("stopped", "warm_up", "model")}
            | ({"turns_why": why} if (why := samples.data.get("turns_why")) and "windows" not in samples.data else {})
            | {"device": self._rates.known(cell.axes.device)},
            flags=(
                *summary.flags,
                *(["busy machine: no verdict on speed"] if summary.details["busy"] else []),
                *self._never_beside_full(cell, values),
                *self._beyond_context(cell),
                *samples.data["model"].get("flags", ()),
            ),
            samples=samples.name,
            seconds=round(sum(part["seconds"] for part in samples.rounds), 3),
        )

    def _summary(self, cell: Cell) -> Summary:
        if cell.id not in self._summaries:
            samples = self._samples[cell.id]
            model, device = samples.data["model"], cell.axes.device
            bandwidth, idle_w = self._rates.bandwidth(device), self._rates.idle_w(device)
            machine = Machine(model["weights_bytes"], model["weights_read_bytes"], bandwidth, idle_w)
            rounds = msgspec.convert(samples.rounds, list[RequestTrace])
            self._summaries[cell.id] = summarise(cell.id, rounds, machine, decoded(samples.data))
        return self._summaries[cell.id]

    def _against_full(self, cell: Cell, summary: Summary) -> dict[str, Value]:
        full = next((one for one in self._cells if one.axes.policy == FULL), None)
        if full is None or full is cell or not self._will_be_ok(full):
            return {}
        mine, theirs = self._samples[cell.id], self._samples[full.id]
        if not theirs.rounds:  # its samples were taken away since
            return {}
        if cell.batch == "max":
            batches = (mine.data["batch"], theirs.data["batch"])
            return against_full(mine.data, theirs.data, batches=batches)
        found = against_full(mine.data, theirs.data)
        step, step_full = (one.values["step_bytes"].value for one in (summary, self._summary(full)))
        if step and step_full:
            found["speedup_bound"] = Value(step_full / step)
            best, typical = (of(cell.axes.device) for of in (self._rates.bandwidth, self._rates.typical_bandwidth))
            steps = [one["step_s"] for one in theirs.data.get("windows") or theirs.rounds]
            if best and typical and (largest := largest_speedup(steps, step_full, step, best, typical)):
                found["speedup_largest"] = largest
        return found

    def _will_be_ok(self, cell: Cell) -> bool:
        return self._ledger.open(cell) or self._ledger.records[cell.id].status == "ok"

    def _beyond_context(self, cell: Cell) -> list[str]:
        """A flag where the text is longer than the model was made for: its time is true, what it says is not."""
        shape, context = shape_of(cell), self._samples[cell.id].data["model"].get("context")
        past = context is not None and shape.prompt + shape.gen > context
        return [f"beyond the model's context of {context:,}: speed only"] if past else []

    def _never_beside_full(self, cell: Cell, values: Mapping[str, Value]) -> list[str]:
        """A flag where full was measured too, but in none of this cell's rounds (the cell was tried again later)."""
        full = [
            one for one in self._cells if one.axes.policy == FULL and one is not cell and self._samples[one.id].rounds
        ]
        known = {"speedup", "speedup_memory", "prefill_cost"} & values.keys()
        return ["not measured beside full"] if full and not known else []
