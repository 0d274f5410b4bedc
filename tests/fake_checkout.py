"""A git repository whose d2obench is a script: a worker that answers at once with the figures in ``arm.json``.

Gates can so be tested with exact times, exact faults and real processes, worktrees and signals.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ARM: dict[str, Any] = {
    "torch": "2.0", "tpot": 0.010, "ttft": 0.1, "kept": [[20.0, 20.0], [22.0, 22.0]], "kv_bytes": 4096,
    "digest": "ab", "rss": 500_000_000, "counts": {"ops_step": 100, "live_bytes": 5000},
    "kl": [0.1, 0.12, 0.08, 0.11, 0.09, 0.13, 0.1, 0.07],
    "instructions": None, "fail": "", "hang": False, "slow_once": 1.0, "flags": [],
    "noise": {"8": 0.02, "16": 0.015, "32": 0.01},
}  # fmt: skip

SUITE = """
schema = 1
name = "fake"
about = "for tests"
[axes]
policy = ["full", "h2o"]
task = ["speed"]
model = ["shape:tiny"]
shape = ["128+8"]
[gate]
looks = [4, 8]
metrics = ["tpot_s", "speedup"]
"""

WORKER = """
import json, os, random, sys, time
from pathlib import Path

ARM = json.loads((Path(__file__).parents[2] / "arm.json").read_text())
SCRATCH = Path(os.environ["FAKE_SCRATCH"])


MODEL = dict(architecture="fake", layers=2, heads=4, kv_heads=2, head_dim=4, hidden=16, vocab=64, context=4096,
             parameters=1000)


def measure(args):
    if ARM["hang"]:
        (SCRATCH / "hanging").touch()
        while not (SCRATCH / "go").exists():
            time.sleep(0.01)
    if ARM["fail"]:
        return {"error": {"kind": ARM["fail"], "what": "it fell over", "why": "", "remedy": ""}}
    slow = ARM["slow_once"] if not (SCRATCH / "second").exists() else 1.0
    full = args["axes"]["policy"] == "full"
    step = ARM["tpot"] * (1 if not full else 1.5) * slow * (1 + NOISE.random() / 100)
    trace = {
        "batch": 1, "gen": 8, "prompt_tokens": 128, "ttft_s": ARM["ttft"], "prefill_s": ARM["ttft"], "compress_s": 0.0,
        "decode_s": step * 7, "e2e_s": ARM["ttft"] + step * 7, "loop_s": 0.0, "step_s": [step] * 7,
        "marks": [[0.0, "prefill"], [ARM["ttft"], "token"]], "peaks": {"decode": {"rss_bytes": ARM["rss"]}},
        "kv_bytes": ARM["kv_bytes"], "kv_prompt_bytes": ARM["kv_bytes"], "state_bytes": 0, "requested": None,
        "effective": 0.2, "over": False, "kept": ARM["kept"], "held": ARM["kept"], "merged": 0, "evicted": 0,
        "tokens_digest": ARM["digest"], "flags": ARM["flags"],
        "instructions": ARM["instructions"] and ARM["instructions"] * (1 + NOISE.random() / 1000),
    }
    return {"trace": trace, "model": {"weights_bytes": 1000}}


def evaluate(args):
    items = [{"id": str(i), "document": str(i), "kl": [v]} for i, v in enumerate(ARM["kl"])]
    return {"values": {"kl": {"value": sum(ARM["kl"]) / len(ARM["kl"])}}, "items": items, "details": {}, "flags": []}


def main():
    with open(SCRATCH / "pids", "a") as file:
        print(os.getpid(), file=file)
    answers = {
        "hello": lambda args: {"torch": ARM["torch"], "transformers": "5", "python": "3"},
        "describe": lambda args: {"devices": {d: "cpu" for d in args["devices"]},
                                  "models": dict.fromkeys(args["models"], MODEL)},
        "environment": lambda args: {}, "refuse_busy": lambda args: {}, "load": lambda args: {},
        "noise": lambda args: {"paired": 0.01, "detectable": ARM["noise"]},
        "count": lambda args: ARM["counts"], "measure": measure, "evaluate": evaluate,
        "warm_up": lambda args: {"decode_s": [0.01, 0.01], "stable": True},
    }
    with os.fdopen(int(sys.argv[1]), "rb") as requests, os.fdopen(int(sys.argv[2]), "wb", buffering=0) as out:
        for line in requests:
            request = json.loads(line)
            found = answers[request["op"]](request["args"] or {})
            answer = found if "error" in found else {"ok": found}
            out.write(json.dumps({"id": request["id"], **answer}).encode() + b"\\n")
    (SCRATCH / "second").touch()


NOISE = random.Random(7)
if __name__ == "__main__":
    main()
"""


class Checkout:
    """The repository: ``commit`` makes one with these figures in ``arm.json``."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch
        for name in ("", "run", "cache", "policies", "models"):
            folder = root / "d2obench" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text("")
        (root / "d2obench/run/worker.py").write_text(WORKER)
        (root / "suites").mkdir()
        self.suite(SUITE)
        self.git("init", "-q", "-b", "main")

    def suite(self, text: str) -> None:
        (self.root / "suites/fake.toml").write_text(text)

    def work(self, **arm: Any) -> None:
        """The work tree's figures, not committed."""
        (self.root / "arm.json").write_text(json.dumps({**ARM, **arm}))

    def commit(self, **arm: Any) -> str:
        self.work(**arm)
        self.git("add", "-A")
        self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "x")
        return self.git("rev-parse", "HEAD")

    def git(self, *words: str) -> str:
        done = subprocess.run(["git", "-C", str(self.root), *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    @property
    def worktrees(self) -> int:
        return len(self.git("worktree", "list").splitlines())

    def workers_alive(self) -> list[int]:
        pids = (self.scratch / "pids").read_text().split() if (self.scratch / "pids").exists() else []
        return [int(pid) for pid in pids if Path(f"/proc/{pid}").exists() and not _zombie(pid)]


def _zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
