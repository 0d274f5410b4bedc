"""Tails of a teacher-forced comparison: quantiles, maximum, agreement of five tokens, and RMS of Δp."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from test_tasks_loop import Bytes, cell, quiet

from d2obench.cache import Session
from d2obench.models import LoadedModel
from d2obench.suite.definition import Quality
from d2obench.tasks import evaluate
from d2obench.tasks.tails import drift, tails
from d2obench.texts.writer import token_ids


def documents(count: int, positions: int) -> list[dict[str, object]]:
    draw = random.Random(3)
    return [
        {
            "document": str(i),
            "kl": [draw.expovariate(1) for _ in range(positions)],
            "dp": [draw.uniform(-1, 1) for _ in range(positions)],
        }
        for i in range(count)
    ]


def quantile(values: list[float], q: float) -> float:
    """Between the two nearest ranks, linearly."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def test_quantiles_are_of_all_positions_and_ranges_of_documents() -> None:
    items = documents(4, 300)
    found = tails(items)
    columns = [item["kl"] for item in items]
    every = [kl for column in columns for kl in column]  # type: ignore[attr-defined]
    for key, q in (("kl_p99", 0.99), ("kl_p999", 0.999)):
        value = found[key]
        assert value.value == pytest.approx(quantile(every, q))
        assert value.kind == "range" and value.n == 4
        assert value.lo == pytest.approx(min(value.value, *(quantile(column, q) for column in columns)))  # type: ignore[arg-type, type-var]
    assert (found["kl_max"].value, found["kl_max"].lo) == (max(every), min(max(column) for column in columns))  # type: ignore[call-overload]
    squares = [dp * dp for item in items for dp in item["dp"]]  # type: ignore[attr-defined]
    assert found["dp_rms"].value == pytest.approx(math.sqrt(sum(squares) / len(squares)))


@pytest.mark.parametrize(
    ("positions", "known"), [(99, set()), (100, {"kl_p99"}), (999, {"kl_p99"}), (1000, {"kl_p99", "kl_p999"})]
)
def test_a_quantile_needs_a_position_above_it(positions: int, known: set[str]) -> None:
    assert tails(documents(1, positions)).keys() - {"kl_max", "dp_rms"} == known


def test_drift_averages_parts_of_the_generation() -> None:
    items = [{"kl": [float(i) for i in range(32)]}, {"kl": [0.0] * 32}]
    parts = drift(items)
    assert [part["position"] for part in parts] == list(range(2, 34, 2))
    assert [part["kl"] for part in parts] == [i + 0.25 for i in range(16)]
    assert parts[-1]["kl_max"] == 31
    assert [part["position"] for part in drift([{"kl": [1.0, 2.0, 3.0]}])] == [1, 2, 3]


def test_items_without_tails_have_none() -> None:
    assert tails([{"document": "0", "kl": [], "score": 1.0}, {"document": "1"}]) == {}


def test_top5_and_dp_of_a_smaller_cache_are_those_of_its_logits(tiny: LoadedModel) -> None:
    """Against transformers' own forward pass, and the same policy driven by hand."""
    model = dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=4096)
    found = evaluate(model, cell("fidelity(documents=1)", "streaming", "0.2", "96+12"), Quality(), quiet)
    ids = token_ids(0, 109, lambda text: [*text.encode()], "fidelity")
    with torch.no_grad():
        full = model.model(torch.tensor([ids]), use_cache=False).logits[0].softmax(-1)
    session = Session(model, "streaming", "0.2", max_new=12)
    session.prefill([ids[:96]])
    session.compress()
    shared, moved = [], []
    for at in range(96, 108):
        own = session.step(torch.tensor([ids[at]]))[0].softmax(-1)
        likely = [
            sorted(range(len(row)), key=lambda token: -row[token])[:5] for row in (own.tolist(), full[at].tolist())
        ]
        shared.append(len(set(likely[0]) & set(likely[1])) / 5)
        moved.append(float(own[ids[at + 1]] - full[at, ids[at + 1]]))
    assert found.items[0]["top5"] == pytest.approx(shared)
    assert found.items[0]["dp"] == pytest.approx(moved, abs=1e-5)
    assert found.values["top5"].value == pytest.approx(sum(shared) / 12)
    assert found.values["dp_rms"].value == pytest.approx(math.sqrt(sum(dp * dp for dp in moved) / 12), abs=1e-5)
    assert found.values["kl_max"].value == max(found.items[0]["kl"])
    assert found.details["drift"][-1]["position"] == 12
