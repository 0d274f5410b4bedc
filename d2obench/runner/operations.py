"""What a worker process can be asked to do. One class, one method an operation; its arguments and results are JSON.

A worker holds at most one model, the last one asked for, so that the cells of a group find it warm.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import asdict
from typing import Any, Protocol

import msgspec

from d2obench.record import Axes
from d2obench.runner.prompts import prompts
from d2obench.spec import parse_shape
from d2obench.suite import Cell, Quality

Args = dict[str, Any]
WARM_TOKENS = 8
"""Tokens a warm-up generates: enough to run every kernel of the loop."""


class Report(Protocol):
    """Tells the parent how far an operation is."""

    def __call__(self, done: int, total: int, words: str = "") -> None: ...


class Worker:
    """One device's process: at most one model is held, the last one asked for."""

    def __init__(self) -> None:
        self._loaded: Any = None
        self._key: tuple[str, str, str] | None = None
        self._prompts: tuple[Any, list[list[int]]] = (None, [])
        self._gpu: dict[str, Any] = {}

    def hello(self, args: Args, report: Report) -> Args:
        """Versions, the process id, and the device that ``auto`` stands for here."""
        import torch
        import transformers

        from d2obench import __version__
        from d2obench.models import pick_device

        return {
            "pid": os.getpid(),
            "version": __version__,
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "device": str(pick_device("auto")),
        }

    def describe(self, args: Args, report: Report) -> Args:
        """What a suite's words stand for here: ``devices`` by name and ``models`` by name, checked but not loaded."""
        from d2obench.models import check, config_of, pick_device

        for name in args["models"]:
            check(name)
        return {
            "devices": {name: str(pick_device(name)) for name in args["devices"]},
            "models": {name: asdict(config_of(name)) for name in args["models"]},
        }

    def environment(self, args: Args, report: Report) -> Args:
        """The fingerprint of machine and software that a run on ``device`` is bound to."""
        import torch  # noqa: F401 - the fingerprint asks torch only where it is loaded

        from d2obench.measure.environment import fingerprint

        return fingerprint(args["device"])

    def refuse_busy(self, args: Args, report: Report) -> Args:
        """A MeasureError where processes other than ``own`` compute on a GPU ``device``."""
        import torch

        from d2obench.measure.nvml import refuse_busy

        refuse_busy(self._nvml(torch.device(args["device"])), frozenset(args["own"]))
        return {}

    def bandwidth(self, args: Args, report: Report) -> Args:
        """Copy bandwidth of ``device``, read and written bytes per second."""
        import torch

        from d2obench.measure.roofline import copy_bandwidth

        found = copy_bandwidth(torch.device(args["device"]), seconds=args.get("seconds", 1.0))
        return {"bytes_per_s": found.best, "median": found.median, "n": found.n}

    def idle(self, args: Args, report: Report) -> Args:
        """Power of a GPU ``device`` in watts while this process holds it and nothing runs; None where it can't be told.

        Recent GPUs tell the mean over the last second, so the work before it is waited out.
        """
        import time

        import torch

        from d2obench.measure.energy import idle_power

        device = torch.device(args["device"])
        gpu = self._nvml(device)
        if gpu is None:
            return {"idle_w": None}
        if torch.cuda.is_available():
            torch.cuda.synchronize(device)
        time.sleep(args.get("wait", 1.5))
        return {"idle_w": idle_power(gpu, args.get("seconds", 2.0))}

    def rates(self, args: Args, report: Report) -> Args:
        """Two rough figures for a prediction: copy bandwidth, and FLOP/s of a square product in ``dtype``."""
        import torch

        from d2obench.measure.clock import clock_for
        from d2obench.measure.roofline import copy_bandwidth

        device = torch.device(args["device"])
        size = 8192 if device.type == "cuda" else 1024
        one = torch.randn(size, size, device=device).to(getattr(torch, args["dtype"]))
        clock, best = clock_for(device), 0.0
        for _ in range(5):
            clock.start()
            before = clock.stamp()
            torch.mm(one, one)
            a, b = clock.read([before, clock.stamp()])
            best = max(best, 2 * size**3 / (b - a))
        return {"bandwidth": copy_bandwidth(device, seconds=0.2).best, "flops": best}

    def memory(self, args: Args, report: Report) -> Args:
        """Bytes of memory that ``device`` has and that are free."""
        import torch

        device = torch.device(args["device"])
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
        else:
            import psutil

            found = psutil.virtual_memory()
            free, total = found.available, found.total
        return {"free": int(free), "total": int(total)}

    def load(self, args: Args, report: Report) -> Args:
        """Loads the model of ``axes`` and says what it is."""
        return self._about(self._model(_axes(args), report))

    def measure(self, args: Args, report: Report) -> Args:
        """One request of a speed cell: ``axes``, ``batch``, ``sampled`` ([depths, steps] or None).

        ``warm_up`` cuts the generation short, for a gate whose base may know no other way.
        ``limit`` bounds a GPU's memory, in bytes.
        """
        from d2obench.engine import Session
        from d2obench.measure.clock import clock_for
        from d2obench.measure.depths import Sampled
        from d2obench.measure.disturbance import between, gpu_flags, load
        from d2obench.measure.memory import probe_for, settle
        from d2obench.measure.phases import measure_request

        axes = _axes(args)
        loaded = self._model(axes, report)
        (shape,) = parse_shape(axes.shape or "")
        gen = min(shape.gen, WARM_TOKENS) if args.get("warm_up") else shape.gen
        texts = self._texts(loaded, shape.prompt, args["batch"], axes.seed)
        settle(loaded.device)
        self._bound(loaded.device, args.get("limit"))
        before = load()
        trace = measure_request(
            lambda mark: Session(loaded, axes.policy, axes.budget, max_new=gen, seed=axes.seed, mark=mark),
            texts,
            gen,
            clock=clock_for(loaded.device),
            memory=probe_for(loaded.device, nvml=self._nvml(loaded.device)),
            sampled=Sampled(*args["sampled"]) if args.get("sampled") else None,
        )
        trace.flags += between(before, load()).flags()
        if trace.device_timeline:
            trace.flags += gpu_flags(trace.device_timeline, 0.0, trace.e2e_s)
        return {"trace": msgspec.to_builtins(trace), "model": self._about(loaded)}

    def warm_up(self, args: Args, report: Report) -> Args:
        """One request of a speed cell, decoded until its steps settle: ``axes``, ``batch``, ``within``."""
        from d2obench.engine import Session
        from d2obench.measure.clock import clock_for
        from d2obench.measure.memory import settle
        from d2obench.measure.phases import shortage_named
        from d2obench.measure.warmup import MOST_TOKENS, warm_up

        axes = _axes(args)
        loaded = self._model(axes, report)
        (shape,) = parse_shape(axes.shape or "")
        texts = self._texts(loaded, shape.prompt, args["batch"], axes.seed)
        gen = min(shape.gen, MOST_TOKENS)
        settle(loaded.device)
        with shortage_named() as mark:
            found = warm_up(
                lambda: Session(loaded, axes.policy, axes.budget, max_new=gen, seed=axes.seed, mark=mark),
                texts,
                gen,
                clock=clock_for(loaded.device),
                within=args["within"],
            )
        return found._asdict()

    def count(self, args: Args, report: Report) -> Args:
        """What one decode step of a speed cell does and holds, counted, by metric: ``axes``, ``batch``."""
        from d2obench.engine import Session
        from d2obench.measure.counters import count_step
        from d2obench.measure.live import live_bytes
        from d2obench.measure.phases import shortage_named

        axes = _axes(args)
        loaded = self._model(axes, report)
        (shape,) = parse_shape(axes.shape or "")
        texts = self._texts(loaded, shape.prompt, args["batch"], axes.seed)
        before = live_bytes()
        with shortage_named() as mark:
            session = Session(loaded, axes.policy, axes.budget, max_new=shape.gen, seed=axes.seed, mark=mark)
            try:
                counts = count_step(session, texts)
                alive = live_bytes() - before
            finally:
                session.close()
        found = {
            "ops_step": counts.ops,
            "flops_step": counts.flops,
            "cats_step": sum(counts.concatenations.values()),
            "waits_step": sum(counts.waits.values()),
            "fresh_step_bytes": counts.allocated_bytes,
            "live_bytes": alive,
        }
        return found if counts.launches is None else {**found, "launches_step": counts.launches}

    def evaluate(self, args: Args, report: Report) -> Args:
        """A quality cell: ``cell`` and ``quality`` as in the suite."""
        from d2obench.tasks import evaluate

        cell = msgspec.convert(args["cell"], Cell)
        loaded = self._model(cell.axes, report)
        found = evaluate(loaded, cell, msgspec.convert(args["quality"], Quality), report)
        values = {key: msgspec.to_builtins(value) for key, value in found.values.items()}
        flags = list(found.details.get("flags", ()))
        about = self._about(loaded)
        return {"values": values, "items": found.items, "details": found.details, "flags": flags, "model": about}

    def exit(self, args: Args, report: Report) -> Args:
        """Ends the process after this answer."""
        raise SystemExit(0)

    def release(self) -> None:
        """Gives back what the last operation held, so that the next one starts from the same floor."""
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _model(self, axes: Axes, report: Report) -> Any:
        from d2obench.models import load

        key = (axes.model, axes.dtype, axes.device)
        if key != self._key:
            self._loaded = self._key = None
            gc.unfreeze()
            self.release()
            self._loaded = load(*key, progress=lambda what, done, total: report(done, total, what))
            self._key = key
            gc.collect()
            gc.freeze()  # what stays need not be searched for garbage around every request
        return self._loaded

    @staticmethod
    def _bound(device: Any, limit: int | None) -> None:
        if device.type == "cuda":
            import torch

            total = torch.cuda.mem_get_info(device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total) if limit else 1.0, device)

    @staticmethod
    def _about(loaded: Any) -> Args:
        from d2obench.measure.roofline import read_weights_bytes

        keys = ("name", "digest", "context", "weights_bytes", "layers", "kv_heads", "head_dim", "has_sense", "note")
        return {**{key: getattr(loaded, key) for key in keys}, "weights_read_bytes": read_weights_bytes(loaded.model)}

    def _texts(self, loaded: Any, prompt: int, batch: int, seed: int) -> list[list[int]]:
        """``batch`` different prompts of ``prompt`` tokens; the same ones for every policy."""
        key = (loaded.digest, prompt, batch, seed)
        if self._prompts[0] != key:
            self._prompts = key, prompts(loaded, prompt, batch, seed)
        return self._prompts[1]

    def _nvml(self, device: Any) -> Any:
        from d2obench.measure.nvml import open_gpu

        if device.type != "cuda":
            return None
        if str(device) not in self._gpu:
            self._gpu[str(device)] = open_gpu(device)
        return self._gpu[str(device)]


def _axes(args: Args) -> Axes:
    return msgspec.convert(args["axes"], Axes)
