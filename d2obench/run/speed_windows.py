"""Measures the windows of decode steps of one group of cells, in one worker process after another.

:mod:`d2obench.measure.samples` describes what a window is and how windows lie. The worker prefills a cache for each
cell and keeps all of them; then the caches decode in turn, and rounds of windows that were disturbed are measured
again. :func:`window_obstacles` names the cells that can't be measured in this way. Their decode steps are taken from
whole requests instead (:mod:`d2obench.run.speed`), and their rows say why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError
from d2obench.measure.samples import LEAST_STEPS, REPEATED, RoundOfWindows, Window, WindowPlan, plan_windows
from d2obench.models import Dimensions
from d2obench.run.predict import ITEM_BYTES, memory_of
from d2obench.run.run_folder import RunLog, Samples
from d2obench.run.worker_client import Client, DeadWorkerError, DeviceFaultError
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell, shape_of

CALL_S = 2.0
"""Seconds of windows that one call of the worker measures, about; the display is told after each call."""
MEMORY_SHARE = 0.8
"""Largest share of the free memory that the caches of a group may be predicted to take."""
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
    """Why cells can't be measured in windows, by cell id; cells that are not named can.

    Args:
        suite: with its tables ``timing``, ``worker`` and ``models``.
        cells: of one group.
        models: dimensions of each model.
        isolated: whether a cell runs in an isolated worker.
        free_bytes: the free memory of a device.
    """
    # 1. What the suite, the shape or the model rules out for all cells.
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
    obstacles = {cell.id: whole for cell in cells if whole}
    # 2. What rules out single cells.
    for cell in cells if not whole else ():
        if not isinstance(cell.batch, int):
            obstacles[cell.id] = "batch max fills the memory"
        elif isolated(cell):
            obstacles[cell.id] = "it runs in a process of its own"
    able = [cell for cell in cells if cell.id not in obstacles]
    if not able or model is None:
        return obstacles
    # 3. Memory: the weights, the largest prefill, and the caches one after another as long as they fit. A cache that
    #    evicts counts twice, because the worker keeps a copy of its beginning. The full cache comes first, since the
    #    others are compared with it.
    free = MEMORY_SHARE * free_bytes(device)
    needed = memory_of(able[0], model, 0) + max(_prefill_bytes(cell, model) for cell in able)
    for cell in sorted(able, key=lambda cell: cell.axes.policy != "full"):
        held = (2 if cell.budget else 1) * _held_bytes(cell, model)
        if needed + held > free:
            sizes = f"{(needed + held) / 2**30:.1f} GiB predicted, {free / 2**30:.1f} free"
            obstacles[cell.id] = f"no memory beside the others: {sizes}"
        else:
            needed += held
    return obstacles


class SpeedWindows:
    """Measures the windows of cells that share a worker.

    Args:
        suite: its table ``timing`` says how many windows.
        samples: of each cell, by its id; the windows are written there.
        log: its display is told what goes on; it takes the row of a cell whose prefill fails.
    """

    def __init__(self, suite: Suite, samples: Mapping[str, Samples], log: RunLog) -> None:
        self._timing, self._samples, self._log = suite.timing, samples, log
        self._holding: Cell | None = None
        """The cell that is prefilled now; None while the caches decode in turn."""

    def run(self, cells: Sequence[Cell], client: Client, process: int) -> dict[str, str]:
        """Measures the windows of one process and writes them.

        Args:
            cells: those that decode in turn.
            client: their worker.
            process: its number within the group.

        Returns:
            Why a cell has no windows, by cell id; its decode steps must be taken from whole requests. A cell whose
            prefill kills the worker has its row already.
        """
        refused: dict[str, str] = {}
        deaths, faults = 0, set[str]()
        while live := [cell for cell in cells if self._log.open(cell) and cell.id not in refused]:
            self._holding = None
            try:
                self._measure(live, client, process, refused)
                break
            except OutOfMemory as problem:  # the caches don't fit together: none of them has windows
                refused |= {cell.id: f"no memory beside the others: {problem}" for cell in live}
            except WorkerError as problem:
                if isinstance(problem, DeviceFaultError) and self._holding and self._holding.id not in faults:
                    faults.add(self._holding.id)
                    continue  # the cell is tried once more, without the part of the GPU path that failed
                deaths += 1
                if deaths == 1 and isinstance(problem, DeadWorkerError):
                    continue  # tried once more, because the machine may have killed it for other reasons
                if self._holding is None:
                    refused |= {cell.id: f"decoding in turn failed: {problem}" for cell in live}
                else:
                    self._log.fail(self._holding, problem, self._samples[self._holding.id])
            except D2OBenchError as problem:  # the cell's request will fail in the same way and write its row
                concerned = live if self._holding is None else [self._holding]
                refused |= {cell.id: f"decoding in turn failed: {problem}" for cell in concerned}
            client.close()  # frees all caches, before the cells that are left are tried without the others
        return refused

    def _measure(self, cells: Sequence[Cell], client: Client, process: int, refused: dict[str, str]) -> None:
        """One attempt; adds to ``refused`` the cells whose cache can't go back to an earlier step."""
        # 1. Prefill and warm up every cache.
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
        # 2. Decode in turn.
        plan = self._plan(held, step_s)
        windows = self._decode(plan, held, client, process, sum(step_s.values()))
        # 3. Free the caches, and count a decode step of each the first time.
        uncounted = [cell.id for cell in held if "counts" not in self._samples[cell.id].data]
        counts = client.call("let_go", {"count": uncounted})["counts"]
        # 4. Write the windows, in place of incomplete ones of the same process.
        for cell in held:
            samples = self._samples[cell.id]
            others = [window for window in samples.data.get("windows", ()) if window["process"] != process]
            new = {"counts": counts[cell.id]} if cell.id in counts else {}
            samples.save(windows=[*others, *map(msgspec.to_builtins, windows[cell.id])], plan=plan._asdict(), **new)

    def _hold(self, cell: Cell, client: Client) -> tuple[str, float]:
        """Lets the worker prefill a cell and keep its cache.

        Returns:
            Why it can't be kept, or an empty text; and the seconds of one of its decode steps.
        """
        samples, display = self._samples[cell.id], self._log.display
        self._log.begin(cell)
        request = {
            "cell": cell.id,
            "axes": msgspec.to_builtins(cell.axes),
            "batch": samples.data["batch"],
            "within": self._timing.warm_within,
        }
        client.call("load", request, progress=lambda done, total, words: display.phase(words, done, total))
        display.cell(cell.id, "running", "prefill for decoding in turn")
        answer = client.call("hold", request)
        if answer.get("why"):
            return str(answer["why"]), 0.0
        samples.data["model"] = answer["model"]
        samples.data["warm_up"] = [answer["warm_up"]]
        return "", float(answer["warm_up"]["decode_s"][-1])

    def _plan(self, cells: Sequence[Cell], step_s: Mapping[str, float]) -> WindowPlan:
        """How the windows lie; decided in the group's first process and the same in all."""
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
        """Measures all rounds of windows of a plan, and once more those that were disturbed, up to a limit.

        Args:
            plan: of the windows.
            cells: whose caches the worker keeps.
            client: the worker.
            process: its number within the group.
            step_s: seconds that one decode step of every cache takes together.

        Returns:
            All windows of each cell, the disturbed ones among them, by cell id.
        """
        names = [cell.id for cell in cells]
        planned = plan.rounds(names)
        at_once = max(1, round(CALL_S / (step_s * (plan.steps + plan.lead))))
        windows: dict[str, list[Window]] = {name: [] for name in names}
        disturbed: dict[tuple[int, int], RoundOfWindows] = {}

        def measure(rounds: Sequence[RoundOfWindows]) -> None:
            # 1. One call of the worker measures these rounds.
            request = {"process": process, "lead": plan.lead, "steps": plan.steps}
            answer = client.call("decode_in_turn", {"rounds": list(map(list, rounds)), **request})
            measured = [(name, msgspec.convert(window, Window)) for name, window in answer["windows"]]
            # 2. A round is disturbed where any of its windows is: they are compared with each other.
            flagged = {(window.sweep, window.depth) for _, window in measured if window.flags}
            for name, window in measured:
                window.disturbed = (window.sweep, window.depth) in flagged
                windows[name].append(window)
            # 3. The latest attempt at a round decides whether it must be repeated.
            for round_ in rounds:
                disturbed.pop((round_.sweep, round_.depth), None)
                if (round_.sweep, round_.depth) in flagged:
                    disturbed[round_.sweep, round_.depth] = round_
            if 2 * len(flagged) > len(rounds):
                self._log.note_once(BUSY)

        # 4. Every round once, in the order of the plan.
        for first in range(0, len(planned), at_once):
            self._show(cells, process, first, len(planned))
            measure(planned[first : first + at_once])
        # 5. Disturbed rounds again, until none is left or the limit is reached; their order continues the ABBA turns.
        repeats, number = math.ceil(REPEATED * len(planned)), len(planned)
        while disturbed and repeats > 0:
            repeated = []
            for round_ in list(disturbed.values())[: min(repeats, at_once)]:
                repeated.append(round_._replace(attempt=round_.attempt + 1, order=plan.order(names, number)))
                number += 1
            repeats -= len(repeated)
            self._show(cells, process, len(planned) - len(disturbed), len(planned), "again, since disturbed")
            measure(repeated)
        return windows

    def _show(self, cells: Sequence[Cell], process: int, done: int, planned: int, words: str = "") -> None:
        """Tells the display how many rounds of windows are done; windows are about half of a cell's work."""
        text = f"process {process + 1}/{self._timing.processes}: {done}/{planned} windows in turn {words}".strip()
        share = (process + done / planned) / self._timing.processes / 2
        for cell in cells:
            self._log.display.cell(cell.id, "running", text, share)


def _held_bytes(cell: Cell, model: Dimensions) -> float:
    """Keys and values of a cell's cache at the end of its generation."""
    shape = shape_of(cell)
    token = 2 * model.layers * model.kv_heads * model.head_dim * ITEM_BYTES[cell.axes.dtype]
    return float(token * cell.entries(shape) * int(cell.batch or 1))


def _prefill_bytes(cell: Cell, model: Dimensions) -> float:
    """Memory that the prefill of a cell takes beside the weights."""
    return memory_of(cell, model, int(cell.batch or 1)) - memory_of(cell, model, 0)
