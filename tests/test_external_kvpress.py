"""kvpress beside our policies: budgets become ratios, figures are of the tensors held, another interpreter runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_families import prompts, tiny_model
from waiting import LIMIT_S

from d2obench.cache import Session
from d2obench.cli import main
from d2obench.errors import D2OBenchError, PolicyError, UsageError, WorkerError
from d2obench.external import check_installed, open_session, record_of
from d2obench.policies import parse_choice, parse_policy
from d2obench.run import isolated_workers as environments

TESTS = Path(__file__).parent
RECENT = "kvpress:RecentPress"


def lay_out(folder: Path) -> Path:
    """A folder that looks like an installed kvpress 9.9."""
    (folder / "kvpress.py").write_text((TESTS / "fake_kvpress.py").read_text())
    info = folder / "kvpress-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 9.9\n")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fake kvpress in this interpreter."""
    monkeypatch.syspath_prepend(str(lay_out(tmp_path)))
    yield
    sys.modules.pop("kvpress", None)


def decoded(policy: str, budget: str, texts: list[list[int]], steps: int = 3) -> tuple[torch.Tensor, Session]:
    session = open_session(tiny_model("llama-gqa2"), policy, budget, max_new=steps)
    session.prefill(texts)
    session.compress()
    return torch.stack([session.step(torch.full((len(texts),), 3 + i)) for i in range(steps)], 1), session


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("budget", ["0.3", "7", "0.29", "1", "1.0", "64"])
def test_a_budget_is_kept_to_the_token(budget: str) -> None:
    marked: list[str] = []
    session = open_session(tiny_model("llama-gqa2"), RECENT, budget, max_new=4, mark=marked.append)
    session.prefill(prompts(30, 30))
    session.compress()
    keep = {"0.3": 9, "7": 7, "0.29": 9, "1": 1, "1.0": 30, "64": 30}[budget]
    found = session.footprint()
    assert found.kept == [[keep, keep]] * 2
    layer = session.cache.layers[0]
    assert found.kv_bytes == found.prompt_kv_bytes == 2 * 2 * layer.keys.numel() * layer.keys.element_size()
    assert found.effective == keep / 30
    assert found.evicted_layers == [2 * 2 * (30 - keep)] * 2, "two KV heads, two sequences"
    assert marked == ["prefill", "compress", "prefill", "compress", "prefill", "decode"]
    session.step(torch.tensor([1, 2]))
    assert session.footprint().held == [[keep + 1, keep + 1]] * 2


