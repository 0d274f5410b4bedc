"""One request's times: scripted clocks give exact figures, and prefill is never a gap."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2obench.errors import ModelError, OutOfMemory
from d2obench.measure.checkup import known_delays
from d2obench.measure.clock import HostClock, clock_for
from d2obench.measure.memory import MemoryProbe, Sampler, probe_for
from d2obench.measure.phases import (
    GROUPS,
    Sampled,
    WarmUp,
    integrate,
    measure_request,
    out_of_memory_named,
    sampled_starts,
    warm_up,
)

FOOTPRINT = {
    "kv_bytes": 10, "prompt_kv_bytes": 8, "state_bytes": 1, "requested": None, "effective": 0.5, "kept": [[1.0]],
    "held": [[2.0]], "over": False, "merged": 0, "evicted": 0, "merged_layers": [], "evicted_layers": [],
    "read_bytes": None,
}  # fmt: skip


class Machine:
    """A machine whose time moves only when something is done on it, and whose memory can run out."""

    def __init__(self, prefill: float = 100.0, compress: float = 10.0, fails: str = "") -> None:
        self.t, self.costs, self.fails = 0.0, {"prefill": prefill, "compress": compress}, fails
        self.step_cost: Any = lambda position: 1.0
        self.fed: list[list[int]] = []
        self.skips: list[int] = []
        self.closed = 0

    def probe(self, meters: tuple[Any, ...] = ()) -> MemoryProbe:
        return MemoryProbe(meters, Sampler(lambda: (1.0,), ("rss_bytes",), 60.0, lambda: self.t))

    def work(self, what: str) -> None:
        if self.fails == what:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nand much more")
        self.t += self.costs.get(what, 0.0)

    def session(self, mark: Any) -> Session:
        self.work("setup")
        return Session(self, mark)

    def request(self, gen: int, **options: Any) -> Any:
        clock = HostClock(lambda: self.t)
        return measure_request(self.session, [[1, 2, 3], [4]], gen, clock=clock, memory=self.probe(), **options)


class Session:
    def __init__(self, machine: Machine, mark: Any) -> None:
        self.machine, self.mark, self.position = machine, mark, 0

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        self.mark("prefill")
        self.machine.work("prefill")
        return torch.eye(2, 7)

    def compress(self) -> None:
        self.mark("compress")
        self.machine.work("compress")
        self.mark("decode")

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.machine.work("decode")
        self.machine.fed.append(tokens.tolist())
        self.machine.t += self.machine.step_cost(self.position)
        self.position += 1
        return torch.eye(2, 7).roll(self.position, 1)

    def skip_to(self, tokens: int) -> None:
        self.machine.skips.append(tokens)
        self.machine.t += 1000.0
        self.position += tokens

    def footprint(self) -> Any:
        self.machine.t += 50.0  # never part of any time
        return SimpleNamespace(**FOOTPRINT)

    def close(self) -> None:
        self.machine.closed += 1


def test_every_time_is_exact_under_a_scripted_clock() -> None:
    machine = Machine()
    machine.step_cost = lambda position: 1.0 + position
    trace = machine.request(5)
    assert (trace.prefill_s, trace.compress_s, trace.ttft_s) == (100.0, 10.0, 110.0)
    assert trace.step_s == [1.0, 2.0, 3.0, 4.0]
    assert (trace.decode_s, trace.e2e_s, trace.loop_s) == (10.0, 120.0, 0.0)
    assert [phase for _, phase in trace.marks] == ["prefill", "compress", "decode", "token", "decode", "end"]
    assert [t for t, _ in trace.marks] == [0, 100, 110, 110, 110, 120]
    assert (trace.kv_bytes, trace.kv_prompt_bytes, trace.prompt_tokens, trace.batch) == (10, 8, 4, 2)
    assert machine.closed == 1


def test_instructions_are_those_of_the_decode_steps() -> None:
    """By a counter that advances as the scripted clock does."""
    machine = Machine()
    machine.step_cost = lambda position: 1.0 + position
    assert machine.request(5, instructions=lambda: int(machine.t)).instructions == 2.5
    assert machine.request(5).instructions is None
    assert machine.request(5, instructions=lambda: 0).instructions is None
    assert machine.request(100, instructions=lambda: int(machine.t), sampled=Sampled(2, 2)).instructions is None


@settings(max_examples=25)
@given(gen=st.integers(1, 40), repeats=st.integers(1, 3))
def test_n_tokens_give_n_minus_1_gaps_and_prefill_is_none_of_them(gen: int, repeats: int) -> None:
    machine = Machine(prefill=1e6, compress=1e5)
    for _ in range(repeats):
        trace = machine.request(gen)
        assert trace.step_s == [1.0] * (gen - 1)
        assert trace.ttft_s == 1.1e6


def test_compression_between_the_layers_of_prefill_is_counted_as_compression() -> None:
    class LayerWise(Session):
        def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
            for _ in range(3):
                self.mark("prefill")
                self.machine.t += 7.0
                self.mark("compress")
                self.machine.t += 2.0
            return torch.eye(2, 7)

        def compress(self) -> None:
            self.mark("compress")

    machine = Machine()
    trace = measure_request(
        lambda mark: LayerWise(machine, mark), [[1], [2]], 2, clock=HostClock(lambda: machine.t), memory=machine.probe()
    )
    assert (trace.prefill_s, trace.compress_s, trace.ttft_s) == (21.0, 6.0, 27.0)


def test_the_loop_outside_the_session_is_told_apart() -> None:
    machine = Machine(prefill=0, compress=0)
    ticks = iter(range(10_000))
    clock = HostClock(lambda: float(next(ticks)))
    trace = measure_request(machine.session, [[1], [2]], 4, clock=clock, memory=machine.probe())
    assert trace.step_s == [2.0, 2.0, 2.0]  # before → session → next token, one tick each
    assert trace.loop_s == 3.0


def test_greedy_tokens_are_fed_back_and_forced_ones_replace_them() -> None:
    machine = Machine()
    greedy = machine.request(4)
    assert machine.fed == [[0, 1], [1, 2], [2, 3]]
    machine.fed.clear()
    forced = machine.request(4, force=torch.tensor([[6, 5, 4, 3], [0, 1, 2, 3]]))
    assert machine.fed == [[6, 0], [5, 1], [4, 2]]
    assert greedy.tokens_digest == forced.tokens_digest  # of what the model says, not of what it is fed


def test_logits_that_are_not_finite_fail_the_request() -> None:
    class Broken(Session):
        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().step(tokens) * float("nan")

    machine = Machine()
    clock = HostClock(lambda: machine.t)
    with pytest.raises(ModelError, match="the logits of the last decode step are not finite"):
        measure_request(lambda mark: Broken(machine, mark), [[1], [2]], 3, clock=clock, memory=machine.probe())
    assert machine.closed == 1
    assert machine.request(3).flags == []


@pytest.mark.parametrize(("fails", "phase"), [("setup", "setup"), *[(p, p) for p in ("prefill", "compress", "decode")]])
def test_memory_that_ends_names_the_phase_closes_the_session_and_keeps_nothing(fails: str, phase: str) -> None:
    machine = Machine(fails=fails)
    alive: list[weakref.ref[Session]] = []

    def factory(mark: Any) -> Session:
        session = machine.session(mark)
        alive.append(weakref.ref(session))
        return session

    with pytest.raises(OutOfMemory, match=f"out of memory in {phase}: CUDA out of memory") as caught:
        measure_request(factory, [[1], [2]], 3, clock=HostClock(lambda: machine.t), memory=machine.probe())
    assert "much more" not in str(caught.value)
    assert machine.closed == len(alive)
    assert caught.value.__context__ is None
    assert [ref() for ref in alive] in ([], [None])


def test_the_garbage_collector_sees_everything_again_afterwards() -> None:
    machine = Machine()
    gc.unfreeze()
    machine.request(3)
    machine.fails = "decode"
    with pytest.raises(OutOfMemory):
        machine.request(3)
    assert gc.get_freeze_count() == 0


def test_a_worker_s_model_is_given_back_before_the_interpreter_ends() -> None:
    """Objects that are exempt from collection at the end are never freed; Triton then lists hundreds of them."""
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count()))\n"  # the first registered runs last
        "from d2obench.measure.memory import GarbageCollection\n"
        "GarbageCollection.exempt_model(); GarbageCollection.begin_timing(); GarbageCollection.exempt_model()\n"
        "assert gc.get_freeze_count()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_another_error_stays_what_it_is_and_the_sampler_ends() -> None:
    machine = Machine()
    machine.step_cost = lambda position: 1 / 0
    probe = machine.probe()
    with pytest.raises(ZeroDivisionError):
        measure_request(machine.session, [[1], [2]], 3, clock=HostClock(lambda: machine.t), memory=probe)
    assert machine.closed == 1
    assert probe.host._thread is None


@given(total=st.integers(1, 3000), depths=st.integers(1, 12), steps=st.integers(1, 16))
def test_sampled_starts_lie_apart_and_reach_both_ends(total: int, depths: int, steps: int) -> None:
    starts = sampled_starts(total, Sampled(depths, steps))
    if depths * (steps + 1) >= total:
        assert starts == []
        return
    assert len(starts) == depths
    assert all(b - a > steps for a, b in pairwise(starts))
    assert depths == 1 or (starts[0], starts[-1]) == (0, total - steps)
    assert starts[0] >= 0 and starts[-1] + steps <= total


@given(base=st.floats(0.1, 10), slope=st.floats(0, 1), depths=st.integers(2, 8), steps=st.integers(1, 8))
def test_a_linear_cost_is_integrated_exactly(base: float, slope: float, depths: int, steps: int) -> None:
    total = 400
    starts = sampled_starts(total, Sampled(depths, steps))
    groups = [[base + slope * i for i in range(start, start + steps)] for start in starts]
    assert integrate(total, starts, groups) == pytest.approx(sum(base + slope * i for i in range(total)))


def test_sampled_decode_measures_the_steps_it_says_and_counts_no_jump() -> None:
    machine = Machine()
    machine.step_cost = lambda position: 1.0 + 0.5 * position
    trace = machine.request(101, sampled=Sampled(3, 4))
    assert trace.step_at == [0, 1, 2, 3, 48, 49, 50, 51, 96, 97, 98, 99]
    assert trace.step_s == pytest.approx([1.0 + 0.5 * at for at in trace.step_at])
    assert trace.decode_s == pytest.approx(sum(1.0 + 0.5 * i for i in range(100)))
    assert machine.skips == [43, 43]  # the step after each jump is run and not measured
    assert machine.request(12, sampled=Sampled(3, 4)).step_at == []  # would cover it all: all is measured


def test_peaks_belong_to_the_phase_they_were_reached_in() -> None:
    machine = Machine()

    class Meter:
        """Peak is the highest time since the reset: 100 in prefill, 110 in compress, and so on."""

        def reset(self) -> None: ...

        def read(self) -> dict[str, int]:
            return {"allocated_bytes": int(machine.t)}

    trace = measure_request(
        machine.session, [[1], [2]], 3, clock=HostClock(lambda: machine.t), memory=machine.probe((Meter(),))
    )
    assert {phase: peaks["allocated_bytes"] for phase, peaks in trace.peaks.items()} == {
        "prefill": 100, "compress": 110, "decode": 112,
    }  # fmt: skip


@pytest.mark.parametrize(("policy", "budget"), [("full", None), ("d2o", "0.3"), ("hf-dynamic", None)])
def test_the_engine_gives_the_tokens_of_a_plain_greedy_loop(tiny: Any, policy: str, budget: str | None) -> None:
    from d2obench.external import open_session

    prompts = [[3 + i for i in range(40)], [9 + i for i in range(25)]]

    def factory(mark: Any) -> Any:
        return open_session(tiny, policy, budget, max_new=8, mark=mark)

    def run(force: torch.Tensor | None = None) -> Any:
        clock, memory = clock_for(tiny.device), probe_for(tiny.device)
        return measure_request(factory, prompts, 8, clock=clock, memory=memory, force=force)

    runs = [run(), run()]
    assert runs[0].tokens_digest == runs[1].tokens_digest
    assert len(runs[0].step_s) == 7
    assert set(runs[0].peaks) == {"prefill", "compress", "decode"}
    assert [phase for _, phase in runs[0].marks][-1] == "end"

    session = open_session(tiny, policy, budget, max_new=8)
    tokens = [session.prefill(prompts).argmax(-1)]
    session.compress()
    for _ in range(7):
        tokens.append(session.step(tokens[-1]).argmax(-1))
    assert run(torch.stack(tokens, 1)).tokens_digest == runs[0].tokens_digest


def test_a_warm_up_ends_when_two_windows_of_steps_agree() -> None:
    machine = Machine()
    machine.step_cost = lambda position: max(1.0, 5.0 - position / 2)  # 1.0 from the eighth step on
    found = warm_up(
        lambda: Session(machine, lambda phase: None), [[1, 2], [3]], 100, clock=HostClock(lambda: machine.t), within=0.1
    )
    assert found == WarmUp([4.25, 2.25, 1.0, 1.0], True)
    assert (len(machine.fed), machine.closed) == (16, 1)
    machine.step_cost = lambda position: 2.0**position
    wild = warm_up(
        lambda: Session(machine, lambda phase: None), [[1, 2], [3]], 100, clock=HostClock(lambda: machine.t), within=0.1
    )
    assert (len(wild.decode_s), wild.stable) == (GROUPS, False)
    short = warm_up(
        lambda: Session(machine, lambda phase: None), [[1, 2], [3]], 5, clock=HostClock(lambda: machine.t), within=0.1
    )
    assert (len(short.decode_s), short.stable) == (1, False)


def test_a_warm_up_that_runs_out_of_memory_closes_its_session() -> None:
    machine = Machine(fails="decode")
    with pytest.raises(OutOfMemory, match="out of memory in decode: CUDA out of memory"), out_of_memory_named() as mark:
        warm_up(lambda: Session(machine, mark), [[1], [2]], 40, clock=HostClock(lambda: machine.t), within=0.1)
    assert machine.closed == 1


def test_samples_lie_on_the_line_of_the_phases() -> None:
    """The host's clock starts at 1000, long before the request; a sample is taken at every mark."""
    machine = Machine()
    machine.t = 1000.0
    trace = machine.request(4)
    assert [t for t, _ in trace.marks] == [0.0, 100.0, 110.0, 110.0, 110.0, 113.0]
    taken = {row[0] for row in trace.timeline}
    assert {0.0, 100.0, 110.0, 113.0} <= taken
    assert min(taken) == 0.0
    assert trace.timeline_columns == ("rss_bytes",)
    assert trace.sampler_overhead is not None and 0 <= trace.sampler_overhead <= 1


def test_known_delays_are_found_in_every_phase() -> None:
    found = known_delays(torch.device("cpu"))
    assert set(found) == {"TTFT", "prefill", "compress", "TPOT"}
    for one in found.values():  # how close is the machine's affair; that it is found is ours
        assert one.measured >= 0.99 * one.true
