"""Tensor parallelism: ranks of gloo on the CPU against one process, and what can't be run this way."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from runs import FAKE
from tiny_families import tiny_model
from waiting import LIMIT_S, wait_for

from d2obench.errors import D2OBenchError, PolicyError, SuiteError, UsageError
from d2obench.record import Axes
from d2obench.run import tensor_parallel
from d2obench.run.check import check, check_one, check_placement
from d2obench.run.plan import cells
from d2obench.run.tensor_parallel import RankedClient, client_for, combined, request_of_rank
from d2obench.run.worker_client import WITHOUT, DeadWorkerError, DeviceFaultError, WorkerClient, cell_of
from d2obench.suite.definition import Placement, Quality, Suite, load_suite

POLICIES = [("full", None), ("streaming", "0.3"), ("h2o", "0.3"), ("d2o", "0.3")]
OTHERS = [("random", "0.3"), ("cam", "0.3"), ("snapkv(window=8)", "0.5"), ("d2o(interval=2)", "0.3"),
          ("quant(bits=8)", None), ("hf-static", None), ("d2o(preset=mass)", "0.4"),
          ("d2o(preset=mass,heads=true)", "0.3"), ("criticalkv(window=8)", "0.5"), ("duo(sinks=2,recent=6)", "0.5"),
          ("cake(window=8)", "0.5"), ("kvzip(chunk=15,plus=true)", "0.5"),
          ("d2o(preset=mass,heads=true)+quant", "0.3")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved llama with 4 query and 2 KV heads, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_model("llama-gqa2").model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(path)
    return path


def suite_for(folder: Path, ranks: int, **worker: Any) -> Suite:
    words = {"axes.model": str(folder), "axes.device": "cpu", "models.tensor_parallel": str(ranks)}
    words |= {f"worker.{key}": str(value) for key, value in worker.items()}
    return load_suite("quick", words)


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[WorkerClient]:
    with client_for(suite_for(folder, 1, threads=1)) as client:
        yield client


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[RankedClient]:
    client = client_for(suite_for(folder, 2, threads=1, timeout_s=LIMIT_S))
    assert isinstance(client, RankedClient)
    with client:
        yield client


def request(folder: Path, policy: str, budget: str | None, shape: str = "40+10", **more: Any) -> dict[str, Any]:
    axes = Axes("speed", str(folder), "float32", "cpu", policy, budget, shape, 2, 3)
    return {"axes": msgspec.to_builtins(axes), "batch": 2, "round": 0, **more}


@pytest.mark.parametrize(("policy", "budget"), POLICIES + OTHERS)
def test_two_ranks_give_what_one_process_gives(
    folder: Path, one: WorkerClient, two: RankedClient, policy: str, budget: str | None
) -> None:
    """Tokens, kept tokens of every layer, bytes and counts; the ranks together hold one set of weights.

    Products over half the heads round differently, so a similarity that equals the threshold but for rounding may lie
    on its other side: counts of merges may differ by a few.
    """
    alone = one.call("measure", request(folder, policy, budget))
    found = two.call("measure", request(folder, policy, budget))
    same = ("tokens_digest", "kv_bytes", "kv_prompt_bytes", "kept", "held", "requested", "effective")
    for key in (*same, "evicted_layers"):
        assert found["trace"][key] == alone["trace"][key], key
    assert found["trace"]["merged_layers"] == pytest.approx(alone["trace"]["merged_layers"], rel=0.05)
    assert not [flag for flag in found["trace"]["flags"] if "differ" in flag]
    assert found["trace"]["peaks"]["decode"]["rss_bytes"] > 1.2 * alone["trace"]["peaks"]["decode"]["rss_bytes"]
    norms = 5 * 64 * 4  # both hold them all
    assert found["model"]["weights_bytes"] - alone["model"]["weights_bytes"] == pytest.approx(norms, abs=256)


@pytest.mark.parametrize(("policy", "budget"), POLICIES[1:])
def test_fidelity_on_two_ranks_is_that_of_one(
    folder: Path, one: WorkerClient, two: RankedClient, tmp_path: Path, policy: str, budget: str
) -> None:
    text = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(5)
    text.write_text(" ".join(str(i) for i in torch.randint(2, 128, (400,), generator=generator).tolist()))
    axes = Axes("fidelity", str(folder), "float32", "cpu", policy, budget, "48+12", None, 0)
    asked = {
        "cell": {"axes": msgspec.to_builtins(axes)},
        "quality": msgspec.to_builtins(Quality(limit=2, batch=2, data={"fidelity": str(text)})),
    }
    alone, found = one.call("evaluate", asked), two.call("evaluate", asked)
    assert found["values"].keys() == alone["values"].keys()
    assert any("kl" in key for key in alone["values"])
    for key, value in alone["values"].items():
        assert found["values"][key]["value"] == pytest.approx(value["value"], rel=1e-3, abs=1e-5), key


def test_warm_ups_counts_and_rates_of_ranks(folder: Path, one: WorkerClient, two: RankedClient) -> None:
    """Ranks that measured their own times would decide apart, and hang, where a warm-up ends."""
    found = two.call("warm_up", request(folder, "d2o", "0.3", "40+24", within=0.2))
    assert 2 <= len(found["decode_s"]) <= 5
    alone, both = (client.call("count", request(folder, "h2o", "0.3")) for client in (one, two))
    assert both["flops_step"] == pytest.approx(alone["flops_step"], rel=0.05)
    assert two.call("bandwidth", {"device": "cpu", "seconds": 0.05})["bytes_per_s"] > 0


def test_an_error_of_every_rank_leaves_them_running(folder: Path, two: RankedClient) -> None:
    two.call("load", request(folder, "full", None))
    before = [client.pid for client in (two, *two.peers)]
    with pytest.raises(PolicyError, match=r"policy 'tova' can't run with --tensor-parallel: .*all heads"):
        two.call("measure", request(folder, "tova", "0.3"))
    assert [client.pid for client in (two, *two.peers)] == before


def killed_as_soon_as(condition: Callable[[], bool], ranks: RankedClient) -> threading.Thread:
    """A thread that waits, and then kills rank 1."""

    def kill() -> None:
        wait_for(condition)
        os.kill(ranks.peers[0].started, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_rank_that_dies_ends_the_request_and_the_next_one_finds_new_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted ranks, of which none ends by itself once both have got the request."""
    monkeypatch.setattr(tensor_parallel, "GRACE_S", 0.05)
    log = tmp_path / "log"
    log.touch()
    env = {"FAKE": json.dumps({"hang": ["full"], "log": str(log)})}
    with RankedClient(2, env, timeout_s=LIMIT_S, command=("-P", FAKE)) as ranks:
        thread = killed_as_soon_as(lambda: log.read_text().count("\n") == 2, ranks)
        with pytest.raises(DeadWorkerError, match="killed by SIGKILL during 'measure'"):
            ranks.call("measure", request(tmp_path, "full", None))
        thread.join()
        assert [client.pid for client in (ranks, *ranks.peers)] == [None, None]
        assert ranks.call("bandwidth")["bytes_per_s"] == 2e9, "of both"
        assert ranks.generation == 2
        os.kill(ranks.peers[0].started, signal.SIGKILL)  # between two requests: the next one must be warmed up again
        ranks.peers[0]._process._process.wait(LIMIT_S)  # type: ignore[union-attr]
        assert ranks.pid is None