@pytest.mark.usefixtures("here")
def test_it_decodes_as_the_same_policy_of_ours() -> None:
    """Positions stay true though the cache got shorter: a window of the newest tokens is our ``local``."""
    texts = prompts(30, 30)
    theirs, _ = decoded(RECENT, "10", texts, steps=1)
    ours, _ = decoded("local", "10", texts, steps=1)
    full, _ = decoded("full", "10", texts, steps=1)
    assert not torch.allclose(theirs, full, atol=1e-3)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    nothing, _ = decoded(RECENT, "1.0", texts)
    whole, _ = decoded("full", "1.0", texts)
    torch.testing.assert_close(nothing, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("here")
def test_a_batch_of_unlike_lengths_is_its_sequences() -> None:
    texts = prompts(30, 19, 25)
    together, session = decoded(RECENT, "0.4", texts)
    assert session.footprint().kept == [[12, 8, 10]] * 2
    for text, row in zip(texts, together, strict=True):
        assert torch.equal(decoded(RECENT, "0.4", [text])[0][0], row)


@pytest.mark.usefixtures("here")
def test_a_snapshot_is_come_back_to_any_number_of_times() -> None:
    session = open_session(tiny_model("llama-gqa2"), RECENT, "0.4", max_new=4)
    session.prefill(prompts(30, 19))
    session.compress()
    saved, first = session.snapshot(), []
    for _ in range(3):
        first.append(torch.stack([session.step(torch.tensor([4, 5])) for _ in range(3)]))
        session.restore(saved)
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    assert session.footprint().held == [[12, 8]] * 2


@pytest.mark.usefixtures("here")
def test_presses_hold_presses_and_what_is_wrong_is_one_line() -> None:
    nested = "kvpress:WrapperPress(press=RecentPress(window_size=2))"
    assert decoded(nested, "6", prompts(20))[1].footprint().kept == [[6]] * 2
    assert check_installed([nested])["kvpress"] == "9.9"
    for text, said in {
        "kvpress:RecentPres": "did you mean 'RecentPress'?",
        "kvpress:BasePresss": "has no press",
        "kvpress:field": "has no press",
        "kvpress:RecentPress(windows=3)": "unexpected keyword argument 'windows'",
        "kvpress:RecentPress(window_size=0)": "a window has tokens",
        "kvpress:TargetPress": "takes no budget",
        "kvpress:WrapperPress(press=NoPress)": "has no press 'NoPress'",
    }.items():
        with pytest.raises(PolicyError, match=said.replace("?", r"\?")):
            check_installed([text])


def test_the_words_of_a_policy() -> None:
    assert parse_choice("kvpress:SnapKVPress(window_size=64)").takes_budget
    found = parse_choice("kvpress:SnapKVPress(window_size=64)").yardstick
    assert found is not None
    assert (found.method, found.isolated, found.environment) == ("SnapKVPress", True, "kvpress")
    for text, said in {
        "kvpress": "needs the name of a press",
        "kvpress:": "needs the name of a press",
        "kvpress:a.b": "needs the name of a press",
        "kvpress:__init__": "needs the name of a press",
        "kvpress:SnapKVPress(compression_ratio=0.3)": "the budget sets compression_ratio",
        "kvpress:SnapKVPress+quant(bits=4)": "no policy cache",
        "full:SnapKVPress": "unknown policy",
    }.items():
        with pytest.raises(PolicyError, match=said):
            parse_choice(text)
    with pytest.raises(PolicyError, match="no policy cache"):
        parse_policy("kvpress:SnapKVPress")
    assert record_of(parse_choice("d2o"), tiny_model("llama-gqa2")) == {}


def test_without_it_is_one_line_with_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(UsageError, match="can't be imported here"):
        check_installed(["kvpress:SnapKVPress"])
    for words, said in (
        (["--policy", "kvpress:SnapKVPress"], ("bridges install kvpress", "--python")),
        (["--policy", "full", "--python", sys.executable], ("no policy here needs another interpreter",)),
        (["--policy", "kvpress:SnapKVPress", "--python", "/nowhere/python"], ("can't start a worker",)),
    ):
        with pytest.raises(SystemExit) as done:
            main(["run", "quick", "--model", "shape:tiny", "--task", "speed", *words])
        assert done.value.code == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert all(word in shown for word in said), shown


def test_an_environment_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2OBENCH_CACHE", str(tmp_path))
    ran: list[list[str]] = []

    def run(words: list[str], **options: Any) -> None:
        assert isinstance(words, list)
        assert not options.get("shell")
        ran.append(words)
        if words[1:3] == ["-m", "venv"]:
            (Path(words[3]) / "bin").mkdir(parents=True)
            (Path(words[3]) / "bin" / "python").touch()
        elif broken:
            raise subprocess.CalledProcessError(1, words)

    monkeypatch.setattr(environments.subprocess, "run", run)
    said: list[str] = []
    broken = True
    with pytest.raises(WorkerError, match="could not be made"):
        environments.install("kvpress", said.append)
    assert environments.interpreter("kvpress") is None
    assert not environments.folder("kvpress").exists()
    broken = False
    assert environments.install("kvpress", said.append) == environments.interpreter("kvpress")
    assert "--system-site-packages" not in ran[-2]
    assert {"kvpress==0.5.5", "transformers==5.2.0"} < set(ran[-1])
    assert any("kvpress==0.5.5" in words for words in said)
    monkeypatch.setitem(environments.PINS, "kvpress", ("kvpress==0.6",))
    assert environments.interpreter("kvpress") is None, "made to other pins"
    with pytest.raises(UsageError, match="no bridge is called"):
        environments.install("other", said.append)


def test_only_our_own_code_gets_into_another_interpreter() -> None:
    with environments.code_only() as folder:
        assert [path.name for path in Path(folder).iterdir()] == ["d2obench"]


def test_a_run_under_another_interpreter_says_so(tmp_path: Path) -> None:
    """One table: our policy here, a press under an interpreter that knows the fake kvpress."""
    package = tmp_path / "site"
    package.mkdir()
    lay_out(package)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{package}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    words = ["run", "quick", "--model", "shape:tiny", "--task", "speed", "--policy", f"full,local,{RECENT}"]
    words += ["--budget", "0.5", "--shape", "24+4", "--batch", "2", "--rounds", "2", "--threads", "1", "-q"]
    words += ["--set", "timing.processes=1"]
    with pytest.raises(SystemExit) as done:
        main([*words, "--python", str(python), "--out", str(tmp_path / "run")])
    assert done.value.code == 0
    cells = [json.loads(line) for line in (tmp_path / "run" / "cells.jsonl").read_text().splitlines()]
    by_policy = {cell["axes"]["policy"]: cell for cell in cells}
    assert {cell["status"] for cell in cells} == {"ok"}, [cell["reason"] for cell in cells]
    press, local = by_policy[RECENT], by_policy["local"]
    assert any("other environment: transformers" in flag for flag in press["flags"])
    assert not any("environment" in flag for flag in [*local["flags"], *by_policy["full"]["flags"]])
    assert press["details"]["model"]["versions"]["kvpress"] == "9.9"
    assert press["values"]["budget_effective"]["value"] == local["values"]["budget_effective"]["value"] == 0.5
    assert {"ttft_s", "tpot_s", "kv_bytes", "speedup"} <= press["values"].keys()
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["environment"]["environments"]["kvpress"]["kvpress"] == "9.9"
    report = (tmp_path / "run" / "report.md").read_text()
    assert "other environment: transformers" in report
    assert f"Fastest decode: {RECENT}" not in report
    assert str(tmp_path) not in json.dumps(info)


@pytest.mark.skipif(environments.interpreter("kvpress") is None, reason="d2obench bridges install kvpress")
def test_the_real_one() -> None:
    python = environments.interpreter("kvpress")
    assert python is not None
    from d2obench.run.worker_client import WorkerClient

    axes = {"task": "speed", "model": "shape:tiny", "dtype": "float32", "device": "cpu", "seed": 0}
    axes |= {"policy": "kvpress:SnapKVPress(window_size=8)", "budget": "0.5", "shape": "64+4", "batch": 2}
    with (
        environments.code_only() as code,
        WorkerClient(str(python), {"PYTHONPATH": code}, timeout_s=LIMIT_S) as client,
    ):
        with pytest.raises(D2OBenchError, match="has no press"):
            client.call("prepare", {"policies": ["kvpress:NoPress"]})
        found = client.call("measure", {"axes": axes, "batch": 2})
    assert found["trace"]["kept"] == [[32, 32]] * len(found["trace"]["kept"])
    assert msgspec.json.encode(found["model"]["versions"]).count(b"kvpress") == 1
