"""Windows of decode steps: where they lie, in which order they are measured, and which of them make the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2obench.errors import ModelError
from d2obench.measure.clock import HostClock
from d2obench.measure.counters import count_step
from d2obench.measure.disturbance import Load, window_flags
from d2obench.measure.memory import GarbageCollection, live_bytes
from d2obench.measure.samples import (
    LEAD,
    RoundOfWindows,
    Window,
    WindowPlan,
    decode_times,
    decoded,
    plan_windows,
    select,
    sweep_times,
)
from d2obench.measure.side_by_side import HeldCache, decode_in_turn, hold


def test_the_order_is_abba_and_every_cache_is_at_every_place_equally_often() -> None:
    orders = [WindowPlan.order(("A", "B", "C"), number) for number in range(6)]
    assert ["".join(one) for one in orders] == ["ABC", "CBA", "BCA", "ACB", "CAB", "BAC"]
    places = Counter((name, place) for one in orders for place, name in enumerate(one))
    assert set(places.values()) == {2}
    assert ["".join(WindowPlan.order(("A", "B"), number)) for number in range(4)] == ["AB", "BA", "BA", "AB"]


@given(names=st.integers(1, 7), start=st.integers(0, 20))
def test_a_steady_drift_of_the_machine_cancels_in_each_pair_of_rounds(names: int, start: int) -> None:
    cells = [str(i) for i in range(names)]
    first, second = (WindowPlan.order(cells, 2 * start + i) for i in range(2))
    assert {first.index(name) + second.index(name) for name in cells} == {names - 1}


@settings(max_examples=200)
@given(
    total=st.integers(4, 9000),
    step_s=st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=7),
    windows=st.integers(1, 60),
    depths=st.integers(1, 12),
)
def test_a_plan_lies_within_the_generation_and_no_two_windows_of_a_pass_overlap(
    total: int, step_s: list[float], windows: int, depths: int
) -> None:
    plan = plan_windows(total, step_s, windows=windows, window_s=0.1, depths=depths)
    rounds = plan.rounds(["A", "B"])
    width = plan.steps + plan.lead
    assert len(rounds) == plan.depths * plan.sweeps <= max(windows, 1)
    assert len({(one.sweep, one.depth) for one in rounds}) == len(rounds)
    assert all(one.start >= 0 and one.start + width <= total for one in rounds)
    for first in range(0, plan.sweeps, plan.per_pass):
        starts = [one.start for one in rounds if first <= one.sweep < first + plan.per_pass]
        assert all(b - a >= width for a, b in pairwise(starts))  # in a pass the caches only go forward
    if plan.steps < total - LEAD:
        assert plan.steps * min(step_s) >= 0.1


def test_a_plan_for_a_short_generation_comes_back_and_one_for_a_long_one_reaches_both_ends() -> None:
    short = plan_windows(31, [0.05, 0.08], windows=32, window_s=0.1, depths=6)
    assert short == WindowPlan(total=31, steps=2, lead=1, depths=4, sweeps=8, per_pass=2)
    assert [one.start for one in short.rounds("AB")][:8] == [0, 3, 8, 11, 17, 20, 25, 28]
    assert not short.samples
    long = plan_windows(8191, [0.02, 0.05], windows=32, window_s=0.1, depths=6)
    assert (long.steps, long.depths, long.sweeps, long.per_pass) == (5, 4, 8, 8)
    starts = [one.start for one in long.rounds("AB")]
    assert (starts[0], starts[-1] + long.steps + long.lead) == (0, 8191)
    assert long.samples


def test_a_plan_that_would_take_too_long_has_fewer_depths_first_and_then_fewer_sweeps() -> None:
    """Sweeps are the samples of an interval; a round of windows takes (2 + 1) steps × 3 s."""

    def planned(most_s: float) -> tuple[int, int]:
        plan = plan_windows(8191, [1.0, 2.0], windows=32, window_s=0.1, depths=6, most_s=most_s)
        return plan.depths, plan.sweeps

    assert [planned(seconds) for seconds in (1000.0, 150.0, 100.0, 50.0, 1.0)] == [
        (4, 8),
        (2, 8),
        (1, 11),
        (1, 5),
        (1, 2),
    ]


def window(process: int = 0, sweep: int = 0, depth: int = 0, step_s: float = 1.0, **more: Any) -> Window:
    given = {"attempt": 0, "order": 0, "start": 1, "at_s": 0.0, "lead_s": [9.0], "step_s": [step_s] * 2}
    return Window(process=process, sweep=sweep, depth=depth, **(given | more))


def test_a_disturbed_window_is_left_out_when_it_was_not_measured_undisturbed_again() -> None:
    words = ["other load 40 %"]
    found = select(
        [
            window(sweep=0, step_s=7.0, disturbed=True, flags=words),
            window(sweep=0, step_s=1.0, attempt=1),
            window(sweep=1, step_s=8.0, disturbed=True, flags=words),
            window(sweep=1, step_s=9.0, disturbed=True, flags=words, attempt=1),
            window(sweep=2, step_s=2.0),
        ]
    )
    assert [one.step_s[0] for one in found.windows] == [1.0, 2.0]
    assert (found.planned, found.repeated, found.disturbed, found.left_out) == (3, 2, 1, True)
    assert found.disturbances == [words]


def test_windows_that_are_slow_and_not_flagged_stay() -> None:
    found = select([window(sweep=sweep, step_s=seconds) for sweep, seconds in enumerate((1.0, 1.0, 50.0))])
    assert (len(found.windows), found.disturbed) == (3, 0)


def test_disturbed_windows_stay_where_they_are_most_of_all() -> None:
    found = select([window(sweep=sweep, disturbed=sweep > 0) for sweep in range(4)])
    assert (len(found.windows), found.disturbed, found.left_out) == (4, 3, False)


def test_a_sweep_gives_the_time_of_the_whole_generation_whatever_its_depths() -> None:
    """A cost that grows by 0.5 a step: 100 steps take exactly Σ (1 + i/2)."""
    plan = plan_windows(100, [0.01], windows=16, window_s=0.04, depths=4)
    assert (plan.steps, plan.depths, plan.sweeps) == (4, 2, 8)
    found = []
    for one in plan.rounds(["A"]):
        steps = range(one.start + plan.lead, one.start + plan.lead + plan.steps)
        cost = [1 + i / 2 for i in steps]
        made = window(sweep=one.sweep, depth=one.depth, start=steps[0], lead_s=[99.0])
        found.append(msgspec.structs.replace(made, step_s=cost))
    truth = sum(1 + i / 2 for i in range(100))
    assert list(sweep_times(plan, found).values()) == pytest.approx([truth] * 8)
    assert len(sweep_times(plan, found[1:])) == 7  # a sweep that lacks a depth tells nothing


def test_raw_values_give_the_same_as_the_objects_and_old_runs_give_their_rounds() -> None:
    plan = WindowPlan(total=31, steps=2, lead=1, depths=1, sweeps=2, per_pass=2)
    raw = {"plan": plan._asdict(), "windows": [msgspec.to_builtins(window(1, sweep, step_s=2.0)) for sweep in range(2)]}
    again = decoded(msgspec.json.decode(msgspec.json.encode(raw)))
    assert again is not None and again.plan == plan
    assert decode_times(raw) == {("sweep", 1, 0): 62.0, ("sweep", 1, 1): 62.0}
    rounds = [
        {"round": 0, "decode_s": 3.0, "flags": []},
        {"round": 1, "decode_s": 9.0, "flags": ["stolen CPU 5 %"]},
        {"round": 2, "decode_s": 4.0, "flags": ["logits are not finite"]},
    ]
    assert decode_times({"rounds": rounds}) == {("round", 0, 0): 3.0, ("round", 0, 2): 4.0}
    assert decode_times({}) == {}


# The load counters


def readings(busy: list[float], each: float = 0.1, own: float = 0.2, waited: list[float] | None = None) -> Any:
    """Counters before and after windows of ``each`` seconds on two cores; ``busy`` and ``waited`` of each window."""
    found, wall, total, mine, wait = [], 0.0, 100.0, 0.0, 0.0
    for place, one in enumerate(busy):
        before = Load(wall, total, 0.0, mine, 0.0, wait)
        wall, total, mine = wall + each, total + one, mine + own
        wait += waited[place] if waited else 0.0
        found.append((before, Load(wall, total, 0.0, mine, 0.0, wait)))
    return found


def test_short_windows_are_judged_with_their_neighbours() -> None:
    """Two threads of ours keep two cores busy: nothing. A third process takes a core's worth from the sixth on."""
    assert window_flags(readings([0.2] * 10), cores=2) == [[]] * 10
    flags = window_flags(readings([0.2] * 5 + [0.32] * 10), cores=2)
    assert flags[0] == flags[1] == []
    assert all(words and words[0].startswith("other load") for words in flags[6:])