def test_after_a_fault_of_one_gpu_all_ranks_do_without_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_parallel, "GRACE_S", 0.05)
    asked = request(tmp_path, "full", None)
    with RankedClient(2, {"FAKE": "{}"}, timeout_s=LIMIT_S, command=("-P", FAKE)) as ranks:
        ranks.peers[0].env = {"FAKE": json.dumps({"broken": ["full"]})}
        with pytest.raises(DeviceFaultError, match="illegal memory access"):
            ranks.call("measure", asked)
        for client in (ranks, *ranks.peers):
            assert client.pid is None
            assert list(json.loads(client.env[WITHOUT])[cell_of(asked)]) == ["kernels"]
        assert ranks.call("measure", asked)["trace"]["batch"] == 2


@pytest.mark.slow
def test_a_rank_that_dies_leaves_none_waiting_in_a_collective(folder: Path, two: RankedClient) -> None:
    """Rank 1 is stopped, so that it never comes where the other one waits for it, and then killed."""
    two.call("load", request(folder, "full", None))
    before, asked = two.generation, two.peers[0]._id
    os.kill(two.peers[0].started, signal.SIGSTOP)
    thread = killed_as_soon_as(lambda: two.peers[0]._id > asked, two)
    with pytest.raises(DeadWorkerError, match="killed by SIGKILL"):
        two.call("measure", request(folder, "full", None))
    thread.join()
    assert [client.pid for client in (two, *two.peers)] == [None, None]
    assert two.call("bandwidth", {"device": "cpu", "seconds": 0.01})["n"] >= 5
    assert two.generation == before + 1


