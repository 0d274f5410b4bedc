"""Made-up run folders for the report tests: the same call gives the same bytes; nothing in them was measured."""

from __future__ import annotations

import math
import random
import zlib
from pathlib import Path
from typing import Any

from d2obench.record import Axes, CellRecord, RunInfo, Value, append_cell, dump, write_atomic
from d2obench.stats.intervals import highest, median
from d2obench.stats.ratios import against_full
from d2obench.tasks.base import values_of

POLICIES = [("full", None), *((policy, budget) for budget in ("0.2", "0.4") for policy in ("streaming", "h2o", "d2o"))]
PACE = {"full": 1.0, "streaming": 0.55, "h2o": 0.6, "d2o": 0.65}
LOSS = {"full": 0.0, "streaming": 0.15, "h2o": 0.10, "d2o": 0.13}
ROUNDS, ITEMS, LAYERS, MIB = 5, 12, 6, 2**20
WEIGHTS = 4 * MIB
Rounds = list[dict[str, Any]]


def axes(task: str, policy: str, budget: str | None = None, **more: Any) -> Axes:
    """Axes of an embedded model on a CPU."""
    base: dict[str, Any] = {"model": "embedded", "dtype": "float32", "device": "cpu", "seed": 0}
    return Axes(**(base | {"shape": None, "batch": None} | more), task=task, policy=policy, budget=budget)


def cell_id(point: Axes) -> str:
    """As a suite makes it."""
    policy = f"{point.policy}@{point.budget}" if point.budget else point.policy
    batch = f"b{point.batch}" if point.batch is not None else None
    words = [point.task, point.model, point.dtype, point.device, policy, point.shape, batch, f"s{point.seed}"]
    return "/".join(word for word in words if word)


def record(point: Axes, status: str = "ok", **more: Any) -> CellRecord:
    """A cell of that status."""
    return CellRecord(
        cell_id(point), f"{zlib.crc32(cell_id(point).encode()):016x}", point, status, seconds=4.56, **more
    )


def rounds_of(point: Axes, draw: random.Random) -> Rounds:
    """Raw rounds of a timed cell: the full cache slows down as it grows."""
    _, gen = (int(part) for part in str(point.shape).split("+"))
    growth = 0.0 if point.budget else 0.004
    rounds = []
    for number in range(ROUNDS):
        pace = 0.03 * PACE.get(point.policy.split("(")[0], 0.8) ** (1.2 - float(point.budget or 1))
        steps = [round(pace * (1 + growth * i) * draw.uniform(0.97, 1.03), 6) for i in range(gen - 1)]
        decode = math.fsum(steps)
        marks = [[0.0, "prefill"], [0.9, "compress"], [0.95, "decode"], [0.95 + decode, "end"]]
        line = [[0.95 * i / 10, (700 + 20 * i) * MIB] for i in range(11)]
        line += [[0.95 + decode * i / 10, 800 * MIB] for i in range(11)]
        rounds.append(
            {"round": number, "order": number % 2, "ttft_s": 0.95, "e2e_s": 0.95 + decode, "decode_s": decode}
            | {"step_s": steps, "marks": marks, "timeline": line, "timeline_columns": ["rss_bytes"], "flags": []}
        )
    return rounds


