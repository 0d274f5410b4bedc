"""The worker process: answers requests one at a time, each with one operation, a method of :class:`Worker`.

``python -m d2obench.run.worker [PLACEMENT] REQUESTS ANSWERS`` is started with the table ``[models]`` of the suite as
JSON and with the numbers of two inherited pipes; ``d2obench.run.worker_client`` describes the protocol. A thread of its
own reads the requests and ends the process at once when the parent is gone, even in the middle of a long operation.

Arguments and results of an operation are JSON. A worker holds at most one model, the last one asked for, so that the
cells of a group find it loaded. Operations that need no model are in ``d2obench.run.worker_machine``.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import msgspec

from d2obench import compiler
from d2obench.errors import ModelError, WorkerError, is_device_fault
from d2obench.models.devices import beside
from d2obench.run.worker_client import UNKNOWN, WITHOUT, DeviceFaultError, describe, without
from d2obench.run.worker_machine import Args, MachineOperations, Report
from d2obench.suite.definition import Placement, Quality
from d2obench.tasks import read_cell
from d2obench.tasks.base import Cell, shape_of
from d2obench.tasks.prompts import timing_prompts

if TYPE_CHECKING:
    from d2obench.measure.counters import StepCounts
    from d2obench.tasks.base import Evaluation, TextBatch

OPS = (
    "hello", "describe", "prepare", "environment", "refuse_busy", "bandwidth", "idle", "rates", "noise", "memory",
    "load", "warm_up", "measure", "count", "hold", "decode_in_turn", "let_go", "evaluate",
    "evaluate_part", "conclude", "exit",
)  # fmt: skip
"""The operations that a request may name: methods of :class:`Worker`."""
WARM_TOKENS = 8
"""Tokens a warm-up generates: enough to run every kernel of the loop."""


class Worker(MachineOperations):
    """The operations of one worker process.

    Args:
        placement: how its models are distributed over devices; by default each lies on the device of the request.
    """

    def __init__(self, placement: Placement | None = None) -> None:
        super().__init__()
        self._placement = placement or Placement()
        self.alone = False
        """Whether the process does nothing else, so that the worker may change how memory is allocated in it."""
        self._loaded: Any = None
        self._key: tuple[str, str, str] | None = None
        self._prompts: tuple[Any, list[list[int]]] = (None, [])
        self._batches: tuple[Any, list[TextBatch]] = (None, [])
        """What the batches of the last quality task depend on, and they themselves."""
        self._held: dict[str, Any] = {}
        """The caches that decode in turn, by cell id."""
        self._origin = 0.0
        """The clock when the first window of these caches began; 0 before."""

    def load(self, args: Args, report: Report) -> Args:
        """Loads the model of ``axes`` and answers with a description of it."""
        return self._about(self._model(read_cell(args), report))

    def measure(self, args: Args, report: Report) -> Args:
        """One request of a speed cell: ``axes``, ``batch``, ``sampled`` ([depths, steps] or None).

        ``warm_up`` cuts the generation short: a gate sends it to a base revision that has no operation ``warm_up``.
        ``limit`` is the largest number of bytes that may be allocated on a GPU.
        """
        import torch

        from d2obench.external import record_of
        from d2obench.measure.clock import clock_for, shared_clock, shared_load
        from d2obench.measure.disturbance import between, load
        from d2obench.measure.instructions import counting
        from d2obench.measure.memory import probe_for, settle
        from d2obench.measure.nvml import gpu_flags
        from d2obench.measure.phases import Sampled, measure_request

        cell = read_cell(args)
        loaded, shape = self._model(cell, report), shape_of(cell)
        gen = min(shape.gen, WARM_TOKENS) if args.get("warm_up") else shape.gen
        texts = self._texts(loaded, shape.prompt, args["batch"], cell.axes.seed)
        self._recognise(loaded.device)
        settle(loaded.device, beside(loaded.model))
        self._limit_memory(loaded.device, args.get("limit"))
        before = shared_load(load(), loaded.model)
        with counting() as instructions:
            trace = measure_request(
                lambda mark: _session(loaded, cell, gen, mark),
                texts,
                gen,
                clock=shared_clock(clock_for(loaded.device), loaded.model),
                memory=probe_for(
                    loaded.device,
                    nvml=self._nvml(loaded.device) if self._placement.single else None,
                    beside=beside(loaded.model),
                ),
                sampled=Sampled(*args["sampled"]) if args.get("sampled") else None,
                instructions=instructions if torch.get_num_threads() == 1 else None,
            )
        trace.flags += between(before, shared_load(load(), loaded.model)).flags()
        if trace.device_timeline:
            trace.flags += gpu_flags(trace.device_timeline, 0.0, trace.e2e_s)
        return {"trace": msgspec.to_builtins(trace), "model": self._about(loaded) | record_of(cell.policy, loaded)}

    def warm_up(self, args: Args, report: Report) -> Args:
        """One request of a speed cell, decoded until its steps settle: ``axes``, ``batch``, ``within``."""
        from d2obench.measure.clock import clock_for, shared_clock
        from d2obench.measure.memory import settle
        from d2obench.measure.phases import MOST_TOKENS, out_of_memory_named, warm_up

        cell = read_cell(args)
        loaded, shape = self._model(cell, report), shape_of(cell)
        texts = self._texts(loaded, shape.prompt, args["batch"], cell.axes.seed)
        gen = min(shape.gen, MOST_TOKENS)
        settle(loaded.device, beside(loaded.model))
        with out_of_memory_named() as mark:
            warm = warm_up(
                lambda: _session(loaded, cell, gen, mark),
                texts,
                gen,
                clock=shared_clock(clock_for(loaded.device), loaded.model),
                within=args["within"],
            )
        return warm._asdict()

    def count(self, args: Args, report: Report) -> Args:
        """Counts operators, FLOPs and bytes of one decode step of a speed cell: ``axes``, ``batch``. Answers with the
        counts by metric."""
        import torch

        from d2obench.measure.counters import count_step
        from d2obench.measure.memory import live_bytes
        from d2obench.measure.phases import out_of_memory_named

        cell = read_cell(args)
        loaded = self._model(cell, report)
        if not isinstance(loaded.model, torch.nn.Module):  # llama.cpp: its operators can't be counted
            return {}
        shape = shape_of(cell)
        texts = self._texts(loaded, shape.prompt, args["batch"], cell.axes.seed)
        before = live_bytes()
        with out_of_memory_named() as mark:
            session = _session(loaded, cell, shape.gen, mark)
            try:
                counts = count_step(session, texts)
                alive = live_bytes() - before
            finally:
                session.close()
        return _as_metrics(counts, alive)

    def hold(self, args: Args, report: Report) -> Args:
        """Prefills the cache of a speed cell, warms up its decode steps and keeps it for :meth:`decode_in_turn`:
        ``cell`` (an id), ``axes``, ``batch``, ``within``. Answers with the model and the times of the warm-up, or with
        ``why`` the cell can't be measured in windows.
        """
        from d2obench.external import record_of
        from d2obench.measure.clock import clock_for
        from d2obench.measure.memory import settle
        from d2obench.measure.phases import out_of_memory_named
        from d2obench.measure.side_by_side import hold

        cell = read_cell(args)
        loaded, shape = self._model(cell, report), shape_of(cell)
        texts = self._texts(loaded, shape.prompt, args["batch"], cell.axes.seed)
        settle(loaded.device, beside(loaded.model))
        try:
            with out_of_memory_named() as mark:
                self._held[args["cell"]], warm = hold(
                    lambda: _session(loaded, cell, shape.gen, mark),
                    texts,
                    shape.gen - 1,
                    clock=clock_for(loaded.device),
                    within=args["within"],
                )
        except ModelError as problem:  # a session that can't go back to an earlier step
            return {"why": str(problem)}
        return {"model": self._about(loaded) | record_of(cell.policy, loaded), "warm_up": warm._asdict()}

    def decode_in_turn(self, args: Args, report: Report) -> Args:
        """Measures windows of the caches that :meth:`hold` has kept: ``rounds`` of windows, each ``[sweep, depth,
        start, order, attempt]``, the ``lead`` and ``steps`` of a window, and the number of this ``process`` in the
        group. Answers with ``[cell, window]`` pairs."""
        from d2obench.measure.clock import clock_for
        from d2obench.measure.samples import RoundOfWindows
        from d2obench.measure.side_by_side import decode_in_turn

        device = self._loaded.device
        clock, gpu = clock_for(device), self._nvml(device)
        self._origin = self._origin or clock.now()
        windows = decode_in_turn(
            self._held,
            msgspec.convert(args["rounds"], list[RoundOfWindows]),
            process=args["process"],
            lead=args["lead"],
            steps=args["steps"],
            clock=clock,
            origin=self._origin,
            read_gpu=gpu.read if gpu else None,
        )
        return {"windows": [[cell, msgspec.to_builtins(window)] for cell, window in windows]}

    def let_go(self, args: Args, report: Report) -> Args:
        """Closes all caches that :meth:`hold` has kept, after counting a decode step of those named in ``count``.
        Answers with the ``counts`` by cell."""
        counts: dict[str, Any] = {}
        try:
            for cell in args["count"]:
                counts[cell] = _as_metrics(*self._held.pop(cell).count())
        finally:
            while self._held:
                self._held.popitem()[1].close()
            self._origin = 0.0
        return {"counts": counts}

    def evaluate(self, args: Args, report: Report) -> Args:
        """Runs a whole quality cell: the ``cell``, and the table ``quality`` of the suite."""
        from d2obench.tasks import evaluate

        cell = read_cell(args["cell"])
        loaded = self._model(cell, report)
        result = evaluate(loaded, cell, msgspec.convert(args["quality"], Quality), report)
        return self._evaluated(cell, result) | {"items": result.items}

    def evaluate_part(self, args: Args, report: Report) -> Args:
        """Runs a batch of a quality task under several cells that differ in policy and budget alone: ``cells``, the
        table ``quality`` of the suite, and the number ``part`` of the batch.

        Answers with the number of ``parts`` and of ``items`` in all, the ``places`` of this batch's items, and for each
        cell, by its id, its items and ``seconds``, or an ``error``.
        """
        from d2obench.measure.clock import HostClock
        from d2obench.tasks import batches
        from d2obench.tasks.together import run

        cells = [read_cell(sent) for sent in args["cells"]]
        quality, axes = msgspec.convert(args["quality"], Quality), cells[0].axes
        loaded = self._model(cells[0], report)
        key = (self._key, axes.task, axes.shape, axes.seed, quality)
        for cell in cells:
            self._prepare(cell, report)
        if self._batches[0] != key:
            self._batches = key, batches(loaded, cells[0], quality)
        every = self._batches[1]
        batch, found, clock = every[args["part"]], {}, HostClock()
        since = clock.now()
        for done, (cell, items) in enumerate(run(loaded, cells, quality, batch), 1):
            took = {"seconds": clock.now() - since}
            if isinstance(items, Exception):
                found[cell.id] = {**took, "error": describe(items)}
                del items
                self.release()
            else:
                found[cell.id] = {**took, "items": items}
            since = clock.now()
            report(done, len(cells), f"{cell.axes.policy} {cell.axes.budget or ''}".strip())
        total = sum(len(one.places) for one in every)
        return {"parts": len(every), "items": total, "places": list(batch.places), "cells": found}

    def conclude(self, args: Args, report: Report) -> Args:
        """The result of a quality cell from its ``items``: the ``cell``, and the table ``quality`` of the suite."""
        from d2obench.tasks import conclude

        cell = read_cell(args["cell"])
        self._model(cell, report)
        return self._evaluated(cell, conclude(cell, msgspec.convert(args["quality"], Quality), args["items"]))

    def _evaluated(self, cell: Cell, result: Evaluation) -> Args:
        from d2obench.external import record_of

        values = {key: msgspec.to_builtins(value) for key, value in result.values.items()}
        about = self._about(self._loaded) | record_of(cell.policy, self._loaded)
        flags = [*result.details.get("flags", ()), *about.get("flags", ())]
        return {"values": values, "details": result.details, "flags": flags, "model": about}

    def exit(self, args: Args, report: Report) -> Args:
        """Ends the process after this answer."""
        raise SystemExit(0)

    def release(self) -> None:
        """Frees the memory of the last operation, so that every operation starts with the same memory in use."""
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _model(self, cell: Cell, report: Report) -> Any:
        from d2obench.cpu import memory as host_memory
        from d2obench.external import loader_of
        from d2obench.measure.memory import GarbageCollection

        key = (cell.axes.model, cell.axes.dtype, cell.axes.device)
        if key != self._key:
            self._loaded = self._key = None
            GarbageCollection.release_model()
            self.release()
            load = loader_of(cell.policy)
            self._loaded = load(*key, lambda what, done, total: report(done, total, what), self._placement)
            self._key = key
            GarbageCollection.exempt_model()
            if self.alone and self._loaded.device.type == "cpu":
                host_memory.retain()
            if self.alone and self._loaded.device.type == "cuda":
                import torch

                torch.cuda.set_device(self._loaded.device)  # what asks for no device in particular means this one
        self._prepare(cell, report)
        return self._loaded

    def _prepare(self, cell: Cell, report: Report) -> None:
        """Measures what the cell's policy needs to know of the model, before anything is timed."""
        if cell.policy.yardstick is None and cell.policy.policy.calibration:
            from d2obench.cache.calibration import prepare

            prepare(cell.policy.policy, self._loaded, lambda what, done, total: report(done, total, what))

    @staticmethod
    def _limit_memory(device: Any, limit: int | None) -> None:
        if device.type == "cuda":
            import torch

            total = torch.cuda.mem_get_info(device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total) if limit else 1.0, device)

    @staticmethod
    def _about(loaded: Any) -> Args:
        import torch

        from d2obench.measure.roofline import read_weights_bytes

        keys = ("name", "digest", "context", "weights_bytes", "layers", "kv_heads", "head_dim", "has_sense", "note")
        known = isinstance(loaded.model, torch.nn.Module)
        read = read_weights_bytes(loaded.model) if known else loaded.weights_bytes
        return {**{key: getattr(loaded, key) for key in keys}, "weights_read_bytes": read}

    def _texts(self, loaded: Any, prompt: int, batch: int, seed: int) -> list[list[int]]:
        """``batch`` different prompts of ``prompt`` tokens; the same ones for every policy."""
        key = (loaded.digest, prompt, batch, seed)
        if self._prompts[0] != key:
            self._prompts = key, timing_prompts(loaded, prompt, batch, seed)
        return self._prompts[1]


