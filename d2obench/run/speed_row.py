"""Makes the row of a timed cell from its raw values: figures, ratios to the full cache, and flags.

Times are compared only where they were measured next to each other: decode steps in windows of the same sweep, and
everything else (and decode steps, where a cell has no windows) in the same round of requests. With equal batch the
ratios are ``speedup``, ``speedup_e2e`` and ``prefill_cost``. With batch ``max`` each policy runs at its own largest
batch, so throughputs are compared instead (``speedup_memory``). A row never has ratios of both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.measure.roofline import largest_speedup
from d2obench.measure.samples import RequestTrace, decoded
from d2obench.measure.summarise import Machine, Summary, summarise
from d2obench.record import Value
from d2obench.run.progress import Display
from d2obench.run.run_folder import RunLog, Samples
from d2obench.run.worker_client import Client, again
from d2obench.stats.ratios import FULL, against_full
from d2obench.tasks.base import Cell, shape_of


class DeviceRates:
    """Copy bandwidth and idle power of each device, measured once a run, when they are first needed."""

    def __init__(self, client: Client, display: Display) -> None:
        self._client, self._display = client, display
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
        """Bandwidth and idle power, for the details of a row."""
        return {"copy_bytes_per_s": self.bandwidth(device), "idle_w": self.idle_w(device)}

    def _measured(self, device: str, op: str, key: str, words: str) -> float | None:
        """The figure ``key`` of the worker's operation ``op``; None, and one note for the user, where it fails."""
        if (op, device) not in self._known:
            try:
                self._known[op, device] = again(lambda: self._client.call(op, {"device": device}))
            except D2OBenchError as problem:
                self._known[op, device] = {}
                self._display.note(f"the {words} of {device} could not be measured: {problem}")
        figure = self._known[op, device].get(key)
        return None if figure is None else float(figure)


class SpeedRows:
    """Writes the rows of one group of timed cells.

    Args:
        cells: the whole group, with those that have ended already.
        samples: the raw rounds of each cell, by cell id.
        log: takes the rows.
        rates: of the devices.
    """

    def __init__(self, cells: Sequence[Cell], samples: Mapping[str, Samples], log: RunLog, rates: DeviceRates) -> None:
        self._cells, self._samples, self._log, self._rates = list(cells), samples, log, rates
        self._summaries: dict[str, Summary] = {}

    def write(self, cell: Cell) -> None:
        """Writes the row of a cell that was measured completely."""
        samples = self._samples[cell.id]
        summary = self._summary(cell)
        counts = {key: Value(count) for key, count in samples.data["counts"].items()}
        values = summary.values | counts | self._against_full(cell, summary)
        if cell.batch == "max":
            values["batch_max"] = Value(samples.data["batch"], note=samples.data["limit"])
        self._log.end(
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
            seconds=round(sum(trace["seconds"] for trace in samples.rounds), 3),
        )

    def _summary(self, cell: Cell) -> Summary:
        if cell.id not in self._summaries:
            samples = self._samples[cell.id]
            model, device = samples.data["model"], cell.axes.device
            bandwidth, idle_w = self._rates.bandwidth(device), self._rates.idle_w(device)
            machine = Machine(model["weights_bytes"], model["weights_read_bytes"], bandwidth, idle_w)
            rounds = msgspec.convert(samples.rounds, list[RequestTrace])
            self._summaries[cell.id] = summarise(rounds, machine, decoded(samples.data))
        return self._summaries[cell.id]

    def _against_full(self, cell: Cell, summary: Summary) -> dict[str, Value]:
        """Ratios of a cell to the full cache of its group, by metric; none where that one has no figures."""
        full = next((other for other in self._cells if other.axes.policy == FULL), None)
        if full is None or full is cell or not self._will_be_ok(full):
            return {}
        ours, reference = self._samples[cell.id], self._samples[full.id]
        if not reference.rounds:  # its samples file was deleted after its row was written
            return {}
        if cell.batch == "max":
            return against_full(ours.data, reference.data, batches=(ours.data["batch"], reference.data["batch"]))
        ratios = against_full(ours.data, reference.data)
        # the speed-up that the bytes of a decode step would give, and the largest that the measured bandwidth allows
        step, step_full = (of.values["step_bytes"].value for of in (summary, self._summary(full)))
        if step and step_full:
            ratios["speedup_bound"] = Value(step_full / step)
            best, typical = (of(cell.axes.device) for of in (self._rates.bandwidth, self._rates.typical_bandwidth))
            steps = [part["step_s"] for part in reference.data.get("windows") or reference.rounds]
            if best and typical and (largest := largest_speedup(steps, step_full, step, best, typical)):
                ratios["speedup_largest"] = largest
        return ratios

    def _will_be_ok(self, cell: Cell) -> bool:
        """Whether a cell has a row with figures or will get one; cells that fail have their rows already."""
        return self._log.open(cell) or self._log.records[cell.id].status == "ok"

    def _beyond_context(self, cell: Cell) -> list[str]:
        """A flag where the text is longer than the model's context: times are right there, the text has no sense."""
        shape, context = shape_of(cell), self._samples[cell.id].data["model"].get("context")
        past = context is not None and shape.prompt + shape.gen > context
        return [f"beyond the model's context of {context:,}: speed only"] if past else []

    def _never_beside_full(self, cell: Cell, values: Mapping[str, Value]) -> list[str]:
        """A flag for a cell that was tried again later than the full cache and shares no round with it."""
        full = [other for other in self._cells if other.axes.policy == FULL and other is not cell]
        measured = any(self._samples[other.id].rounds for other in full)
        known = {"speedup", "speedup_memory", "prefill_cost"} & values.keys()
        return ["not measured beside full"] if measured and not known else []
