"""Interleaved groups: order, warm-up, when they stop, pairing, and what ends a cell."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_worker import DIMENSIONS
from runs import Silent, cell, checked, run

from d2obench.models import Dimensions
from d2obench.record import read_samples
from d2obench.run.plan import Plan
from d2obench.run.speed_windows import BUSY
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
    seconds = [one["seconds"] for one in read_samples(tmp_path, found.cells[0])["rounds"]]
    assert sum(seconds[:-1]) < 0.1 <= sum(seconds)


def test_disturbed_rounds_are_kept_flagged_and_repeated(tmp_path: Path) -> None:
    timing = Timing(rounds=2, max_rounds=5, interval=0.9)
    found = run(tmp_path, checked([cell("full")], timing), flags=["other load 40 %"])
    assert found.cells[0].details == found.cells[0].details | {"stopped": "max_rounds", "rounds": 5}
    assert "5 of 5 rounds disturbed: other load" in found.cells[0].flags
    assert "busy machine: no verdict on speed" in found.cells[0].flags
    assert (found.cells[0].details["disturbed"], found.cells[0].details["busy"]) == (1.0, True)
    assert found.cells[0].values["ttft_s"].n == 5  # shown all the same


def test_a_disturbed_round_is_measured_once_more_and_left_out(tmp_path: Path) -> None:
    """Two rounds are disturbed, so two more than asked are measured; the figures are made of the other three."""
    timing = Timing(rounds=3, max_rounds=12, interval=0.9)
    found = run(tmp_path, checked([cell("full")], timing), flags=["GPU power cap 40 % of the time"], calm=2)
    assert (found.cells[0].details["stopped"], found.cells[0].details["rounds"]) == ("interval", 5)
    assert found.cells[0].flags == ("2 of 5 rounds left out: GPU power cap",)
    assert found.cells[0].values["ttft_s"].n == 3
    assert (found.cells[0].details["disturbed"], found.cells[0].details["busy"]) == (0.4, False)
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
    work = checked([cell("full"), cell("h2o")], Timing(rounds=3, max_rounds=3, processes=1))
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
    assert read_samples(tmp_path, found.cells[1])["items"][0]["id"] == "0"


@pytest.mark.parametrize("mode", ["shared", "fresh"])
def test_a_fresh_worker_for_every_group(tmp_path: Path, mode: str) -> None:
    watcher = Silent()
    cells = [cell("full"), cell("full", shape="8+4"), cell("full", task="recall")]
    found = run(tmp_path, checked(cells, mode=mode), watcher=watcher)
    assert [one.status for one in found.cells] == ["ok"] * 3


def side_by_side(cells: list[Cell], timing: Timing | None = None) -> Plan:
    """Fresh workers, and a model so small that any number of them fits."""
    work = checked(cells, timing or Timing(rounds=3, max_rounds=3, processes=1), mode="fresh")
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


# Decode in turn: windows of caches that live side by side


def in_turn(cells: list[Cell], timing: Timing | None = None, **worker: Any) -> Plan:
    """A suite whose model is so small that any number of caches fits."""
    timing = timing or Timing(rounds=2, max_rounds=4, windows=16, window_s=0.02, depths=2)
    return dataclasses.replace(checked(cells, timing, **worker), models={"fake": Dimensions(**DIMENSIONS)})


def test_caches_are_held_decode_in_turn_and_then_make_their_requests_in_two_processes(tmp_path: Path) -> None:
    cells = [cell("full"), cell("h2o"), cell("d2o")]
    fake = {"log": str(tmp_path / "log"), "visible": str(tmp_path / "pids"), "memory": 2**34}
    found = run(tmp_path / "run", in_turn(cells), **fake)
    assert [one.status for one in found.cells] == ["ok"] * 3
    seen = log(tmp_path / "log")
    pids = [line.split()[0] for line in (tmp_path / "pids").read_text().splitlines()]
    probe = 2  # requests that show how fast the machine is
    ops, pids = [(op, policy) for op, policy, _ in seen][probe:], pids[probe:]
    first = [one for one, pid in zip(ops, pids, strict=True) if pid == pids[0]]
    second = [one for one, pid in zip(ops, pids, strict=True) if pid != pids[0]]
    assert len(set(pids)) == 2
    held = [("hold", policy) for policy in ("full", "h2o", "d2o")]
    assert first[:3] == second[:3] == held
    assert first[-3:] == [("measure", policy) for policy in ("full", "h2o", "d2o")]
    assert second[-3:] == [("measure", policy) for policy in ("d2o", "h2o", "full")]
    assert {op for op, _ in first[3:-3]} == {op for op, _ in second[3:-3]} == {"window"}  # warm by then, and counted
    turns = " ".join(policy for op, policy, _ in seen if op == "window")
    assert turns.startswith("full h2o d2o d2o h2o full h2o d2o full full d2o h2o")
    assert found.cells[1].values["ops_step"].value == 100


def test_the_ratio_is_the_median_over_sweeps_of_both_processes(tmp_path: Path) -> None:
    """Processes and sweeps change all times alike, so every ratio is the true one."""
    found = run(tmp_path, in_turn([cell("full"), cell("h2o")]), memory=2**34)
    full, h2o = found.cells
    assert h2o.values["speedup"].value == pytest.approx(0.02 / 0.012)
    assert (h2o.values["speedup"].lo, h2o.values["speedup"].hi) == (pytest.approx(5 / 3), pytest.approx(5 / 3))
    assert h2o.values["speedup"].n == 16  # 2 processes × 8 sweeps at 2 depths
    details = h2o.details
    assert (details["turns"], details["processes"], details["disturbed"], details["busy"]) == ("windows", 2, 0.0, False)
    assert details["windows"] == {
        "steps": 2, "lead": 1, "depths": 2, "sweeps": 8, "planned": 32, "repeated": 0, "disturbed": 0,
    }  # fmt: skip
    assert h2o.values["tpot_s"].n == 32  # windows
    assert h2o.values["prefill_cost"].n == 2
    raw = read_samples(tmp_path, full)
    assert len(raw["windows"]) == 32 and {one["process"] for one in raw["windows"]} == {0, 1}
    assert [one["process"] for one in raw["rounds"]] == [0, 1]


def test_disturbed_rounds_of_windows_are_measured_again_for_all_their_caches(tmp_path: Path) -> None:
    watcher = Silent()
    found = run(tmp_path, in_turn([cell("full"), cell("h2o")]), memory=2**34, wild=3, watcher=watcher)
    details = found.cells[0].details
    assert (details["windows"]["repeated"], details["windows"]["disturbed"], details["disturbed"]) == (6, 0, 0.0)
    for one in found.cells:
        raw = read_samples(tmp_path, one)["windows"]
        assert sum(bool(part.get("disturbed")) for part in raw) == 6  # 3 in each process, kept
        assert sum(part["attempt"] == 1 for part in raw) == 6
        assert one.values["tpot_s"].hi is not None and one.values["tpot_s"].hi < 0.05  # none of the slow ones
    assert found.cells[1].values["speedup"].value == pytest.approx(5 / 3)


def test_a_limit_ends_the_repeats_and_the_rest_is_left_out(tmp_path: Path) -> None:
    """16 rounds of windows, half as many may be measured again: 12 disturbed at first take 8 repeats of them."""
    found = run(tmp_path, in_turn([cell("full"), cell("h2o")]), memory=2**34, wild=12).cells[1]
    assert (found.details["windows"]["repeated"], found.details["windows"]["disturbed"]) == (16, 8)
    assert found.details["disturbed"] == 0.25
    assert not found.details["busy"]
    assert "8 of 32 windows left out: other load" in found.flags


def test_a_machine_that_stays_busy_is_said_at_once_and_gets_no_verdict(tmp_path: Path) -> None:
    watcher = Silent()
    found = run(tmp_path, in_turn([cell("full"), cell("h2o")]), memory=2**34, wild=999, watcher=watcher)
    for one in found.cells:
        assert one.details["busy"] and one.details["disturbed"] == 1.0
        assert "busy machine: no verdict on speed" in one.flags
        assert one.values["tpot_s"].value is not None
    assert [note for note in watcher.notes if "busy" in note] == [BUSY]
    said = next(i for i, (kind, text) in enumerate(watcher.events) if text == BUSY)
    ended = next(i for i, (kind, text) in enumerate(watcher.events) if kind == "ok")
    assert said < ended


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"fake": {"stuck": ["h2o"]}}, "it can't go back"),
        ({"fake": {"memory": 1000}}, "no memory beside the others"),
        ({"timing": {"windows": 0}}, "timing.windows is 0"),
        ({"shape": "32+4"}, "4 tokens are too few"),
        ({"worker": {"mode": "fresh"}}, "worker.mode is fresh"),
    ],
)
def test_what_can_t_live_side_by_side_takes_turns_by_request_and_says_why(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    given = {"rounds": 2, "max_rounds": 2, "windows": 16, "window_s": 0.02, "depths": 2, **changes.get("timing", {})}
    cells = [cell(policy, shape=changes.get("shape", "32+8")) for policy in ("full", "h2o")]
    work = in_turn(cells, Timing(**given), **changes.get("worker", {}))
    found = run(tmp_path, work, **{"memory": 2**34, **changes.get("fake", {})}).cells[1]
    assert found.status == "ok"
    assert (found.details["turns"], found.details["processes"]) == ("requests", 2)
    assert why in found.details["turns_why"]
    assert found.values["speedup"].n == 2  # paired by round with full's requests
    assert "windows" not in read_samples(tmp_path, found)


def test_a_cache_that_can_t_be_prefilled_fails_alone_and_the_others_decode_in_turn(tmp_path: Path) -> None:
    found = run(tmp_path, in_turn([cell("full"), cell("h2o"), cell("d2o")]), memory=2**34, crash=["h2o"])
    assert [one.status for one in found.cells] == ["ok", "failed", "ok"]
    assert "SIGSEGV" in found.cells[1].reason
    assert [found.cells[i].details["turns"] for i in (0, 2)] == ["windows", "windows"]


def test_a_cache_that_is_refused_has_its_row_and_the_others_decode_in_turn(tmp_path: Path) -> None:
    found = run(tmp_path, in_turn([cell("full"), cell("h2o"), cell("d2o")]), memory=2**34, faulty=["h2o"])
    assert [one.status for one in found.cells] == ["ok", "failed", "ok"]
    assert found.cells[1].reason == "a prompt that is too long"
    assert [found.cells[i].details["turns"] for i in (0, 2)] == ["windows", "windows"]


def test_caches_whose_steps_cannot_be_captured_are_measured_without_graphs(tmp_path: Path) -> None:
    """Each cell is tried once more in a new process; what has failed in two cells is not tried in the third."""
    policies = ["full", "h2o", "d2o"]
    found = run(tmp_path, in_turn(list(map(cell, policies))), memory=2**34, uncaptured=policies)
    assert [one.status for one in found.cells] == ["ok", "ok", "ok"]
    assert [one.details["turns"] for one in found.cells] == ["windows"] * 3


def test_a_cache_that_breaks_the_gpu_even_without_kernels_fails_alone(tmp_path: Path) -> None:
    policies = ["full", "h2o", "d2o"]
    found = run(tmp_path, in_turn(list(map(cell, policies))), memory=2**34, broken=["d2o"], broken_always=["h2o"])
    assert [one.status for one in found.cells] == ["ok", "failed", "ok"]
    assert "illegal memory access" in found.cells[1].reason


def test_no_memory_side_by_side_is_no_fault_of_a_cell(tmp_path: Path) -> None:
    """The worker runs out of memory while a cache is held, and has enough for each alone."""
    found = run(tmp_path, in_turn([cell("full"), cell("h2o")]), memory=2**34, oom_held=["h2o"])
    assert [one.status for one in found.cells] == ["ok", "ok"]
    assert all(one.details["turns"] == "requests" for one in found.cells)
    assert "no memory beside the others" in found.cells[0].details["turns_why"]


def test_a_run_that_goes_on_keeps_the_windows_it_has(tmp_path: Path) -> None:
    cells = [cell("full"), cell("h2o")]
    whole = run(tmp_path / "whole", in_turn(cells), memory=2**34)
    again = tmp_path / "again"
    run(again, in_turn(cells), memory=2**34)
    (again / "cells.jsonl").unlink()
    for name in again.glob("samples/*.json"):
        raw = json.loads(name.read_text())
        del raw["stopped"]
        raw["windows"] = [one for one in raw["windows"] if one["process"] == 0]
        raw["rounds"] = raw["rounds"][:1]
        name.write_text(json.dumps(raw))
    found = run(again, in_turn(cells), memory=2**34, log=str(tmp_path / "log"))
    assert {number.split(".")[0] for op, _, number in log(tmp_path / "log") if op == "window"} == {"1"}
    assert [one.values for one in found.cells] == [one.values for one in whole.cells]


def test_windows_that_only_a_part_of_the_caches_has_are_measured_again_for_all(tmp_path: Path) -> None:
    cells = [cell("full"), cell("h2o")]
    run(tmp_path / "run", in_turn(cells), memory=2**34)
    (tmp_path / "run" / "cells.jsonl").unlink()
    for name in (tmp_path / "run").glob("samples/*full*.json"):
        raw = json.loads(name.read_text())
        del raw["stopped"]
        raw["windows"] = [one for one in raw["windows"] if one["process"] == 0]
        name.write_text(json.dumps(raw))
    for name in (tmp_path / "run").glob("samples/*h2o*.json"):
        raw = json.loads(name.read_text())
        del raw["stopped"]
        name.write_text(json.dumps(raw))
    found = run(tmp_path / "run", in_turn(cells), memory=2**34, log=str(tmp_path / "log"))
    assert {(policy, number.split(".")[0]) for op, policy, number in log(tmp_path / "log") if op == "window"} == {
        ("full", "1"), ("h2o", "1"),
    }  # fmt: skip
    assert found.cells[1].values["speedup"].n == 16
