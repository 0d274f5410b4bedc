"""Interleaved groups: order, warm-up, when they stop, pairing, and what ends a cell."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from fake_worker import DIMENSIONS
from runs import Silent, cell, checked, run

from d2obench.models import Dimensions
from d2obench.record import read_samples
from d2obench.run.plan import Plan
from d2obench.suite.definition import Timing
from d2obench.tasks.base import Cell


def log(path: Path) -> list[tuple[str, str, str]]:
    """(operation, policy, round) of every request the worker saw."""
    return [tuple(line.split(" ")) for line in path.read_text().splitlines()]  # type: ignore[misc]


def test_rounds_are_abba_and_every_cell_is_warmed_up_first(tmp_path: Path) -> None:
    cells = [cell(policy) for policy in ("full", "h2o", "d2o")]
    found = run(tmp_path / "run", checked(cells, Timing(rounds=4, max_rounds=4, warmup=2)), log=str(tmp_path / "log"))
    seen = log(tmp_path / "log")
    timed = [(policy, number) for op, policy, number in seen if op == "measure"]
    forwards, backwards = ["full", "h2o", "d2o"], ["d2o", "h2o", "full"]
    assert timed == [(policy, str(n)) for n, order in enumerate((forwards, backwards) * 2) for policy in order]
    for policy in forwards:
        first = next(i for i, one in enumerate(seen) if one[1] == policy and one[0] == "measure")
        assert [one[0] for one in seen[:first] if one[1] == policy] == ["count", "warm_up"]
    rounds = read_samples(tmp_path / "run", found.cells[1])["rounds"]
    assert [(one["round"], one["order"]) for one in rounds] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert [read_samples(tmp_path / "run", found.cells[0])["rounds"][n]["order"] for n in range(4)] == [0, 2, 0, 2]


@pytest.mark.parametrize(("cold", "warmed"), [(1, 1), (3, 3), (99, 4)])
def test_a_shape_is_warmed_up_until_it_is_stable_at_most_as_often_as_asked(
    tmp_path: Path, cold: int, warmed: int
) -> None:
    found = run(tmp_path, checked([cell("full")], Timing(rounds=1, max_rounds=1, warmup=4)), cold=cold)
    told = found.cells[0].details["warm_up"]
    assert [one["stable"] for one in told] == [False] * (warmed - 1) + [cold == warmed]
    assert all(one["decode_s"] for one in told)


def test_groups_differ_in_shape_batch_and_seed_only(tmp_path: Path) -> None:
    cells = [
        cell(policy, shape=shape, batch=batch)
        for shape in ("8+4", "16+4")
        for batch in (1, 2)
        for policy in ("full", "d2o")
    ]
    run(tmp_path / "run", checked(cells, Timing(rounds=1, max_rounds=1, warmup=0)), log=str(tmp_path / "log"))
    timed = [policy for op, policy, *_ in log(tmp_path / "log") if op == "measure"]
    assert timed == ["full", "d2o"] * 4


def test_rounds_stop_when_every_interval_is_narrow(tmp_path: Path) -> None:
    found = run(tmp_path, checked([cell("full")], Timing(rounds=6, max_rounds=12, interval=0.5)))
    assert found.cells[0].details["stopped"] == "interval"
    assert found.cells[0].details["rounds"] == 6


def test_rounds_go_on_while_an_interval_is_wide(tmp_path: Path) -> None:
    found = run(tmp_path, checked([cell("full")], Timing(rounds=2, max_rounds=7, interval=1e-9)))
    assert found.cells[0].details["stopped"] == "max_rounds"
    assert found.cells[0].details["rounds"] == 7


def test_time_ends_the_rounds(tmp_path: Path) -> None:
    found = run(tmp_path, checked([cell("full")], Timing(rounds=50, max_rounds=50, max_seconds=0.1)), delay=0.06)
    assert found.cells[0].details["stopped"] == "max_seconds"
    assert found.cells[0].details["rounds"] == 2


def test_disturbed_rounds_are_kept_flagged_and_repeated(tmp_path: Path) -> None:
    timing = Timing(rounds=2, max_rounds=5, interval=0.9)
    found = run(tmp_path, checked([cell("full")], timing), flags=["other load 40 %"])
    assert found.cells[0].details == found.cells[0].details | {"stopped": "max_rounds", "rounds": 5}
    assert "5 of 5 rounds: other load" in found.cells[0].flags


def test_a_disturbed_round_is_measured_once_more_and_stays(tmp_path: Path) -> None:
    """Two rounds are disturbed, so two more than asked are measured; all of them are in the figures."""
    timing = Timing(rounds=3, max_rounds=12, interval=0.9)
    found = run(tmp_path, checked([cell("full")], timing), flags=["GPU power cap 40 % of the time"], calm=2)
    assert (found.cells[0].details["stopped"], found.cells[0].details["rounds"]) == ("interval", 5)
    assert found.cells[0].flags == ("2 of 5 rounds: GPU power cap",)
    assert found.cells[0].values["ttft_s"].n == 5
    kept = read_samples(tmp_path, found.cells[0])["rounds"]
    assert [bool(one["flags"]) for one in kept] == [True, True, False, False, False]


def test_energy_is_net_of_the_idle_power_measured_in_the_run(tmp_path: Path) -> None:
    """200 W less 50 W over a whole request of 2 × 300 tokens."""
    long = checked([cell("full", shape="8+300")], Timing(rounds=1, max_rounds=1))
    found = run(tmp_path / "gpu", long, power=200.0, idle_w=50.0).cells[0]
    (one,) = read_samples(tmp_path / "gpu", found)["rounds"]
    assert found.values["energy_j_tok"].value == pytest.approx(150 * one["e2e_s"] / 600)
    assert found.details["device"] == {"copy_bytes_per_s": 1e9, "idle_w": 50.0}
    silent = run(tmp_path / "silent", long, power=200.0).cells[0]  # no driver that tells the idle power
    assert silent.values["energy_j_tok"].value is None
    assert "energy_j_tok" not in run(tmp_path / "cpu", long).cells[0].values


def test_ratios_pair_rounds(tmp_path: Path) -> None:
    """The speed-up is the median of the ratios of equal rounds, worked out here from the samples."""
    found = run(tmp_path, checked([cell("full"), cell("d2o", "0.2")], Timing(rounds=5, max_rounds=5)))
    full, d2o = (sorted(read_samples(tmp_path, one)["rounds"], key=lambda r: r["round"]) for one in found.cells)
    ratios = sorted(a["decode_s"] / b["decode_s"] for a, b in zip(full, d2o, strict=True))
    value = found.cells[1].values["speedup"]
    assert math.isclose(value.value or 0, ratios[2], rel_tol=1e-9)
    assert value.lo is not None and value.lo <= ratios[2] <= (value.hi or 0)
    assert value.n == 5
    assert found.cells[1].values["prefill_cost"].value == 1.0
    assert found.cells[1].values["speedup_bound"].value == 1.0  # the scripted worker holds the same for all
    assert (found.cells[1].values["speedup_largest"].value or 0) > 0
    assert "speedup" not in found.cells[0].values


def test_out_of_memory_is_a_row_and_larger_cells_are_skipped(tmp_path: Path) -> None:
    cells = [cell(policy, shape=shape) for shape in ("8+4", "16+4", "16+8") for policy in ("full", "d2o")]
    found = run(tmp_path / "run", checked(cells), oom=["full"], log=str(tmp_path / "log"))
    status = [(one.axes.policy, one.axes.shape, one.status) for one in found.cells]
    assert status == [
        ("full", "8+4", "oom"), ("d2o", "8+4", "ok"),
        ("full", "16+4", "skipped"), ("d2o", "16+4", "ok"),
        ("full", "16+8", "skipped"), ("d2o", "16+8", "ok"),
    ]  # fmt: skip
    assert found.cells[0].reason == "out of memory in prefill: simulated"
    assert "full/None/8+4/2" in found.cells[2].reason
    assert sum(policy == "full" for _, policy, *_ in log(tmp_path / "log")) == 1  # never asked again
    assert "speedup" not in found.cells[1].values  # nothing to compare with


def test_a_smaller_cell_is_not_skipped(tmp_path: Path) -> None:
    cells = [cell("full", shape="16+8"), cell("full", shape="8+8"), cell("full", shape="8+16")]
    found = run(tmp_path, checked(cells), oom=["full"])
    assert [one.status for one in found.cells] == ["oom", "oom", "skipped"]


def test_a_crash_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    found = run(tmp_path, checked([cell("full"), cell("h2o"), cell("d2o")]), crash=["h2o"])
    assert [one.status for one in found.cells] == ["ok", "failed", "ok"]
    assert "SIGSEGV" in found.cells[1].reason


def test_a_killed_worker_is_forgiven_once_and_the_new_one_is_warmed_up(tmp_path: Path) -> None:
    work = checked([cell("full"), cell("h2o")], Timing(rounds=3, max_rounds=3))
    found = run(tmp_path / "run", work, die=str(tmp_path / "died"), log=str(tmp_path / "log"))
    assert (tmp_path / "died").exists()
    assert [one.status for one in found.cells] == ["ok", "ok"]
    seen = [" ".join(one) for one in log(tmp_path / "log")]
    second = seen.index("measure h2o 1")  # backwards: h2o first, where the worker dies
    assert seen[second + 1 :] == [
        "warm_up h2o 1", "measure h2o 1",
        "warm_up full 1", "measure full 1",
        "measure full 2", "measure h2o 2",
    ]  # fmt: skip


def test_a_hang_is_a_row(tmp_path: Path) -> None:
    for patience in (2.0, 10.0, 60.0, 300.0):  # on a busy machine the other cell may be slower than the first
        found = run(tmp_path / f"{patience:g}", checked([cell("full"), cell("h2o")]), timeout_s=patience, hang=["full"])
        if found.cells[1].status == "ok":
            break
    assert [one.status for one in found.cells] == ["failed", "ok"]
    assert "gave no sign" in found.cells[0].reason


def test_a_quality_cell_fails_alone(tmp_path: Path) -> None:
    cells = [cell("full", task="recall"), cell("d2o", "0.2", task="recall")]
    found = run(tmp_path, checked(cells), crash=["full"])
    assert [one.status for one in found.cells] == ["failed", "ok"]
    assert read_samples(tmp_path, found.cells[1])["items"][0]["id"] == "a"


@pytest.mark.parametrize("mode", ["shared", "fresh"])
def test_a_fresh_worker_for_every_group(tmp_path: Path, mode: str) -> None:
    watcher = Silent()
    cells = [cell("full"), cell("full", shape="8+4"), cell("full", task="recall")]
    found = run(tmp_path, checked(cells, mode=mode), watcher=watcher)
    assert [one.status for one in found.cells] == ["ok"] * 3


def side_by_side(cells: list[Cell], timing: Timing | None = None) -> Plan:
    """Fresh workers, and a model so small that any number of them fits."""
    work = checked(cells, timing or Timing(rounds=3, max_rounds=3), mode="fresh")
    return dataclasses.replace(work, models={"fake": Dimensions(**DIMENSIONS)})


def test_fresh_gives_every_timed_cell_a_process_of_its_own(tmp_path: Path) -> None:
    """Interleaved as in one process; each is warmed up once and stays until the group is done."""
    cells = [cell("full"), cell("h2o"), cell("d2o")]
    fake = {"log": str(tmp_path / "log"), "visible": str(tmp_path / "pids"), "memory": 2**34}
    found = run(tmp_path / "run", side_by_side(cells), **fake)
    assert [one.status for one in found.cells] == ["ok"] * 3
    seen = log(tmp_path / "log")
    pids = [line.split()[0] for line in (tmp_path / "pids").read_text().splitlines()]
    of_policy = {(policy, pid) for (_, policy, _), pid in zip(seen, pids, strict=True)}
    assert len(of_policy) == len({pid for _, pid in of_policy}) == 3
    timed = [policy for op, policy, _ in seen if op == "measure"]
    assert timed == ["full", "h2o", "d2o", "d2o", "h2o", "full", "full", "h2o", "d2o"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    shared = run(tmp_path / "shared", checked(cells))
    assert [one.values for one in found.cells] == [one.values for one in shared.cells]


def test_a_crash_in_a_fresh_worker_leaves_the_others_warm(tmp_path: Path) -> None:
    cells = [cell("full"), cell("h2o"), cell("d2o")]
    fake = {"log": str(tmp_path / "log"), "crash": ["h2o"], "memory": 2**34}
    found = run(tmp_path / "run", side_by_side(cells), **fake)
    assert [one.status for one in found.cells] == ["ok", "failed", "ok"]
    warmed = [policy for op, policy, _ in log(tmp_path / "log") if op == "warm_up"]
    assert [warmed.count(policy) for policy in ("full", "d2o")] == [1, 1]


@pytest.mark.parametrize(("memory", "batch"), [(2**30, 2), (2**34, "max")])
def test_fresh_workers_that_may_not_fit_are_shared_by_the_group(tmp_path: Path, memory: int, batch: object) -> None:
    watcher = Silent()
    work = side_by_side([cell("full", batch=batch), cell("h2o", batch=batch)], Timing(rounds=1, max_rounds=1))
    found = run(tmp_path / "run", work, watcher=watcher, memory=memory, fits=3, visible=str(tmp_path / "pids"))
    assert [one.status for one in found.cells] == ["ok", "ok"]
    assert len({line.split()[0] for line in (tmp_path / "pids").read_text().splitlines()}) == 1
    assert [note for note in watcher.notes if "side by side" in note] or batch == "max"


def test_cells_longer_than_the_context_are_skipped(tmp_path: Path) -> None:
    work = checked([cell("full"), cell("d2o")])
    work = dataclasses.replace(work, too_long={work.cells[1].id: "the shape is longer than the context"})
    found = run(tmp_path, work)
    assert [one.status for one in found.cells] == ["ok", "skipped"]
    assert "longer" in found.cells[1].reason


def test_the_largest_batch_is_found_and_equal_memory_is_its_own_column(tmp_path: Path) -> None:
    cells = [cell("full", batch="max"), cell("d2o", "0.2", batch="max")]
    found = run(tmp_path, checked(cells, Timing(rounds=2, max_rounds=2, memory_limit="1500KB")), fits=37)
    for one in found.cells:
        assert (one.status, one.values["batch_max"].value) == ("ok", 37.0)
    samples = read_samples(tmp_path, found.cells[0])
    assert [37, 1370] in samples["trials"]
    assert all(peak is None for batch, peak in samples["trials"] if batch > 37)
    assert "speedup_memory" in found.cells[1].values
    assert "speedup" not in found.cells[1].values


def test_a_limit_below_one_sequence_is_a_row(tmp_path: Path) -> None:
    found = run(tmp_path, checked([cell("full", batch="max")], Timing(memory_limit="1KB")))
    assert (found.cells[0].status, found.cells[0].reason) == ("oom", "not even one sequence fits under 0.00 GiB")


def test_both_ways_of_decoding_take_turns_and_are_compared(tmp_path: Path) -> None:
    cells, timing = [cell("full"), cell("d2o")], Timing(rounds=4, max_rounds=4, warmup=0, decode="both")
    found = run(tmp_path / "run", checked(cells, timing), bias=1.02, log=str(tmp_path / "log"))
    assert len([op for op, *_ in log(tmp_path / "log") if op == "measure"]) == 2 * 2 * 4
    for one in found.cells:
        error = one.values["sampled_error"]
        assert error.value == pytest.approx(1.02)
        assert error.n == 4
        rounds = read_samples(tmp_path / "run", one)["rounds"]
        assert all(part["sampled_s"] == pytest.approx(1.02 * part["decode_s"]) for part in rounds)
        assert not any(part.get("step_at") for part in rounds)
        assert "sampled decode" not in one.flags


def test_windows_that_cover_every_step_show_nothing(tmp_path: Path) -> None:
    timing = Timing(rounds=2, max_rounds=2, warmup=0, decode="both")
    assert "sampled_error" not in run(tmp_path, checked([cell("full")], timing)).cells[0].values


def test_beyond_the_context_is_flagged(tmp_path: Path) -> None:
    work = checked([cell("full", shape="4000+96"), cell("full", shape="4000+97")], Timing(rounds=1, max_rounds=1))
    inside, beyond = run(tmp_path, work).cells
    assert inside.flags == ()
    assert beyond.flags == ("beyond the model's context of 4,096: speed only",)
