"""The real operations of a worker, on the tiny model; memory that ended is survived."""

from __future__ import annotations

import gc
import os
import weakref
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from fake_nvml import FakeNvml
from fake_worker import DIMENSIONS

import d2obench.cache.session as session
from d2obench.errors import MeasureError, ModelError, OutOfMemory, UsageError
from d2obench.measure.nvml import Nvml
from d2obench.measure.samples import RequestTrace
from d2obench.models import LoadedModel
from d2obench.record import Axes
from d2obench.run.check import check
from d2obench.run.worker import Worker
from d2obench.run.worker_client import DeadWorkerError, describe
from d2obench.suite.definition import load_suite
from d2obench.tasks.prompts import timing_prompts


def request(policy: str = "h2o", budget: str | None = "0.25", **more: Any) -> dict[str, Any]:
    axes = Axes("speed", "shape:tiny", "float32", "cpu", policy, budget, "32+12", 2, 0)
    return {"axes": msgspec.to_builtins(axes), "batch": 2, "round": 0, **more}


def silent(done: int, total: int, words: str = "") -> None:
    """No progress."""


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker()


def test_a_request_answers_a_whole_trace_as_json(worker: Worker) -> None:
    found = msgspec.json.decode(msgspec.json.encode(worker.measure(request(), silent)))
    trace = msgspec.convert(found["trace"], RequestTrace)
    assert (trace.batch, trace.gen, trace.prompt_tokens) == (2, 12, 64)
    assert len(trace.step_s) == 11
    assert trace.requested == 8
    assert trace.effective == 0.25
    assert found["model"]["name"] == "shape:tiny"
    assert found["model"]["weights_read_bytes"] < found["model"]["weights_bytes"]


def test_the_same_request_gives_the_same_tokens(worker: Worker) -> None:
    digests = [worker.measure(request(), silent)["trace"]["tokens_digest"] for _ in range(2)]
    assert digests[0] == digests[1]


def test_a_warm_up_is_short_and_a_sampled_request_measures_a_part(worker: Worker) -> None:
    assert worker.measure(request(warm_up=True), silent)["trace"]["gen"] == 8
    sampled = worker.measure(request(sampled=[2, 2]), silent)["trace"]
    assert sampled["step_at"] == [0, 1, 9, 10]
    assert sampled["gen"] == 12


def test_a_warm_up_decodes_until_it_settles_and_says_so(worker: Worker) -> None:
    found = worker.warm_up(request(within=1e9), silent)
    assert found["stable"]
    assert len(found["decode_s"]) == 2
    restless = worker.warm_up(request(within=0.0), silent)
    assert len(restless["decode_s"]) == 2  # twelve tokens hold no more windows


def test_idle_power_comes_from_the_driver_and_is_missing_without_one(worker: Worker) -> None:
    assert worker.idle({"device": "cpu"}, silent) == {"idle_w": None}
    other = Worker()
    other._gpu["cuda:0"] = Nvml("gpu0", FakeNvml({"PowerUsage": 71_000}))
    asked = {"device": "cuda:0", "wait": 0.0, "seconds": 0.3}
    assert other.idle(asked, silent) == {"idle_w": 71.0}
    other._gpu["cuda:0"] = Nvml("gpu0", FakeNvml(unsupported={"PowerUsage"}))
    assert other.idle(asked, silent) == {"idle_w": None}
    other._gpu["cuda:0"] = None  # no driver
    assert other.idle(asked, silent) == {"idle_w": None}


def test_a_gpu_that_others_use_is_refused_with_the_owner_unless_allowed() -> None:
    """``--allow-busy`` is the one way past; processes of the run itself are no others."""
    busy = Worker()
    owner = SimpleNamespace(pid=os.getppid(), usedGpuMemory=2**30)
    busy._gpu["cuda:0"] = Nvml("gpu0", FakeNvml({"ComputeRunningProcesses": [owner]}))

    class Client:
        """Answers in this process, as if there were a GPU."""

        def call(self, op: str, args: dict[str, Any]) -> Any:
            if op == "describe":
                return {"devices": {"cuda": "cuda:0"}, "models": {"shape:tiny": DIMENSIONS}}
            return getattr(busy, op)(args, silent)

    words = {"axes.model": "shape:tiny", "axes.device": "cuda", "axes.task": "speed", "axes.shape": "32+8"}
    suite = load_suite("quick", words)
    with pytest.raises(MeasureError, match=f"the GPU is busy: process {os.getppid()} .*--allow-busy"):
        check(suite, Client())  # type: ignore[arg-type]
    assert check(suite, Client(), allow_busy=True).suite.axes.device == ("cuda:0",)  # type: ignore[arg-type]
    assert busy.refuse_busy({"device": "cuda:0", "own": [os.getppid()]}, silent) == {}