def test_waiting_for_a_cpu_is_seen_in_the_window_itself() -> None:
    flags = window_flags(readings([0.2] * 7, waited=[0, 0, 0.02, 0, 0, 0, 0]), cores=2)
    assert [bool(words) for words in flags] == [False, False, True, False, False, False, False]
    assert flags[2] == ["waited for a CPU 10 %"]


def test_counters_that_tell_nothing_flag_nothing() -> None:
    silent = [(Load(0.0, 0.0, 0.0, 0.0, 0.0), Load(1.0, 0.0, 0.0, 1.0, 0.0))]
    assert window_flags(silent, cores=2) == [[]]


# Caches in turn, on a scripted clock


class Scripted:
    """A session whose steps take what the machine says, and that remembers what it was asked."""

    def __init__(self, machine: Machine, name: str, cost: float, rewinds: bool = True) -> None:
        self.machine, self.name, self.cost, self.rewinds = machine, name, cost, rewinds
        self.position, self.closed = 0, False

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        self.machine.t += 100.0
        return torch.eye(len(prompts), 7)

    def compress(self) -> None:
        self.machine.t += 10.0

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.machine.steps.append((self.name, self.position, tokens.tolist()))
        self.machine.t += self.cost * (1 + self.position / 10)
        self.position += 1
        return torch.eye(2, 7).roll(self.position, 1)

    def skip_to(self, tokens: int) -> None:
        self.machine.steps.append((self.name, f"skip {tokens}", []))
        self.machine.t += 1000.0
        self.position += tokens

    def snapshot(self, decode_only: bool = False) -> int:
        assert decode_only
        if not self.rewinds:
            raise ModelError("it can't be forked")
        return self.position

    def restore(self, saved: int) -> None:
        self.machine.steps.append((self.name, "restore", []))
        self.machine.t += 500.0
        self.position = saved

    def footprint(self) -> Any:
        raise AssertionError("nobody asks")

    def close(self) -> None:
        self.closed = True


