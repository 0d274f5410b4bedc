"""The machine: fingerprint, disturbances, operator counts, ranges, noise."""

from __future__ import annotations

import getpass
import gzip
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_nvml import FakeNvml

from d2obench.measure import environment
from d2obench.measure.checkup import LEVEL, measure_noise, noise_of
from d2obench.measure.counters import count, count_step
from d2obench.measure.disturbance import Load, between, load
from d2obench.measure.environment import COMPARED, differences, environment_hash, fingerprint
from d2obench.measure.memory import PHASES
from d2obench.measure.nvml import Nvml
from d2obench.measure.profiler import BETWEEN, REST, Files, fold_stacks, profile_request
from d2obench.measure.roofline import copy_bandwidth
from d2obench.ranges import ENGINE_RANGES, RANGES
from d2obench.stats.intervals import paired_ratio

PROMPTS = [[3 + i for i in range(60)], [9 + i for i in range(60)]]


def test_the_fingerprint_names_no_host_user_or_folder() -> None:
    text = json.dumps(fingerprint())
    private = {platform.node(), getpass.getuser(), str(Path.home()), str(Path.cwd()), "/home/"}
    assert not [word for word in private if len(word) > 4 and word in text]


def test_the_hash_covers_what_makes_runs_comparable_and_nothing_else() -> None:
    facts = fingerprint()
    for key in facts:
        changed = facts | {key: "another"}
        assert (environment_hash(changed) != environment_hash(facts)) == (key in COMPARED)
        assert set(differences(facts, changed)) == ({key} & set(COMPARED))
    assert {"commit", "dirty", "kernel"}.isdisjoint(COMPARED)


def test_the_gpu_s_facts_are_in_the_fingerprint_and_keys_are_known() -> None:
    facts = fingerprint("cuda:0", attention="ours", gpu=Nvml("gpu0", FakeNvml()))
    assert (facts["gpu"], facts["power_limit_w"], facts["ecc"], facts["attention"]) == (
        "NVIDIA Imagined",
        700.0,
        True,
        "ours",
    )
    assert set(COMPARED) <= set(facts)


def test_the_commit_of_a_repository_the_package_only_lies_in_is_not_taken(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages/d2obench/measure/environment.py"))
    (tmp_path / "site-packages/d2obench").mkdir(parents=True)
    assert environment._code() == {"commit": None, "dirty": None}


def machine_of(root: Path, busy: int, steal: int, throttled: int | None = None) -> Load:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  {busy} 0 0 12345 678 0 0 {steal} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n")
    if throttled is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup/cpu.stat").write_text(f"usage_usec 1\nthrottled_usec {throttled}\n")
    return load(root)


def test_load_of_others_is_what_the_machine_did_less_what_we_did(tmp_path: Path) -> None:
    before = machine_of(tmp_path, 1000, 0, 0)._replace(wall=100.0, own=10.0)
    after = machine_of(tmp_path, 1000 + 1200, 100, 2_500_000)._replace(wall=110.0, own=15.0)
    found = between(before, after, cores=2)
    assert found.other == pytest.approx((12.0 - 5.0 - 0.04) / 20.0)
    assert found.stolen == pytest.approx(1.0 / 20.0)
    assert found.flags() == ["other load 35 %", "stolen CPU 5 %", "CPU quota used up (2.5 s)"]


def test_a_calm_round_has_no_flags_and_a_short_one_tells_nothing(tmp_path: Path) -> None:
    before = machine_of(tmp_path, 1000, 0)._replace(wall=0.0, own=0.0)
    after = machine_of(tmp_path, 1210, 0)._replace(wall=2.0, own=2.0)
    assert between(before, after, cores=2).flags() == []
    assert between(before, after._replace(wall=0.1), cores=2).other is None


def test_a_system_without_proc_tells_nothing(tmp_path: Path) -> None:
    before, after = load(tmp_path), load(tmp_path)._replace(wall=1e9)
    assert between(before, after) == (None, None, 0.0, None)


def test_operators_flops_and_what_a_decode_loop_must_not_do() -> None:
    x, w = torch.ones(3, 4), torch.ones(4, 5)

    def work() -> None:
        y = torch.mm(x, w)
        torch.cat([y, y])
        y.sum().item()
        y[y > 0]
        torch.zeros(1000)

    with torch.inference_mode():
        found = count(work)
    assert found.flops == 2 * 3 * 4 * 5
    assert found.concatenations == {"aten.cat": 1}
    assert found.waits == {"aten._local_scalar_dense": 1, "aten.index": 1}
    assert (found.largest_op, found.largest_bytes) == ("aten.zeros", 4000)
    assert found.ops == sum(found.by_op.values())
    assert found.by_op["aten.sum"] == 1
    assert "aten.item" not in found.by_op  # composite operators are counted by their parts


def test_attention_s_flops_are_counted_on_a_cpu_too() -> None:
    q, k = torch.ones(2, 3, 1, 8), torch.ones(2, 3, 20, 8)
    with torch.inference_mode():
        found = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))
    assert found.flops == 2 * 2 * (2 * 3 * 1 * 20 * 8)


