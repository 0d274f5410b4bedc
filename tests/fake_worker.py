"""A worker that answers at once with scripted figures; the loop and the protocol are the real ones.

The environment variable ``FAKE`` holds JSON: ``oom``, ``crash``, ``hang`` (policies that end so), ``fits`` (the largest
batch), ``die`` (a file: the worker is killed once, in round 1, and leaves it), ``delay`` (seconds of a request),
``noise`` (what the worker prints), ``flags`` (of every round), ``calm`` (rounds from this one on have no flags),
``cold`` (warm-ups until one is stable), ``power`` (watts of a GPU), ``idle_w`` (when idle), ``log`` (a file that gets
a line for every request), ``bias`` (a sampled request's time ÷ that of a full one), ``spans``
(a file that gets the node, the begin and the end of each), ``visible`` (a file that gets the worker's pid and the GPUs
it sees), ``memory`` (bytes of the device), ``unlike`` (a file: the node that makes it has another GPU than the rest),
``stuck`` (policies whose session can't go back, so that they have no windows), ``wild`` (so many rounds of windows are
disturbed in each process, the first ones), ``oom_held`` (policies that run out of memory beside others),
``uncaptured`` and ``broken`` (policies whose decode steps can't be captured, or break the GPU, until the part of the
GPU path is switched off; ``broken_always``: even then), ``exhausted`` (those during whose capture memory ends),
``faulty`` (policies whose prompt is refused), ``parts`` (batches of a quality task).

Three settings hold a request up until something has happened, so that no test depends on how fast it is: ``until``
(a count and a file: the requests after so many lines of ``log`` wait until the file is there), ``meet`` (with
``visible``: a request waits until so many workers have had one), and ``unlike`` (a request waits until a second node
has told its environment).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from d2obench import compiler
from d2obench.errors import OutOfMemory, UsageError
from d2obench.run.worker import Worker, main
from d2obench.run.worker_client import describe

FAKE: dict[str, Any] = json.loads(os.environ.get("FAKE", "{}"))
MODEL = {
    "name": "fake", "digest": "0" * 64, "context": 4096, "weights_bytes": 1000, "weights_read_bytes": 900,
    "layers": 2, "kv_heads": 2, "head_dim": 4, "has_sense": True, "note": "",
}  # fmt: skip
DIMENSIONS = {
    "architecture": "fake", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 16, "vocab": 64,
    "context": 4096, "parameters": 1000,
}  # fmt: skip


class Fake(Worker):
    """Every operation without a model."""

    def hello(self, args: Any, report: Any) -> Any:
        return {
            "pid": os.getpid(),
            "version": "fake",
            "python": "3",
            "torch": "0",
            "transformers": "0",
            "device": "cpu",
        }

    def describe(self, args: Any, report: Any) -> Any:
        devices = {name: "cpu" if name == "auto" else name for name in args["devices"]}
        return {"devices": devices, "models": dict.fromkeys(args["models"], DIMENSIONS)}

    def environment(self, args: Any, report: Any) -> Any:
        facts = {"cpu": "fake", "device": args["device"], **FAKE.get("facts", {})}
        if "unlike" in FAKE:
            facts["gpu"] = _alike(FAKE["unlike"])
            with open(FAKE["unlike"] + ".nodes", "a") as file:
                file.write(_node() + "\n")
        return facts

    def refuse_busy(self, args: Any, report: Any) -> Any:
        return {}

    def bandwidth(self, args: Any, report: Any) -> Any:
        return {"bytes_per_s": 1e9, "median": 1e9, "n": 1}

    def rates(self, args: Any, report: Any) -> Any:
        return {"bandwidth": 1e9, "flops": 1e9}

    def memory(self, args: Any, report: Any) -> Any:
        return {"free": FAKE.get("memory", 10**9), "total": FAKE.get("memory", 10**9)}

    def load(self, args: Any, report: Any) -> Any:
        report(1, 1, "loading fake")
        return MODEL

    def idle(self, args: Any, report: Any) -> Any:
        return {"idle_w": FAKE.get("idle_w")}

    def warm_up(self, args: Any, report: Any) -> Any:
        self._act("warm_up", args["axes"]["policy"], args)
        self.warmed = getattr(self, "warmed", 0) + 1
        return {"decode_s": [0.02, 0.01], "stable": self.warmed >= FAKE.get("cold", 1)}

    def measure(self, args: Any, report: Any) -> Any:
        self._act("measure", args["axes"]["policy"], args)
        if args["axes"]["policy"] in FAKE.get("faulty", ()):
            raise UsageError("a prompt that is too long")
        if args["batch"] > FAKE.get("fits", args["batch"]):
            raise OutOfMemory("out of memory in prefill")
        return {"trace": trace(args), "model": MODEL}

    def hold(self, args: Any, report: Any) -> Any:
        policy = args["axes"]["policy"]
        self._act("hold", policy, args)
        if policy in FAKE.get("stuck", ()):
            return {"why": "it can't go back"}
        if policy in FAKE.get("faulty", ()):
            raise UsageError("a prompt that is too long")
        if policy in FAKE.get("oom_held", ()):
            raise OutOfMemory("out of memory in prefill")
        self.kept = [*getattr(self, "kept", []), args["cell"]]
        return {"model": MODEL, "warm_up": {"decode_s": [0.02, 0.01], "stable": True}}

    def decode_in_turn(self, args: Any, report: Any) -> Any:
        found = []
        for sweep, depth, start, order, attempt in args["rounds"]:
            self.rounds_of_windows = getattr(self, "rounds_of_windows", 0) + 1
            for place, cell in enumerate(order):
                assert cell in self.kept
                policy = cell.split("/")[1]
                self._act("window", policy, {"round": f"{args['process']}.{sweep}.{depth}.{attempt}"})
                wild = self.rounds_of_windows <= FAKE.get("wild", 0) and place == 1
                found.append([cell, {
                    "process": args["process"], "sweep": sweep, "depth": depth, "attempt": attempt, "order": place,
                    "start": start + args["lead"], "at_s": 0.0, "lead_s": [1.0] * args["lead"],
                    "step_s": [step_of(policy, sweep, args["process"]) * (10 if wild else 1)] * args["steps"],
                    "flags": ["other load 40 %"] if wild else [],
                }])  # fmt: skip
        return {"windows": found}

    def let_go(self, args: Any, report: Any) -> Any:
        assert set(args["count"]) <= set(self.kept)
        self.kept = []
        return {"counts": {cell: {"ops_step": 100, "flops_step": 1000} for cell in args["count"]}}

    def count(self, args: Any, report: Any) -> Any:
        self._act("count", args["axes"]["policy"], args)
        return {"ops_step": 100, "flops_step": 1000}

    def evaluate(self, args: Any, report: Any) -> Any:
        self._act("evaluate", args["cell"]["axes"]["policy"], args)
        report(1, 1)
        items = [{"id": "a", "document": "a", "score": 1.0}]
        return {"values": {"score": {"value": 1.0}}, "items": items, "details": {}, "flags": [], "model": MODEL}

    def evaluate_part(self, args: Any, report: Any) -> Any:
        cells: dict[str, Any] = {}
        for cell in args["cells"]:
            try:
                self._act("evaluate", cell["axes"]["policy"], args)
            except OutOfMemory as problem:
                if len(args["cells"]) == 1:
                    raise
                cells[cell["id"]] = {"seconds": 0.1, "error": describe(problem)}
                continue
            items = [{"id": str(args["part"]), "document": str(args["part"]), "score": 1.0}]
            cells[cell["id"]] = {"seconds": 0.1, "items": items}
        report(1, 1)
        parts = FAKE.get("parts", 1)
        return {"parts": parts, "items": parts, "places": [args["part"]], "cells": cells}

    def conclude(self, args: Any, report: Any) -> Any:
        score = sum(item["score"] for item in args["items"]) / len(args["items"])
        return {"values": {"score": {"value": score}}, "details": {}, "flags": [], "model": MODEL}

    def release(self) -> None:
        """Nothing is held."""

    @staticmethod
    def _act(op: str, policy: str, args: dict[str, Any]) -> None:
        if "log" in FAKE:
            with open(FAKE["log"], "a") as file:
                file.write(f"{op} {policy} {args.get('round')}\n")
        if "noise" in FAKE:
            print(FAKE["noise"], flush=True)
            os.write(1, FAKE["noise"].encode())
        if "visible" in FAKE:
            with open(FAKE["visible"], "a") as file:
                file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        if "until" in FAKE:
            count, path = FAKE["until"]
            _wait(lambda: _count(FAKE["log"]) <= count or os.path.exists(path))
        if "meet" in FAKE:
            _wait(lambda: _count(FAKE["visible"], different=True) >= FAKE["meet"])
        if "unlike" in FAKE:
            _wait(lambda: _count(FAKE["unlike"] + ".nodes", different=True) >= 2)
        began = time.time()
        time.sleep(FAKE.get("delay", 0.0))
        if "spans" in FAKE:
            with open(FAKE["spans"], "a") as file:
                file.write(f"{_node()} {began} {time.time()}\n")
        if op == "measure" and args.get("round") == 1 and "die" in FAKE and not os.path.exists(FAKE["die"]):
            open(FAKE["die"], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if policy in FAKE.get("uncaptured", ()) and not compiler.off("graph"):
            compiler.end_process("capturing failed (simulated)")
        spoilt = not compiler.off("kernels") and policy in FAKE.get("broken", ())
        if spoilt or policy in FAKE.get("broken_always", ()):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if policy in FAKE.get("exhausted", ()):
            compiler.end_process("capturing failed (simulated)")
            raise RuntimeError("CUDA out of memory.")
        if policy in FAKE.get("oom", ()):
            raise OutOfMemory("out of memory in prefill", why="simulated")
        if policy in FAKE.get("crash", ()):
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if policy in FAKE.get("hang", ()):
            time.sleep(3600)


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def _count(path: str, different: bool = False) -> int:
    """The lines of a file."""
    with open(path) as file:
        lines = file.readlines()
    return len(set(lines) if different else lines)


def _node() -> str:
    """The process id of whoever started the one that started this: on a cluster, that of the node."""
    with open(f"/proc/{os.getppid()}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[1]


def _alike(path: str) -> str:
    """One kind of GPU for the node that asks first, another for the rest."""
    node = _node()
    try:
        with open(path, "x") as file:
            file.write(node)
    except FileExistsError:
        with open(path) as file:
            return "one" if file.read() == node else "another"
    return "one"


def step_of(policy: str, sweep: int, process: int) -> float:
    """Seconds of a decode step in windows: a process, a sweep and a policy each change it by a factor of their own."""
    return (1 + process / 10) * (1 + sweep / 100) * {"full": 0.02, "h2o": 0.012}.get(policy, 0.01)


def trace(args: dict[str, Any]) -> dict[str, Any]:
    """A request's figures, fixed by cell and round alone."""
    axes, batch = args["axes"], args["batch"]
    prompt, gen = map(int, axes["shape"].split("+"))
    seed = f"{axes['policy']}/{axes['budget']}/{axes['shape']}/{batch}/{args.get('round')}"
    step = 0.01 + zlib.crc32(seed.encode()) % 1000 * 1e-6
    steps = [step] * (gen - 1)
    kept = [[float(prompt)] * batch] * 2
    sampled = bool(args.get("sampled")) and "bias" in FAKE
    steps = [one * FAKE["bias"] for one in steps] if sampled else steps
    end = 0.2 + sum(steps)
    return {
        "batch": batch, "gen": gen, "prompt_tokens": prompt * batch,
        "ttft_s": 0.2, "prefill_s": 0.15, "compress_s": 0.05, "decode_s": sum(steps), "e2e_s": end,
        "loop_s": 0.0, "step_s": steps, "step_at": list(range(len(steps))) if sampled else [],
        "marks": [[0.0, "prefill"], [0.15, "compress"], [0.2, "token"], [0.2, "decode"], [end, "end"]],
        "peaks": {"prefill": {"rss_bytes": 1000 + 10 * batch}},
        "kv_bytes": 512 * batch, "kv_prompt_bytes": 512 * batch, "state_bytes": 0,
        "requested": None, "effective": 1.0, "kept": kept, "held": kept, "over": False, "merged": 0, "evicted": 0,
        "tokens_digest": "0" * 64,
        "flags": list(FAKE.get("flags", ())) if (args.get("round") or 0) < FAKE.get("calm", 10**9) else [],
        "device_timeline": [[t * end, *[None] * 5, FAKE["power"], *[None] * 3] for t in (0.0, 0.5, 1.0)]
        if "power" in FAKE
        else [],
    }  # fmt: skip


if __name__ == "__main__":
    main(Fake())