class Facts:
    """A worker's answers about models and devices, without one."""

    def __init__(self, device: str = "cpu", gpus: int = 0, kv_heads: int = 2, architecture: str = "llama") -> None:
        model = {
            "architecture": architecture, "layers": 2, "heads": 2 * kv_heads, "kv_heads": kv_heads, "head_dim": 16,
            "hidden": 64, "vocab": 128, "context": 4096, "parameters": 1000,
        }  # fmt: skip
        self.devices, self.gpus, self.model = {"auto": device}, gpus, model
        self.asked: list[tuple[str, Any]] = []

    def call(self, op: str, args: Any = None, **_: Any) -> dict[str, Any]:
        self.asked.append((op, args))
        if op != "describe":
            return {}
        devices = {name: self.devices.get(name, name) for name in args["devices"]}
        return {"devices": devices, "gpus": self.gpus, "models": dict.fromkeys(args["models"], self.model)}


@pytest.mark.parametrize(
    ("words", "facts", "said"),
    [
        ({"models.tensor_parallel": "2"}, {"kv_heads": 3}, "can't share the 3 KV heads of .*: .*; use 3"),
        ({"models.tensor_parallel": "2"}, {"architecture": "phi3"}, "can't split .*: .*'phi3'.*--device-map auto"),
        ({"models.tensor_parallel": "2"}, {"device": "cuda:0", "gpus": 1}, "needs as many GPUs: torch sees 1"),
        ({"models.tensor_parallel": "2"}, {"gpus": 2}, "on cpu and on GPUs"),
        ({"models.tensor_parallel": "2", "axes.policy": "d2o(threshold=layer)"}, {}, "'d2o' can't run with --tensor"),
        (
            {"models.tensor_parallel": "2", "axes.model": "shape:tiny", "axes.task": "speed"},
            {},
            "can't split shape:tiny",
        ),
        ({"models.device_map": "auto"}, {}, "several GPUs: the device is cpu; leave it out"),
        ({"models.device_map": "auto"}, {"device": "cuda:0", "gpus": 1}, "several GPUs: torch sees 1 GPU"),
        (
            {"models.device_map": "balanced", "axes.device": "cuda:1"},
            {"device": "cuda:0", "gpus": 2},
            "starts at the first GPU",
        ),
        ({"models.device_map": "auto", "models.tensor_parallel": "2"}, {}, "models.device_map and models.tensor"),
    ],
)
def test_what_can_not_be_placed_is_one_clear_line(words: dict[str, str], facts: dict[str, Any], said: str) -> None:
    with pytest.raises(D2OBenchError, match=said):
        check(load_suite("quick", words), Facts(**facts))  # type: ignore[arg-type]


