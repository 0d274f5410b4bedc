"""Real faults in the real engine, on the cells of the suite ``ci``, each caught by the figure meant for it, by name."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from d2obench.cache.compress import Packing
from d2obench.cache.policy_cache import PolicyCache
from d2obench.cache.session import Session
from d2obench.gate.compare import Facts, facts_of, judge_facts
from d2obench.gate.verdict import Row, Verdict
from d2obench.measure.samples import RequestTrace
from d2obench.measure.summarise import Machine, summarise
from d2obench.policies import merging
from d2obench.policies.h2o import HeavyHitters
from d2obench.record import Value
from d2obench.run.plan import cells
from d2obench.run.worker import Worker
from d2obench.study import faults
from d2obench.study.faults import FAULTS, command
from d2obench.suite.definition import Quality, load_suite

SPEED, FIDELITY = (cell.axes for cell in cells(load_suite("ci")) if cell.axes.policy == "d2o")


@pytest.fixture(autouse=True)
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a fault changes is put back."""
    for place, name in [(Session, "step"), (PolicyCache, "_budgets"), (Packing, "add"),
                        (merging, "merge_into"), (HeavyHitters, "score")]:  # fmt: skip
        monkeypatch.setattr(place, name, getattr(place, name))


def report(*_: Any) -> None:
    """Nobody listens."""


def speed_facts(worker: Worker) -> Facts:
    request = {"axes": msgspec.to_builtins(SPEED), "batch": 2, "sampled": None}
    counts = worker.count(request, report)
    rounds = [worker.measure(request, report)["trace"] for _ in range(2)]
    traces = msgspec.convert(rounds, list[RequestTrace])
    values = summarise(traces, Machine(1)).values | {key: Value(count) for key, count in counts.items()}
    return facts_of("cell", "ok", values, {"rounds": rounds})


def fidelity_facts(worker: Worker) -> Facts:
    request = {"cell": {"axes": msgspec.to_builtins(FIDELITY)}, "quality": msgspec.to_builtins(Quality())}
    found = worker.evaluate(request, report)
    return facts_of("cell", "ok", msgspec.convert(found["values"], dict[str, Value]), {"items": found["items"]})


def regressed(base: Facts, head: Facts, tolerance: dict[str, float] | None = None) -> dict[str, Row]:
    rows = [row for row in judge_facts("cell", base, head, tolerance) if row.kind != "bounded"]
    return {row.metric: row for row in rows if row.verdict is Verdict.REGRESSED}


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker()


@pytest.fixture(scope="module")
def base(worker: Worker) -> Facts:
    return speed_facts(worker)


def test_the_same_code_has_the_same_facts(worker, base):
    rows = judge_facts("cell", base, speed_facts(worker))
    assert {row.verdict for row in rows if row.kind == "exact"} == {Verdict.OK}
    assert {"kept_layers", "tokens_digest", "kv_bytes", "ops_step", "cats_step", "flops_step", "live_bytes"} <= {
        row.metric for row in rows
    }


@pytest.mark.parametrize(
    ("fault", "amount", "metric"),
    [
        ("extra-slot", 1, "kept_layers"),
        ("extra-cat", 1, "cats_step"),
        ("kept-reference", 1, "live_bytes"),
        ("merge-weight", 50, "tokens_digest"),
        ("zero-scores", 1, "tokens_digest"),
    ],
)
def test_a_fault_is_caught_by_the_figure_meant_for_it(worker, base, fault, amount, metric):
    FAULTS[fault](amount)
    assert metric in regressed(base, speed_facts(worker))


def test_a_kept_reference_is_caught_by_nothing_else(worker, base):
    """The cache itself is as small as it should be: only what is alive tells."""
    FAULTS["kept-reference"](1)
    found = regressed(base, speed_facts(worker))
    assert set(found) == {"live_bytes"}
    full = 2 * 4 * 2 * 128 * 16 * 4 * 2  # keys and values, layers, KV heads, prompt, head_dim, bytes, batch
    assert found["live_bytes"].head - found["live_bytes"].base == full


def test_a_slower_step_is_busy_for_the_asked_share(monkeypatch):
    """On a clock that moves by one at each look: the step takes 1, and 5 more are waited for."""
    looks = itertools.count(1)
    monkeypatch.setattr(faults, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    monkeypatch.setattr(Session, "step", lambda self, tokens: tokens)
    FAULTS["slow"](5.0)
    assert Session.step(None, "tokens") == "tokens"
    assert next(looks) == 8


@pytest.mark.model
def test_a_wrong_merge_is_caught_by_fidelity(worker):
    """Item by item on the real model, with the tolerance of the suite ``ci``."""
    calm = fidelity_facts(worker)
    FAULTS["merge-weight"](50)
    assert "kl" in regressed(calm, fidelity_facts(worker), load_suite("ci").gate.tolerance)


def test_every_fault_can_be_asked_of_a_worker_process():
    from d2obench.run.worker_client import WorkerClient

    with WorkerClient(command=command("extra-cat", 1)) as client:
        assert client.call("hello")["torch"]