def test_work_in_place_allocates_nothing() -> None:
    x = torch.ones(1000)
    found = count(lambda: x.add_(1).view(10, 100)[0].mul_(2))
    assert (found.allocated_bytes, found.largest_bytes) == (0, 0)


@pytest.mark.parametrize("policy", ["streaming", "h2o", "d2o"])
def test_a_decode_step_of_a_policy_never_waits_and_adds_no_concatenation(tiny: Any, policy: str) -> None:
    from d2obench.cache import Session

    def counted(name: str, budget: str | None) -> Any:
        return count_step(Session(tiny, name, budget, max_new=8), PROMPTS)

    full, bounded = counted("full", None), counted(policy, "0.3")
    assert bounded.waits == {}
    assert bounded.concatenations == full.concatenations  # the model's own, in its rotary positions
    assert bounded.launches is None
    assert bounded == counted(policy, "0.3")


def test_a_library_cache_that_concatenates_is_caught(tiny: Any) -> None:
    from d2obench.external import open_session

    ours = count_step(open_session(tiny, "full", None, max_new=8), PROMPTS)
    theirs = count_step(open_session(tiny, "hf-dynamic", None, max_new=8), PROMPTS)
    assert theirs.concatenations["aten.cat"] == ours.concatenations.get("aten.cat", 0) + 2 * tiny.layers


def hooked(model: torch.nn.Module) -> set[str]:
    """Names of the modules with a forward hook."""
    return {name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks}


def test_ranges_and_operators_of_a_phase_both_add_up_to_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2obench.cache import Session
    from d2obench.decode.cpu import backend as host

    monkeypatch.setattr(host, "offer", lambda state: "")  # one loop there is one range: attention
    before = hooked(tiny.model)
    found = profile_request(
        lambda mark: Session(tiny, "d2o", "0.3", max_new=12, mark=mark), tiny.model, PROMPTS, steps=2
    )
    for phase in PHASES:
        by_range = sum(cost.cpu_s for cost in found.ranges[phase].values())
        by_operator = sum(cost.cpu_s for cost in found.operators[phase].values())
        assert by_range == pytest.approx(by_operator)
        assert by_range > 0
        assert set(found.ranges[phase]) <= {*RANGES, REST}
        assert BETWEEN in found.operators[phase]
    assert {"MLP", "projections", "lm head", "prefill attention"} <= set(found.ranges["prefill"])
    assert {"similarity", "evict", "merge", "decode attention", "scores"} <= set(found.ranges["decode"])
    assert found.ranges["decode"]["MLP"].calls == tiny.layers  # of one step, not of all
    assert set(ENGINE_RANGES) <= {name for ranges in found.ranges.values() for name in ranges}
    assert found.counts == count_step(Session(tiny, "d2o", "0.3", max_new=12), PROMPTS)
    assert hooked(tiny.model) <= before | {""}  # the one of our attention stands on the model itself