def test_another_library_s_cache_runs_on_one_device() -> None:
    suite = load_suite("quick", {"models.tensor_parallel": "2", "axes.policy": "hf-quantized"})  # type: ignore[arg-type]
    with pytest.raises(D2OBenchError, match="hf-quantized runs on one device"):
        check_placement(suite, {"devices": {"auto": "cpu"}}, {})


def test_every_gpu_that_is_taken_must_be_free() -> None:
    for words, taken in (({"models.tensor_parallel": "2"}, 2), ({"models.device_map": "auto"}, 3)):
        facts = Facts("cuda:0", 3)
        check(load_suite("quick", words), facts)  # type: ignore[arg-type]
        asked = [args["device"] for op, args in facts.asked if op == "refuse_busy"]
        assert asked == [f"cuda:{i}" for i in range(taken)]


def test_a_placement_is_part_of_a_cell_and_only_where_it_is_one() -> None:
    plain, split = (cells(load_suite("quick", words)) for words in ({}, {"models.tensor_parallel": "2"}))
    assert [cell.id for cell in plain] == [cell.id for cell in split]
    assert not {cell.hash for cell in plain} & {cell.hash for cell in split}
    assert [cell.hash for cell in cells(load_suite("quick", {"models.tensor_parallel": "1"}))] == [
        cell.hash for cell in plain
    ]
    with pytest.raises(SuiteError, match=r"key models\.device_map"):
        load_suite("quick", {"models.device_map": "everywhere"})
    with pytest.raises(SuiteError, match=r"profile measures models on one device; .*run"):
        check_one(load_suite("quick", {"models.tensor_parallel": "2"}), "profile")


def test_a_rank_gets_its_own_gpu_and_its_part_of_the_limit() -> None:
    asked = {"axes": {"device": "cuda:0", "seed": 1}, "limit": 100, "batch": 2}
    assert request_of_rank(asked, 1, 2) == {"axes": {"device": "cuda:1", "seed": 1}, "limit": 50, "batch": 2}
    assert request_of_rank({"device": "cpu"}, 1, 2) == {"device": "cpu"}
    assert asked["axes"] == {"device": "cuda:0", "seed": 1}


def test_ranks_that_say_different_tokens_are_flagged() -> None:
    def answer(digest: str, rss: int) -> dict[str, Any]:
        trace = {"peaks": {"decode": {"rss_bytes": rss}}, "uss_bytes": None, "flags": [], "tokens_digest": digest}
        return {"trace": trace, "model": {"weights_bytes": 10, "weights_read_bytes": 8, "name": "x"}}

    found = combined("measure", [answer("a", 3), answer("b", 4)])
    assert found["trace"]["peaks"]["decode"]["rss_bytes"] == 7
    assert found["model"] == {"weights_bytes": 20, "weights_read_bytes": 16, "name": "x"}
    assert found["trace"]["flags"] == ["the ranks' tokens differ"]
    assert combined("measure", [answer("a", 3), answer("a", 4)])["trace"]["flags"] == []


def test_a_gguf_file_can_not_be_split(tmp_path: Path) -> None:
    from d2obench.models.saved import read_folder

    with pytest.raises(D2OBenchError, match="a GGUF file is dequantised whole"):
        read_folder(tmp_path, torch.float32, torch.device("cpu"), "x.gguf", Placement(tensor_parallel=2))


def test_a_process_alone_is_told_how_to_start_ranks(folder: Path) -> None:
    from d2obench.models import load

    with pytest.raises(UsageError, match=r"2 ranks were asked for and this process is alone.*torchrun"):
        load(str(folder), "float32", "cpu", placement=Placement(tensor_parallel=2))


def test_the_placement_reaches_a_worker_as_words() -> None:
    client = client_for(load_suite("quick", {"models.device_map": "auto"}))
    assert json.loads(client.command[-1]) == {"device_map": "auto"}
