"""``d2obench profile`` and ``d2obench doctor`` from the command line, on a machine without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from d2obench.cli import app, main
from d2obench.cli.profile import labels, pick
from d2obench.errors import UsageError
from d2obench.run.plan import cells
from d2obench.suite.definition import load_suite

SMALL = ["--model", "shape:tiny", "--policy", "full,d2o", "--budget", "0.3", "--shape", "48+16", "--batch", "2"]


def run(capsys: Any, *args: str) -> str:
    app(list(args), prog_name="d2obench", standalone_mode=False)
    return str(capsys.readouterr().out)


def test_profile_puts_policies_side_by_side_and_leaves_traces(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    out = run(capsys, "profile", "quick", *SMALL, "--steps", "1", "--top", "3", "--out", str(tmp_path / "p"))
    for words in (
        "decode: ms a step by range",
        "prefill: MiB allocated by range",
        "d2o@0.3",
        "similarity",
        "MLP",
        "lm head",
        "decode: counts a step",
        "kernels launched",
    ):
        assert words in out
    found = json.loads((tmp_path / "p/profile.json").read_text())
    assert len(found) == 2
    for profile in found.values():
        assert set(profile["ranges"]) == {"prefill", "compress", "decode"}
        assert profile["counts"]["ops"] == sum(profile["counts"]["by_op"].values()) > 0
    traces = sorted(path.name for path in (tmp_path / "p").glob("*.trace.json.gz"))
    assert len(traces) == 2
    assert all("shape_tiny" in name for name in traces)


def test_cells_are_picked_by_a_part_of_their_id() -> None:
    suite = load_suite("quick", {"axes.model": "shape:tiny", "axes.task": "speed", "axes.shape": "48+16,64+16"})
    everything = cells(suite)
    assert len(pick(everything, [])) * 2 == len(everything)
    assert {cell.axes.policy for cell in pick(everything, ["h2o@*/64+16"])} == {"h2o"}
    picked = pick(everything, ["full/", "d2o@0.2/48"])
    assert labels(picked) == ["full 48+16", "d2o@0.2 48+16", "full 64+16"]
    with pytest.raises(UsageError, match="no speed cell is named like 'nothing'"):
        pick(everything, ["nothing"])
    with pytest.raises(UsageError, match="a batch in numbers"):
        pick(cells(load_suite("quick", {"axes.batch": "max", "axes.task": "speed"})), [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nvtx_without_a_gpu_is_one_clear_line(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["profile", "quick", *SMALL, "--nvtx"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "d2obench: --nvtx needs a GPU: torch sees none; leave it out to profile here\n"


def test_doctor_tells_what_is_here_and_how_noisy_it_is(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = run(capsys, "doctor", "--seconds", "0.01", "--device", "cpu")
    for words in (
        "torch",
        "memory sampler",
        "timed TTFT",
        "to mend",
        "8 interleaved rounds",
        "a gate of 5 %",
        "Copy bandwidth",
    ):
        assert words.lower() in out.lower()


def test_doctor_refuses_a_device_that_is_not_here() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--device", "cuda:99"])
    assert ended.value.code == 2