def speed_cell(folder: Path, point: Axes, full: Rounds | None, draw: random.Random) -> tuple[CellRecord, Rounds]:
    """A timed cell, its samples written."""
    prompt, gen = (int(part) for part in str(point.shape).split("+"))
    batch, share = int(point.batch or 1), float(point.budget or 1)
    kv = int(batch * (prompt * share + (0 if point.budget else gen)) * 46080)
    rounds = rounds_of(point, draw)

    tpot = median([sorted(part["step_s"])[len(part["step_s"]) // 2] for part in rounds])
    assert tpot.value
    values = {
        "budget_effective": Value(share),
        "kv_bytes": Value(kv),
        "weights_bytes": Value(WEIGHTS),
        "step_bytes": Value(WEIGHTS + kv),
        "rss_peak_bytes": highest([900 * MIB, 900 * MIB + kv]),
        "ttft_s": median([part["ttft_s"] for part in rounds]),
        "tpot_s": tpot,
        "tpot_p95_s": Value(None, note="too few steps"),
        "decode_tok_s": median([batch * (gen - 1) / part["decode_s"] for part in rounds]),
        "e2e_tok_s": median([batch * gen / part["e2e_s"] for part in rounds]),
        "mbu": Value((WEIGHTS + kv) / tpot.value / 40e9, n=ROUNDS),
    }
    if full is not None:
        values |= against_full({"rounds": rounds}, {"rounds": full})
        values["speedup_bound"] = Value((WEIGHTS + batch * (prompt + gen) * 46080) / (WEIGHTS + kv))
    slope = 0.3 if point.policy.startswith("d2o") else 0.0
    kept = [prompt * share * (1 + slope * (layer - 2.5) / 5) for layer in range(LAYERS)]
    details: dict[str, Any] = {"kept_layers": kept, "rounds": ROUNDS, "processes": 2}
    details["decode_path"] = "compiled CPU loops"
    if point.budget:
        evicted = [round(9 * batch * (prompt + gen - tokens)) for tokens in kept]
        merged = [count * (layer + 1) // 10 if slope else 0 for layer, count in enumerate(evicted)]
        details |= {"merged_layers": merged, "evicted_layers": evicted}
    cell = record(
        point,
        values=values,
        details=details,
        samples=f"samples/{cell_name(point)}.json",
    )
    write_atomic(folder / str(cell.samples), dump({"rounds": rounds}))
    return cell, rounds


def quality_cell(folder: Path, point: Axes, draw: random.Random) -> CellRecord:
    """A quality cell, its items written."""
    lost = LOSS.get(point.policy.split("(")[0], 0.2) * (1.4 - float(point.budget or 0.4))
    items: list[dict[str, Any]] = []
    for number in range(ITEMS):
        item: dict[str, Any] = {"id": f"i{number}", "document": f"d{number // 2}"}
        if point.task == "fidelity":
            item |= {"kl": [lost * draw.uniform(0.5, 1.5) for _ in range(4)], "top1": [int(draw.random() > lost)] * 4}
            item["nll"] = [2.2 + lost * draw.uniform(0, 1) for _ in range(4)]
        else:
            item |= {"score": float(draw.random() > 2 * lost), "gold_bpb": 1 + lost * draw.uniform(0.5, 1.5)}
            item |= {"context": 256 * (1 + number % 3), "depth": (0.1, 0.5, 0.9, 0.3)[number // 3]}
        items.append(item)
    details = {}
    if "needle" in point.task:
        details["grid"] = [{key: item[key] for key in ("context", "depth", "score")} | {"n": 1} for item in items]
    cell = record(point, values=values_of(items), details=details, samples=f"samples/{cell_name(point)}.json")
    write_atomic(folder / str(cell.samples), dump({"items": items}))
    return cell


def cell_name(point: Axes) -> str:
    """The name of its samples."""
    return f"{zlib.crc32(cell_id(point).encode()):08x}"


def info(name: str, cells: list[str], **more: Any) -> RunInfo:
    """A ``run.json``."""
    environment = {"cpu": "Example CPU", "cores": 2, "memory_bytes": 24 * 2**30, "torch": "2.13.0", "driver": None}
    suite = {
        "schema": 1,
        "name": name,
        "about": "Made-up records.",
        "axes": {"policy": ["full", "d2o"], "budget": [0.2]},
    }
    base: dict[str, Any] = {
        "suite": suite,
        "suite_digest": "abcdefab" * 8,
        "environment": environment,
        "version": "0.1.0",
    }
    base |= {"environment_hash": "e" * 16, "command": ("d2obench", "run", name), "started": "2026-01-02T03:04:05+00:00"}
    return RunInfo(name=name, cells=tuple(cells), **(base | more))


def write_run(folder: Path, name: str, cells: list[CellRecord], missing: tuple[str, ...] = (), **more: Any) -> Path:
    """A run folder of these cells; ``missing`` ids are planned and have no record."""
    write_atomic(folder / "run.json", dump(info(name, [*(cell.id for cell in cells), *missing], **more)))
    for cell in cells:
        append_cell(folder, cell)
    return folder


def usual(
    folder: Path,
    name: str = "quick",
    shapes: tuple[str, ...] = ("512+24", "1024+24"),
    batches: tuple[int, ...] = (4,),
    tasks: tuple[str, ...] = ("fidelity", "recall", "needle"),
    **more: Any,
) -> Path:
    """A finished run: four policies, two budgets; speed, fidelity by shape, recall and needle without one."""
    draw = random.Random(7)
    cells: list[CellRecord] = []
    for shape, batch in ((shape, batch) for shape in shapes for batch in batches):
        full: Rounds | None = None
        for policy, budget in POLICIES:
            cell, rounds = speed_cell(folder, axes("speed", policy, budget, shape=shape, batch=batch), full, draw)
            full = full or rounds
            cells.append(cell)
    for task in tasks:
        for shape in shapes if task == "fidelity" else (None,):
            cells += [quality_cell(folder, axes(task, *policy, shape=shape), draw) for policy in POLICIES]
    return write_run(folder, name, cells, **more)