def test_a_worker_killed_while_the_suite_is_checked_is_forgiven_once() -> None:
    """Before the first cell, too, a stray kill does not end the run."""

    class Killed:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def call(self, op: str, args: dict[str, Any]) -> Any:
            self.asked.append(op)
            if self.asked.count(op) == 1:
                raise DeadWorkerError(f"the worker was killed by SIGKILL during '{op}'")
            known = {"devices": {"cuda": "cuda:0"}, "models": {"shape:tiny": DIMENSIONS}}
            return known if op == "describe" else {}

    suite = load_suite("quick", {"axes.model": "shape:tiny", "axes.device": "cuda", "axes.task": "speed"})
    client = Killed()
    assert check(suite, client).suite.axes.device == ("cuda:0",)  # type: ignore[arg-type]
    assert client.asked == ["describe", "describe", "refuse_busy", "refuse_busy"]


@pytest.mark.parametrize(("device", "dtype"), [("cuda:0", "bfloat16"), ("cpu", "float32")])
def test_the_type_of_weights_follows_the_device(device: str, dtype: str) -> None:
    """A GPU runs models in the type in which they are published."""

    class Client:
        def call(self, op: str, args: dict[str, Any]) -> Any:
            return {"devices": {"auto": device}, "models": {"shape:tiny": DIMENSIONS}} if op == "describe" else {}

    words = {"axes.model": "shape:tiny", "axes.task": "speed", "axes.dtype": "auto"}
    plan = check(load_suite("quick", words), Client())  # type: ignore[arg-type]
    assert plan.suite.axes.dtype == (dtype,)
    assert {cell.axes.dtype for cell in plan.cells} == {dtype}
    named = check(load_suite("quick", words | {"axes.dtype": "float16"}), Client())  # type: ignore[arg-type]
    assert named.suite.axes.dtype == ("float16",)


def test_counts_do_not_depend_on_the_machine(worker: Worker) -> None:
    one, two = worker.count(request(), silent), worker.count(request(), silent)
    assert one == two
    assert one["ops_step"] > 0
    full = worker.count(request("full", None), silent)
    assert full["flops_step"] > one["flops_step"]  # more tokens are read


def test_the_model_stays_warm_until_another_is_asked_for(worker: Worker) -> None:
    worker.load(request(), silent)
    held = weakref.ref(worker._loaded.model)
    worker.load(request(), silent)
    assert worker._loaded.model is held()
    other = request()
    other["axes"]["dtype"] = "bfloat16"
    worker.load(other, silent)
    gc.unfreeze()
    gc.collect()
    assert held() is None
    assert worker._loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("phase", ["prefill", "compress", "step"])
def test_memory_that_ends_in_a_phase_is_survived(worker: Worker, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    def ended(*_: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(session.Session, phase, ended)
    for operation, more in ((worker.count, {}), (worker.warm_up, {"within": 0.1}), (worker.measure, {})):
        with pytest.raises(
            OutOfMemory, match=r"out of memory in (setup|prefill|compress|decode): .*allocate"
        ) as caught:
            operation(request(**more), silent)
    assert describe(caught.value)["kind"] == "OutOfMemory"
    worker.release()
    monkeypatch.undo()
    assert worker.measure(request(), silent)["trace"]["batch"] == 2


def test_describe_checks_models_and_devices(worker: Worker) -> None:
    found = worker.describe({"models": ["shape:tiny", "shape:llama-3-8b"], "devices": ["auto", "cpu"]}, silent)
    assert found["devices"]["cpu"] == "cpu"
    assert found["models"]["shape:llama-3-8b"]["parameters"] == 8_030_261_248
    with pytest.raises(ModelError):
        worker.describe({"models": ["shape:none"], "devices": []}, silent)
    with pytest.raises(UsageError):
        worker.describe({"models": [], "devices": ["cuda:99"]}, silent)


def test_prompts_are_different_readable_and_the_same_for_every_policy(tiny: LoadedModel) -> None:
    found = timing_prompts(tiny, 50, 4, 0)
    assert [len(one) for one in found] == [50] * 4
    assert len({tuple(one) for one in found}) == 4
    assert all(0 <= token < 256 for one in found for token in one)
    assert timing_prompts(tiny, 50, 4, 0) == found
    assert timing_prompts(tiny, 50, 4, 1) != found


def test_a_text_begins_with_the_models_own_first_token(tiny: LoadedModel) -> None:
    import dataclasses

    class Letters:
        """One token a letter; texts begin with token 1."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = [ord(char) for char in text]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    found = timing_prompts(dataclasses.replace(tiny, tokenizer=Letters()), 80, 2, 0)
    assert [one[0] for one in found] == [1, 1]
    assert [len(one) for one in found] == [80, 80]
    words = ["".join(map(chr, one[1:])) for one in found]
    assert words[0] != words[1]
    assert all(word.replace("\n", " ").count(" ") > 8 for word in words)