class Machine:
    """Its time moves when something is done on it."""

    def __init__(self) -> None:
        self.t = 0.0
        self.steps: list[tuple[str, Any, list[int]]] = []
        self.clock = HostClock(lambda: self.t)

    def caches(self, **costs: float) -> dict[str, HeldCache]:
        first = torch.tensor([0, 1])
        return {name: HeldCache(Scripted(self, name, cost), first) for name, cost in costs.items()}

    def load(self) -> Load:
        return Load(self.t, 100.0, 0.0, 0.0, 0.0)

    def run(self, caches: dict[str, HeldCache], rounds: list[RoundOfWindows]) -> list[tuple[str, Window]]:
        return decode_in_turn(
            caches,
            rounds,
            process=0,
            lead=1,
            steps=2,
            clock=self.clock,
            origin=0.0,
            read_load=self.load,
            cores=2,
        )


def test_caches_pass_the_same_positions_and_the_first_step_of_a_window_does_not_count() -> None:
    machine = Machine()
    caches = machine.caches(A=1.0, B=2.0)
    found = machine.run(caches, [RoundOfWindows(0, 0, 0, ("A", "B")), RoundOfWindows(1, 0, 3, ("B", "A"))])
    assert [(name, one.start, one.order) for name, one in found] == [("A", 1, 0), ("B", 1, 1), ("B", 4, 0), ("A", 4, 1)]
    assert [(name, position) for name, position, _ in machine.steps] == [
        ("A", 0), ("A", 1), ("A", 2), ("B", 0), ("B", 1), ("B", 2),
        ("B", 3), ("B", 4), ("B", 5), ("A", 3), ("A", 4), ("A", 5),
    ]  # fmt: skip
    of_a = found[0][1]
    assert of_a.lead_s == [1.0] and of_a.step_s == pytest.approx([1.1, 1.2])
    assert found[1][1].step_s == pytest.approx([2.2, 2.4])
    assert found[2][1].at_s == pytest.approx(3.3 + 6.6)


def test_going_back_and_ahead_is_in_no_time_and_the_same_tokens_are_decoded_again() -> None:
    machine = Machine()
    caches = machine.caches(A=1.0)
    rounds = [RoundOfWindows(0, 0, 0, ("A",)), RoundOfWindows(0, 1, 20, ("A",)), RoundOfWindows(0, 0, 0, ("A",), 1)]
    found = [one for _, one in machine.run(caches, rounds)]
    assert [one.start for one in found] == [1, 21, 1]
    assert found[0].step_s == pytest.approx(found[2].step_s)
    assert found[1].step_s == pytest.approx([3.1, 3.2])
    tokens = [tokens for _, position, tokens in machine.steps if isinstance(position, int) and position < 3]
    assert tokens[:3] == tokens[3:]
    assert ("A", "skip 17", []) in machine.steps
    assert [one.attempt for one in found] == [0, 0, 1]