def test_a_trace_and_folded_stacks_are_written(tiny: Any, tmp_path: Path, capfd: Any) -> None:
    from d2obench.cache import Session

    files = Files(tmp_path / "trace.json.gz", tmp_path / "stacks.txt")
    profile_request(lambda mark: Session(tiny, "full", None, max_new=4), tiny.model, [[1, 2, 3]], steps=1, files=files)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"prefill", "compress", "decode", "MLP", "decode attention"} <= names
    folded = (tmp_path / "stacks.txt").read_text().splitlines()
    assert any(";" in line and line.rpartition(" ")[2].isdigit() for line in folded)
    assert len({line.rpartition(" ")[0] for line in folded}) == len(folded)
    assert not any("profile_request" in line for line in folded)  # they begin where the request does
    assert capfd.readouterr() == ("", "")


def test_like_stacks_are_added_up_below_the_root(tmp_path: Path) -> None:
    path = tmp_path / "stacks.txt"
    path.write_text(
        "main;run.py(3):_go;a;b 5\nmain;run.py(3):_go;a;b 2\nmain;run.py(3):_go;c 1\nmain;run.py(3):_go 9\nx 4\n"
    )
    fold_stacks(path, ":_go")
    assert path.read_text() == "a;b 7\nc 1\n"
    stack = "run.py:_go;nn.Module:_LlamaDecoderLayer_{0};nn.Module:_Linear_{0};<mm_of_Tensor_at_0x7f{0}> 1\n"
    path.write_text("".join(stack.format(layer) for layer in (3, 14)))
    fold_stacks(path, ":_go")
    assert path.read_text() == "nn.Module:_LlamaDecoderLayer;nn.Module:_Linear;<mm_of_Tensor> 2\n"


def test_bandwidth_is_measured_in_a_moment() -> None:
    found = copy_bandwidth(torch.device("cpu"), size=2**22, seconds=0.0)
    assert found.n >= 5
    assert found.best >= found.median > 0


def test_a_silent_machine_detects_any_change() -> None:
    noise = noise_of([(1.0, 1.0)] * 10)
    assert (noise.single, noise.paired, noise.offset) == (0.0, 0.0, 0.0)
    assert set(noise.detectable.values()) == {0.0}


def test_the_detectable_change_is_seen_about_four_times_of_five() -> None:
    dice = np.random.default_rng(1)

    def pairs(n: int, change: float) -> tuple[list[float], list[float]]:
        return list(np.exp(dice.normal(0, 0.05, n))), list((1 + change) * np.exp(dice.normal(0, 0.05, n)))

    noise = noise_of(list(zip(*pairs(400, 0.0), strict=True)))
    assert noise.paired == pytest.approx(0.05 * 2**0.5, rel=0.1)
    assert noise.detectable[8] > noise.detectable[16] > noise.detectable[32] > 0
    seen = [(paired_ratio(*pairs(16, noise.detectable[16]), level=LEVEL).lo or 0) > 1 for _ in range(200)]
    assert 0.68 < np.mean(seen) < 0.92
    false = [(paired_ratio(*pairs(16, 0.0), level=LEVEL).lo or 0) > 1 for _ in range(200)]
    assert np.mean(false) < 0.05


def test_the_a_a_run_interleaves_two_loops() -> None:
    shares: list[float] = []
    noise = measure_noise(torch.device("cpu"), 0.0, steps=1, progress=shares.append)
    assert len(noise.pairs) == 8
    assert all(a > 0 and b > 0 for a, b in noise.pairs)
    assert shares[-1] == 1.0


def test_every_finding_of_the_check_up_is_told_without_a_gpu() -> None:
    from d2obench.measure.checkup import checkup

    found = list(checkup(torch.device("cpu")))
    assert {"python", "torch", "GPU", "CPU", "memory", "disk", "model", "memory sampler", "timed TPOT"} <= {
        finding.topic for finding in found
    }
    assert all(finding.remedy for finding in found if finding.state == "bad")
    assert os.environ.get("HOME", "?") not in " ".join(finding.text for finding in found)
