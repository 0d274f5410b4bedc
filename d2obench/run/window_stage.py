"""The windows of one group in one worker process: hold the caches, let them decode in turn, repeat what was disturbed.

See :mod:`d2obench.measure.windows` for the design. What can't be measured in windows takes turns by whole requests
(:mod:`d2obench.run.speed`), and the row says so and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError
from d2obench.measure.windows import LEAST_STEPS, REPEATED, RoundOfWindows, Window, WindowPlan, plan_windows
from d2obench.models import Dimensions
from d2obench.run.predict import ITEM_BYTES, memory_of
from d2obench.run.run_log import RunLog, Samples
from d2obench.run.worker_client import Client
from d2obench.run.worker_process import DeadWorkerError
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell, shape_of

CALL_S = 2.0
"""Seconds of windows that the worker is asked for at a time, about: so often is the display told how it goes."""
SHARE = 0.8
"""How much of the free memory the caches of a group may be predicted to take."""
BUSY = (
    "the machine is busy with other work: what that disturbs is measured again, and if it stays busy this run gives no "
    "verdict on speed; end that work, or run again later"
)


def window_obstacles(
    suite: Suite,
    cells: Sequence[Cell],
    models: Mapping[str, Dimensions],
    isolated: Callable[[Cell], bool],
    free_bytes: Callable[[str], int],
) -> dict[str, str]:
    """Why cells can't be measured in windows, by cell id; the other cells of the group can.

    Args:
        suite: its tables ``timing``, ``worker`` and ``models`` decide for all cells.
        cells: of one group.
        models: dimensions of each model.
        isolated: whether a cell runs in a worker of its own.
        free_bytes: what is free of a device's memory.
    """
    shape, device = shape_of(cells[0]), cells[0].axes.device
    model = models.get(cells[0].axes.model)
    whole = ""
    if suite.timing.windows == 0:
        whole = "timing.windows is 0"
    elif suite.worker.mode == "fresh":
        whole = "worker.mode is fresh: every cell has a process of its own"
    elif not suite.models.single:
        whole = "the model lies on several devices"
    elif shape.gen - 1 < LEAST_STEPS:
        whole = f"{shape.gen} tokens are too few"
    elif model is None:
        whole = "the size of the model is not known"
    found = {cell.id: whole for cell in cells if whole}
    for cell in cells if not whole else ():
        if not isinstance(cell.batch, int):
            found[cell.id] = "batch max fills the memory"
        elif isolated(cell):
            found[cell.id] = "it runs in a process of its own"
    left = [cell for cell in cells if cell.id not in found]
    if not left or model is None:
        return found
    free = SHARE * free_bytes(device)
    needed = memory_of(left[0], model, 0) + max(_prefill_bytes(cell, model) for cell in left)
    for cell in sorted(left, key=lambda one: one.axes.policy != "full"):  # the cache the others are compared with first
        held = (2 if cell.budget else 1) * _held_bytes(cell, model)
        needed += held
        if needed > free:
            found[cell.id] = f"no memory beside the others: {needed / 2**30:.1f} GiB predicted, {free / 2**30:.1f} free"
            needed -= held
    return found


class WindowStage:
    """Measures windows of cells that share a worker.

    Args:
        suite: its table ``timing`` says how many.
        samples: of each cell, by its id; the windows are written there.
        log: is told what goes on, and takes the row of a cell that can't be prefilled.
    """

    def __init__(self, suite: Suite, samples: Mapping[str, Samples], log: RunLog) -> None:
        self._timing, self._samples, self._log = suite.timing, samples, log
        self._holding: Cell | None = None

    def run(self, cells: Sequence[Cell], client: Client, process: int) -> dict[str, str]:
        """Measures the windows of one process and writes them.

        Args:
            cells: those that live side by side.
            client: their worker.
            process: its number within the group.

        Returns:
            Why a cell has no windows, by cell id; such a cell takes turns by request. A cell whose prefill fails for
            another reason than memory has its row.
        """
        refused: dict[str, str] = {}
        died = 0
        while live := [cell for cell in cells if self._log.open(cell) and cell.id not in refused]:
            self._holding = None
            try:
                self._measure(live, client, process, refused)
                break
            except OutOfMemory as problem:
                refused |= {cell.id: f"no memory beside the others: {problem}" for cell in live}
            except WorkerError as problem:
                died += 1
                if died == 1 and isinstance(problem, DeadWorkerError):
                    continue  # a stray kill is not a cell's fault
                if self._holding is None:
                    refused |= {cell.id: f"decoding in turn failed: {problem}" for cell in live}
                else:
                    self._log.fail(self._holding, problem, self._samples[self._holding.id])
            except D2OBenchError as problem:  # its request will meet the same error and end the cell
                concerned = live if self._holding is None else [self._holding]
                refused |= {cell.id: f"decoding in turn failed: {problem}" for cell in concerned}
            client.close()  # whatever it holds goes with it
        return refused

    def _measure(self, cells: Sequence[Cell], client: Client, process: int, refused: dict[str, str]) -> None:
        """One attempt; adds to ``refused`` the cells whose session can't go back."""
        step_s: dict[str, float] = {}
        for cell in cells:
            self._holding = cell
            why, seconds = self._hold(cell, client)
            if why:
                refused[cell.id] = why
            else:
                step_s[cell.id] = seconds
        self._holding = None
        held = [cell for cell in cells if cell.id in step_s]
        if not held:
            return
        plan = self._plan(held, step_s)
        windows = self._decode(plan, held, client, process, sum(step_s.values()))
        uncounted = [cell.id for cell in held if "counts" not in self._samples[cell.id].data]
        counts = client.call("let_go", {"count": uncounted})["counts"]
        for cell in held:
            samples = self._samples[cell.id]
            kept = [one for one in samples.data.get("windows", ()) if one["process"] != process]
            new = {"counts": counts[cell.id]} if cell.id in counts else {}
            samples.save(windows=[*kept, *map(msgspec.to_builtins, windows[cell.id])], plan=plan._asdict(), **new)

    def _hold(self, cell: Cell, client: Client) -> tuple[str, float]:
        """Prefills a cell and keeps it: why it can't be kept, or the seconds of one of its decode steps."""
        samples, display = self._samples[cell.id], self._log.watcher
        self._log.begin(cell)
        request = {
            "cell": cell.id,
            "axes": msgspec.to_builtins(cell.axes),
            "batch": samples.data["batch"],
            "within": self._timing.warm_within,
        }
        client.call("load", request, progress=lambda done, total, words: display.phase(words, done, total))
        display.cell(cell.id, "running", "prefill for decoding in turn")
        found = client.call("hold", request)
        if found.get("why"):
            return str(found["why"]), 0.0
        samples.data["model"] = found["model"]
        samples.data["warm_up"] = [found["warm_up"]]
        return "", float(found["warm_up"]["decode_s"][-1])

    def _plan(self, cells: Sequence[Cell], step_s: Mapping[str, float]) -> WindowPlan:
        """The plan of the group: the one of its first process stands for all."""
        for cell in cells:
            if "plan" in self._samples[cell.id].data:
                return WindowPlan(**self._samples[cell.id].data["plan"])
        shape, timing = shape_of(cells[0]), self._timing
        return plan_windows(
            shape.gen - 1,
            step_s.values(),
            windows=timing.windows,
            window_s=timing.window_s,
            depths=timing.depths,
            most_s=timing.max_seconds / (2 * timing.processes),
        )

    def _decode(
        self, plan: WindowPlan, cells: Sequence[Cell], client: Client, process: int, step_s: float
    ) -> dict[str, list[Window]]:
        """All rounds of windows of a plan, then once more those that were disturbed, as often as the limit allows."""
        names = [cell.id for cell in cells]
        planned = plan.rounds(names)
        at_once = max(1, round(CALL_S / (step_s * (plan.steps + plan.lead))))
        found: dict[str, list[Window]] = {name: [] for name in names}
        disturbed: dict[tuple[int, int], RoundOfWindows] = {}

        def measure(rounds: Sequence[RoundOfWindows]) -> None:
            answer = client.call(
                "decode_in_turn",
                {"rounds": [list(one) for one in rounds], "process": process, "lead": plan.lead, "steps": plan.steps},
            )
            new = [(name, msgspec.convert(window, Window)) for name, window in answer["windows"]]
            marked = {(one.sweep, one.depth) for _, one in new if one.flags}
            for name, one in new:
                one.disturbed = (one.sweep, one.depth) in marked
                found[name].append(one)
            for place in rounds:
                disturbed.pop((place.sweep, place.depth), None)
                if (place.sweep, place.depth) in marked:
                    disturbed[place.sweep, place.depth] = place
            if 2 * len(marked) > len(rounds):
                self._log.note_once(BUSY)

        for first in range(0, len(planned), at_once):
            self._show(cells, process, first, len(planned))
            measure(planned[first : first + at_once])
        left = math.ceil(REPEATED * len(planned))
        number = len(planned)
        while disturbed and left > 0:
            repeated = []
            for place in list(disturbed.values())[: min(left, at_once)]:
                repeated.append(place._replace(attempt=place.attempt + 1, order=plan.order(names, number)))
                number += 1
            left -= len(repeated)
            self._show(cells, process, len(planned) - len(disturbed), len(planned), "again, since disturbed")
            measure(repeated)
        return found

    def _show(self, cells: Sequence[Cell], process: int, done: int, planned: int, words: str = "") -> None:
        text = f"process {process + 1}/{self._timing.processes}: {done}/{planned} windows in turn {words}".strip()
        share = (process + done / planned) / self._timing.processes / 2
        for cell in cells:
            self._log.watcher.cell(cell.id, "running", text, share)


def _held_bytes(cell: Cell, model: Dimensions) -> float:
    """Keys and values of a cell's cache at the end of its generation."""
    shape = shape_of(cell)
    held = cell.budget.of(shape.prompt) if cell.budget else shape.prompt + shape.gen
    token = 2 * model.layers * model.kv_heads * model.head_dim * ITEM_BYTES[cell.axes.dtype]
    return float(token * held * int(cell.batch or 1))


def _prefill_bytes(cell: Cell, model: Dimensions) -> float:
    """What reading the prompt takes beside the weights."""
    return memory_of(cell, model, int(cell.batch or 1)) - memory_of(cell, model, 0)