def test_a_jump_from_the_beginning_runs_one_step_first() -> None:
    """A policy may compress in its first decode step, and has no slots to skip in before."""
    machine = Machine()
    (caches,) = [machine.caches(A=1.0)]
    caches["A"].go_to(5)
    assert [what for _, what, _ in machine.steps] == [0, "skip 4"]


def test_a_session_that_can_t_go_back_is_refused_and_closed() -> None:
    machine = Machine()
    session = Scripted(machine, "A", 1.0, rewinds=False)
    with pytest.raises(ModelError, match="can't be forked"):
        hold(lambda: session, [[1], [2]], 31, clock=machine.clock, within=0.1)
    assert session.closed


def test_holding_warms_up_until_two_windows_agree() -> None:
    machine = Machine()
    held, warm = hold(lambda: Scripted(machine, "A", 1.0), [[1], [2]], 31, clock=machine.clock, within=0.3)
    assert warm.decode_s == pytest.approx([1.15, 1.55]) and warm.stable
    held.go_to(0)
    assert machine.steps[-1][1] == "restore"


def test_a_session_that_can_t_skip_is_refused_before_anything_is_timed() -> None:
    class Stuck(Scripted):
        def skip_to(self, tokens: int) -> None:
            raise ModelError("it can't be moved on")

    session = Stuck(machine := Machine(), "A", 1.0)
    with pytest.raises(ModelError, match="can't be moved on"):
        hold(lambda: session, [[1], [2]], 31, clock=machine.clock, within=0.1)
    assert session.closed


@pytest.fixture(scope="module")
def exempt(tiny: Any) -> Iterator[None]:
    """As in a worker with a loaded model: what is there already is not searched at every count of live tensors."""
    GarbageCollection.exempt_model()
    yield
    GarbageCollection.release_model()


@pytest.mark.parametrize(
    ("policy", "budget"),
    [(name, "0.3") for name in ("d2o", "h2o", "cam", "snapkv", "d2o+quant(bits=8)")]
    + [(name, None) for name in ("full", "quant(bits=8)", "hf-dynamic", "hf-static", "sdpa-static")],
)
@pytest.mark.usefixtures("exempt")
def test_real_caches_decode_the_same_tokens_in_turn_as_alone(tiny: Any, policy: str, budget: str | None) -> None:
    """Two caches side by side, sent back and ahead, against a plain loop over one."""
    from d2obench.external import open_session

    prompts = [[3 + i for i in range(40)], [9 + i for i in range(25)]]
    seen: dict[str, list[list[int]]] = {"A": [], "B": []}

    def held(name: str) -> HeldCache:
        session = open_session(tiny, policy, budget, max_new=16)
        step = session.step

        def recorded(tokens: torch.Tensor) -> torch.Tensor:
            seen[name].append(tokens.tolist())
            return step(tokens)

        session.step = recorded  # type: ignore[method-assign]
        cache, _ = hold(lambda: session, prompts, 15, clock=HostClock(), within=0.0)
        return cache

    caches = {name: held(name) for name in ("A", "B")}
    for tokens in seen.values():
        tokens.clear()
    rounds = [RoundOfWindows(0, 0, start, ("A", "B")) for start in (0, 3, 6)]
    decode_in_turn(caches, rounds, process=0, lead=1, steps=2, clock=HostClock(), origin=0.0)
    first = list(map(list, seen["A"]))
    decode_in_turn(caches, rounds, process=0, lead=1, steps=2, clock=HostClock(), origin=0.0)

    plain = open_session(tiny, policy, budget, max_new=16)
    with torch.inference_mode():
        tokens = [plain.prefill(prompts).argmax(-1)]
        plain.compress()
        for _ in range(8):
            tokens.append(plain.step(tokens[-1]).argmax(-1))
    assert first == [one.tolist() for one in tokens]
    assert seen["A"] == seen["B"] == first + first
    plain.close()
    caches["B"].close()
    counts, alive = caches["A"].count()
    before = live_bytes()
    alone = open_session(tiny, policy, budget, max_new=16)
    assert count_step(alone, prompts) == counts  # what a gate counts, in a request of its own
    assert live_bytes() - before == pytest.approx(alive, abs=256)
