"""Operations of a worker process that need no model: facts about its machine, its software and its devices."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import Any, Protocol

Args = dict[str, Any]


class Report(Protocol):
    """Tells the parent how far an operation is."""

    def __call__(self, done: int, total: int, words: str = "") -> None: ...


class MachineOperations:
    """Operations about the machine that a worker runs on.

    Each takes ``args``, a JSON object whose keys its docstring names, and may call ``report``; it answers with a JSON
    object.
    """

    def __init__(self) -> None:
        self._gpu: dict[str, Any] = {}
        self._recognised: set[str] = set()

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
        """What the names of ``devices``, such as ``auto``, stand for; the dimensions of ``models``, which are checked
        and not loaded; and the number of ``gpus``."""
        import torch

        from d2obench.models import check, config_of, pick_device

        for name in args["models"]:
            check(name)
        return {
            "devices": {name: str(pick_device(name)) for name in args["devices"]},
            "models": {name: asdict(config_of(name)) for name in args["models"]},
            "gpus": torch.cuda.device_count(),
        }

    def prepare(self, args: Args, report: Report) -> Args:
        """Checks that the yardsticks among ``policies`` can run here; answers with ``versions`` of their libraries."""
        from d2obench.external import check_installed

        return {"versions": check_installed(args["policies"])}

    def environment(self, args: Args, report: Report) -> Args:
        """The fingerprint of machine and software for a run on ``device``."""
        import torch  # noqa: F401 - the fingerprint has facts about torch only where torch is imported

        from d2obench.measure.environment import fingerprint

        return fingerprint(args["device"])

    def refuse_busy(self, args: Args, report: Report) -> Args:
        """Raises a MeasureError where processes other than this one and those in ``own`` (pids) compute on a GPU
        ``device``."""
        import torch

        from d2obench.measure.nvml import other_processes, refuse_busy

        own = frozenset(args["own"])
        device = torch.device(args["device"])
        if other_processes(self._nvml(device), own):  # this process may be among them, under another pid
            self._recognise(device)
        refuse_busy(self._nvml(device), own)
        return {}

    def bandwidth(self, args: Args, report: Report) -> Args:
        """Copy bandwidth of ``device``, read and written bytes per second: the best and the median of ``n`` copies."""
        import torch

        from d2obench.measure.roofline import copy_bandwidth

        copies = copy_bandwidth(torch.device(args["device"]), seconds=args.get("seconds", 1.0))
        return {"bytes_per_s": copies.best, "median": copies.median, "n": copies.n}

    def idle(self, args: Args, report: Report) -> Args:
        """Power in watts of a GPU ``device`` on which nothing runs; None on a CPU and where the driver doesn't tell it.

        Recent GPUs report the mean power of the last second, so it waits longer than that first.
        """
        import time

        import torch

        from d2obench.measure.nvml import idle_power

        device = torch.device(args["device"])
        gpu = self._nvml(device)
        if gpu is None:
            return {"idle_w": None}
        if torch.cuda.is_available():
            torch.cuda.synchronize(device)
        time.sleep(args.get("wait", 1.5))
        return {"idle_w": idle_power(gpu, args.get("seconds", 2.0))}

    def rates(self, args: Args, report: Report) -> Args:
        """Two rough rates for predictions: copy bandwidth, and FLOP/s of a product of square matrices in ``dtype``."""
        import torch

        from d2obench.measure.clock import clock_for
        from d2obench.measure.roofline import copy_bandwidth

        device = torch.device(args["device"])
        size = 8192 if device.type == "cuda" else 1024
        square = torch.randn(size, size, device=device).to(getattr(torch, args["dtype"]))
        clock, best = clock_for(device), 0.0
        for _ in range(5):
            clock.start()
            before = clock.stamp()
            torch.mm(square, square)
            a, b = clock.read([before, clock.stamp()])
            best = max(best, 2 * size**3 / (b - a))
        return {"bandwidth": copy_bandwidth(device, seconds=0.2).best, "flops": best}

    def noise(self, args: Args, report: Report) -> Args:
        """The noise of ``device``, measured for ``seconds`` by comparing a loop with itself: ``paired``, and
        ``detectable``, the smallest change that is told from noise, by number of rounds."""
        import torch

        from d2obench.measure.checkup import measure_noise

        found = measure_noise(torch.device(args["device"]), args["seconds"])
        return {"paired": found.paired, "detectable": {str(n): change for n, change in found.detectable.items()}}

    def memory(self, args: Args, report: Report) -> Args:
        """Memory of ``device`` in bytes: ``total``, and ``free`` now."""
        import torch

        device = torch.device(args["device"])
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
        else:
            import psutil

            host = psutil.virtual_memory()
            free, total = host.available, host.total
        return {"free": int(free), "total": int(total)}

    def _nvml(self, device: Any) -> Any:
        """The driver's handle of a GPU, opened once; None on a CPU."""
        from d2obench.measure.nvml import open_gpu

        if device.type != "cuda":
            return None
        if str(device) not in self._gpu:
            self._gpu[str(device)] = open_gpu(device)
        return self._gpu[str(device)]

    def _recognise(self, device: Any) -> None:
        """Finds out, once for each device, under which pid the driver lists this process."""
        from d2obench.measure.nvml import block_on, find_own_process

        gpu = self._nvml(device)
        if gpu is not None and str(device) not in self._recognised:
            self._recognised.add(str(device))
            find_own_process(gpu, lambda: block_on(device))