def _session(loaded: Any, cell: Cell, gen: int, mark: Any) -> Any:
    """The session of a speed cell. Its text may be longer than the model's context, since its quality is not scored."""
    from d2obench.external import open_session

    return open_session(
        loaded, cell.policy.built, cell.budget, max_new=gen, seed=cell.axes.seed, mark=mark, beyond=True
    )


def _as_metrics(counts: StepCounts, live_bytes: int) -> Args:
    """Counts of a decode step, by the metrics that they are recorded as."""
    figures = {
        "ops_step": counts.ops,
        "flops_step": counts.flops,
        "cats_step": sum(counts.concatenations.values()),
        "waits_step": sum(counts.waits.values()),
        "fresh_step_bytes": counts.allocated_bytes,
        "live_bytes": live_bytes,
    }
    return figures if counts.launches is None else {**figures, "launches_step": counts.launches}


def main(worker: Worker | None = None) -> None:
    """Answers requests until told to exit or the parent is gone; ``worker`` does the work."""
    *placement, down, up = sys.argv[1:]
    if worker is None:
        worker = Worker(*(msgspec.json.decode(words, type=Placement) for words in placement))
        worker.alone = True
    requests = _listen(int(down))
    answers = os.fdopen(int(up), "wb")

    def send(message: Args) -> None:
        answers.write(msgspec.json.encode(message) + b"\n")
        answers.flush()

    while True:
        request = requests.get()
        number, op = request["id"], request["op"]

        def report(done: int, total: int, words: str = "", number: int = number) -> None:
            send({"id": number, "progress": [done, total, words]})

        try:
            if op not in OPS:
                raise WorkerError(f"{UNKNOWN} '{op}'")
            compiler.switch_off(without(request["args"], os.environ.get(WITHOUT, "")))
            answer: Args = {"ok": getattr(worker, op)(request["args"], report)}
            if why := compiler.ending():  # a capture that failed: the figures are those of another path
                fault = DeviceFaultError("a decode step could not be captured", why=why)
                fault.part = "graph"
                answer = {"error": describe(fault)}
        except SystemExit:
            answer = {"ok": {}, "last": True}
        except Exception as problem:
            traceback.print_exc()
            answer = {"error": describe(problem)} | ({"last": True} if is_device_fault(problem) else {})
        if compiler.ending():
            answer["last"] = True
        send({"id": number, **answer})
        if answer.get("last"):
            return
        worker.release()  # not inside the except block, where the exception still holds the tensors that did not fit


def _listen(pipe: int) -> queue.SimpleQueue[Args]:
    """A queue of the requests that arrive on ``pipe``; when the other end is closed this process ends."""
    requests: queue.SimpleQueue[Args] = queue.SimpleQueue()

    def listen() -> None:
        with os.fdopen(pipe, "rb") as lines:
            for line in lines:
                requests.put(msgspec.json.decode(line))
        os._exit(0)

    threading.Thread(target=listen, name="requests", daemon=True).start()
    return requests


if __name__ == "__main__":
    main()
