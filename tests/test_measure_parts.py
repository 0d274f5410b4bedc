"""What each part costs: own times of nested ranges, a whole request, the task and its tables."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from d2obench.cache import Session
from d2obench.decode.cpu import backend as host
from d2obench.errors import UsageError
from d2obench.measure.clock import HostClock, clock_for
from d2obench.measure.parts import PartTimer, cost_of_parts, parts_named
from d2obench.models import LoadedModel
from d2obench.ranges import active, ranges_as, span
from d2obench.record import Axes, Value
from d2obench.run.plan import cells
from d2obench.suite.definition import Quality, load_suite
from d2obench.tasks import evaluate, parse_task, read_cell
from d2obench.tasks.base import Cell

PROMPTS = [[5, 9, 2, 7] * 8, [4, 6] * 16]


def test_own_time_is_less_what_lies_inside() -> None:
    ticks = itertools.chain([0.0, 1.0, 3.0, 7.0, 15.0, 31.0], itertools.repeat(99.0))
    book = PartTimer(HostClock(lambda: next(ticks)))
    with ranges_as(book.range), span("outer"), span("inner"), span("outer"):  # 0 … 31, 1 … 15, 3 … 7
        pass
    assert book.own_times() == {"outer": 1.0 + 4.0 + 16.0, "inner": 2.0 + 8.0}
    assert book.own_times() == {}


def test_ranges_are_there_inside_the_block_only(tiny: LoadedModel) -> None:
    seen: list[str] = []

    class Range:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            seen.append(self.name)

        def __exit__(self, *_: object) -> None:
            seen.append(f"/{self.name}")

    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        with ranges_as(Range), parts_named(tiny.model, "all"):
            assert active()
            tiny.model(ids)
        inside = len(seen)
        tiny.model(ids)
    assert not active()
    assert len(seen) == inside
    assert (seen[0], seen[-1]) == ("all", "/all")
    assert seen.count("MLP") == seen.count("/MLP") == tiny.layers
    assert seen.count("projections") == tiny.layers


@pytest.mark.parametrize(
    ("policy", "budget", "expected"),
    [
        ("full", None, {"attention"}),
        ("h2o", "0.5", {"attention", "scores", "eviction"}),
        ("d2o", "0.5", {"attention", "scores", "eviction", "similarity"}),
    ],
)
def test_a_request_by_parts(
    tiny: LoadedModel, policy: str, budget: str | None, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "offer", lambda state: "")  # one loop there is one part: attention

    def session(mark: Any) -> Session:
        return Session(tiny, policy, budget, max_new=20, mark=mark)

    found = cost_of_parts(session, tiny.model, PROMPTS, steps=4, blocks=4, clock=clock_for(tiny.device))
    model = {"projections", "MLP", "lm head", "rest of the model", "loop"}
    assert [bool(block.parts) for block in found.decode] == [True, False, True, False]
    for block in found.decode[::2]:
        assert expected | model <= block.parts.keys()
        assert sum(block.parts.values()) == pytest.approx(block.whole)
        assert all(seconds >= 0 for seconds in block.parts.values())
    assert all(block.whole > 0 for block in found.decode)
    assert expected <= found.prompt.parts.keys() | {"eviction", "similarity"}
    assert ("allocation" in found.prompt.parts) == (policy == "d2o")


def kernels_cell(policy: str, budget: str | None, shape: str = "64+40", task: str = "kernels(requests=2)") -> Cell:
    return read_cell({"axes": Axes(task, "shape:tiny", "float32", "cpu", policy, budget, shape, None, 0)})


def silent(done: int, total: int) -> None:
    """No progress."""


def test_the_task_gives_shares_that_add_up(tiny: LoadedModel) -> None:
    found = evaluate(tiny, kernels_cell("d2o", "0.5"), Quality(batch=2), silent)
    for item in found.items:
        for block in [item["prefill"], *item["marked"]]:
            assert sum(block["parts"].values()) == pytest.approx(block["seconds"])
        assert len(item["marked"]) == len(item["bare"]) == 2
    shares = {key: value for key, value in found.values.items() if key.startswith("step_share:")}
    assert {"step_share:attention", "step_share:loop", "step_share:MLP"} <= shares.keys()
    assert all(0 <= (value.value or 0) <= 1 for value in shares.values())
    assert found.values["loop_overhead"] == shares["step_share:loop"]
    assert (found.values["ranges_overhead"].n, found.values["tpot_s"].n) == (4, 2)  # blocks, documents


def test_shares_are_made_again_from_the_items() -> None:
    blocks = [{"seconds": 2.0, "steps": 4, "parts": {"attention": 1.5, "loop": 0.5}}] * 2
    bare = [{"seconds": 1.6, "steps": 4, "parts": {}}] * 2
    item = {"id": "a", "document": "a", "prefill": {**blocks[0], "steps": 1}, "marked": blocks, "bare": bare}
    found = parse_task("kernels").rescore([item, item])
    assert found["step_share:attention"].value == 0.75
    assert found["prefill_share:loop"].value == 0.25
    assert found["tpot_s"].value == pytest.approx(0.4)
    assert found["ranges_overhead"].value == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (kernels_cell("hf-static", None), "can't measure the parts of hf-static"),
        (kernels_cell("full", None, "64+17"), "too short for kernels"),
    ],
)
def test_what_can_not_be_taken_apart_is_one_line(tiny: LoadedModel, cell: Cell, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate(tiny, cell, Quality(batch=2), silent)


def test_random_weights_will_do_for_what_is_only_timed() -> None:
    from d2obench.run.check import check_suite

    words = {"axes.model": "shape:tiny", "axes.shape": "64+40"}
    check_suite(load_suite("kernels", words))
    assert len(cells(load_suite("kernels"))) == 5


def test_a_run_has_its_tables(tmp_path: Path) -> None:
    import report_runs as made

    from d2obench.report import build, write_report

    def cell(policy: str, budget: str | None, attention: float) -> Any:
        shares = {"step_share:attention": Value(attention, attention - 0.1, attention + 0.1, 6)}
        shares |= {"step_share:loop": Value(1 - attention), "prefill_share:attention": Value(0.5)}
        figures = {"tpot_s": Value(0.01), "ttft_s": Value(0.5), "ranges_overhead": Value(0.01)}
        return made.record(made.axes("kernels", policy, budget, shape="64+40"), values={**shares, **figures})

    run = made.write_run(tmp_path, "kernels", [cell("full", None, 0.75), cell("h2o", "0.2", 0.25)])
    report = build([run])
    step, prefill = report.tables
    assert [column.key for column in step.columns][-2:] == ["step_share:attention", "step_share:loop"]
    assert [row[-2].text for row in step.rows] == ["75.0", "25.0"]
    assert prefill.columns[-1].key == "prefill_share:attention"
    assert report.headline == ()
    write_report(report, run, ("md", "csv", "html"))
    assert "Cost of the parts of a decode step" in (run / "report.md").read_text("utf-8")
    assert "step_share:attention,0.75,,0.65,0.85,6" in (run / "results.csv").read_text("utf-8")
