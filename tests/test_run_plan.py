"""Groups, what counts as larger, predictions, and the search for the largest batch."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import cell, checked

from d2obench.models import Dimensions
from d2obench.record import Axes
from d2obench.run.plan import abba, group, larger
from d2obench.run.predict import MOST, RESOLUTION, Device, largest_batch, memory_of, predict
from d2obench.suite.definition import Quality
from d2obench.tasks import REGISTRY, parse_task, read_cell
from d2obench.tasks.base import Cell, Work

LLAMA_3_8B = Dimensions("llama", 32, 32, 8, 128, 4096, 128_256, 8192, 8_030_261_248)
H200 = Device(4e12, 6e14)


def timed(policy: str = "full", budget: str | None = None, shape: str = "2048+8192", batch: int = 1) -> Cell:
    return read_cell({"axes": Axes("speed", "m", "bfloat16", "cuda", policy, budget, shape, batch, 0)})


def test_the_kv_of_a_sequence_is_what_the_dimensions_say() -> None:
    """Llama-3-8B in bfloat16: 128 KiB a token; 2048+8192 is 1.25 GiB with the full cache."""
    one, two = (memory_of(timed(batch=batch), LLAMA_3_8B, batch) for batch in (1, 2))
    assert two - one == 1.25 * 2**30
    assert memory_of(timed(), LLAMA_3_8B, 0) == 2 * LLAMA_3_8B.parameters


def test_a_compressed_cell_peaks_at_the_end_of_prefill() -> None:
    compressed = memory_of(timed("d2o", "0.2"), LLAMA_3_8B, 1) - memory_of(timed(), LLAMA_3_8B, 0)
    assert 2048 * 128 * 1024 < compressed < 1.25 * 2**30


def test_time_grows_with_the_work_and_a_small_cache_is_not_slower() -> None:
    suite = checked().suite

    def seconds(**change: str) -> float:
        return predict(timed(**change), suite, LLAMA_3_8B, H200).seconds or 0.0

    assert seconds(shape="2048+8192") > seconds(shape="2048+4096") > seconds(shape="1024+4096") > 0
    assert seconds(policy="d2o", budget="0.2") < seconds()


def test_what_can_not_be_told_is_not_told() -> None:
    suite = checked().suite
    assert predict(cell("full", batch="max"), suite, LLAMA_3_8B, H200) == (None, None)


def quality(task: str, shape: str | None = None, **settings: int) -> float:
    suite = msgspec.structs.replace(checked().suite, quality=Quality(**settings))
    one = read_cell({"axes": Axes(task, "m", "bfloat16", "cuda", "d2o", "0.2", shape, None, 0)})
    return predict(one, suite, LLAMA_3_8B, H200).seconds or 0.0


def test_a_quality_cell_s_time_grows_with_its_items_and_its_text() -> None:
    eight, four = (quality(f"fidelity(documents={n})", "512+64", batch=4) for n in (8, 4))
    assert eight == pytest.approx(2 * four)
    assert quality("fidelity(documents=8)", "512+64", limit=2) < quality("fidelity(documents=8)", "512+64")
    assert quality("recall(items=4)", "4096+8") > quality("recall(items=4)", "512+8") > 0
    assert quality("gsm8k") == pytest.approx(1319 / 8 * quality("gsm8k", limit=8))
    assert quality("coqa(turns=all)", limit=8) == pytest.approx(16 * quality("coqa", limit=8))
    assert all(quality(task, "512+64" if parse_task(task).shaped else None) > 0 for task in REGISTRY.names())


def test_needles_that_do_not_fit_are_no_work() -> None:
    def found(context: int) -> Work | None:
        return parse_task("needle(contexts=[1024,4096],depths=[0.5])").work(Quality(), None, context)

    assert found(8192) == Work(2, 2560, 32)
    assert found(2048) == Work(1, 1024, 32)
    assert found(512) is None


def test_groups_hold_policies_and_budgets_and_quality_cells_stand_alone() -> None:
    cells = [
        cell(policy, budget, shape) for shape in ("8+4", "16+4") for policy, budget in (("full", None), ("d2o", "0.2"))
    ]
    cells += [cell("full", task="recall"), cell("d2o", "0.2", task="recall")]
    assert [[one.axes.policy for one in part] for part in group(cells)] == [["full", "d2o"]] * 2 + [["full"], ["d2o"]]
    assert [one for part in group(cells) for one in part] == cells


def test_abba_gives_every_cell_the_same_mean_place() -> None:
    cells = [cell(policy) for policy in ("full", "h2o", "d2o", "tova")]
    places = {one.id: sum(abba(cells, number).index(one) for number in range(6)) for one in cells}
    assert len(set(places.values())) == 1


@pytest.mark.parametrize(
    ("shape", "batch", "budget", "policy", "expected"),
    [
        ("64+8", 2, "0.2", "d2o", True),
        ("128+8", 2, "0.2", "d2o", True),
        ("64+8", 4, "0.2", "d2o", True),
        ("32+8", 4, "0.2", "d2o", False),
        ("64+4", 2, "0.2", "d2o", False),
        ("128+8", 2, "0.4", "d2o", False),
        ("128+8", 2, "0.2", "h2o", False),
        ("128+8", "max", "0.2", "d2o", False),
    ],
)
def test_larger(shape: str, batch: int, budget: str, policy: str, expected: bool) -> None:
    small = cell("d2o", "0.2", "64+8", 2)
    assert larger(cell(policy, budget, shape, batch), small) is expected


@given(st.integers(0, MOST), st.integers(-5, 2 * MOST))
def test_the_largest_batch_is_found_wherever_the_search_starts(true: int, predicted: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= true

    found = largest_batch(fits, predicted)
    assert found <= true
    assert true - found <= max(1, found // RESOLUTION) - (found < RESOLUTION)
    assert len(tried) == len(set(tried)) <= 24
    assert not tried or max(tried) <= MOST


def test_a_good_prediction_saves_trials() -> None:
    tried: list[int] = []
    largest_batch(lambda batch: tried.append(batch) or batch <= 100, 100)  # type: ignore[func-returns-value]
    assert len(tried) <= 6
