"""The array script, a sbatch that is none, and shards that become one run."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from runs import Silent, checked, client
from runs import run as run_whole

from d2obench import record
from d2obench.cli import main
from d2obench.errors import RecordError, UsageError
from d2obench.run import slurm
from d2obench.run.plan import Plan, cells, group, parse_shard, part, shard
from d2obench.run.run_folder import merge
from d2obench.run.runner import LocalEngine, run_suite
from d2obench.suite.definition import load_suite

WORDS = ["quick", "--set=axes.policy=full,d2o", "--set=quality.data.fidelity=/a b/c'd.txt"]


def figures(found: record.Run) -> Any:
    """The rows as they stand in the file, less the times of day."""
    return [(one.id, one.hash, one.status, one.reason, one.values, one.details, one.flags) for one in found.cells]


def sweep() -> Plan:
    """A suite with the cells that it names itself, in three groups of speed and three quality cells."""
    found = checked()
    axes = msgspec.structs.replace(
        found.suite.axes, policy=("full", "h2o", "d2o"), task=("speed", "recall"), shape=("8+4", "16+4", "8+8")
    )
    suite = msgspec.structs.replace(found.suite, axes=axes)
    return dataclasses.replace(found, suite=suite, cells=tuple(cells(suite)))


def run_shard(folder: Path, number: int, count: int, **fake: Any) -> record.Run:
    """Runs or goes on with one shard of the sweep with the scripted worker."""
    folder.mkdir(parents=True, exist_ok=True)
    resume = (folder / "run.json").exists()
    work = part(sweep(), record.read_run(folder).info.cells) if resume else shard(sweep(), number, count)
    with LocalEngine(work.suite, client(**fake)) as engine:
        run_suite(work, folder, engine, Silent(), command=["d2obench", "run", "x", "--shard", "1/2"], resume=resume)
    return record.read_run(folder)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3", "1.0/2"])
def test_a_shard_is_read_strictly(text: str) -> None:
    with pytest.raises(UsageError, match="write it as 2/8"):
        parse_shard(text)


def test_shards_divide_the_groups() -> None:
    whole = sweep()
    parts = [shard(whole, number, 3).cells for number in (1, 2, 3)]
    assert sorted(one.id for some in parts for one in some) == sorted(one.id for one in whole.cells)
    groups = [{one.id for one in some} for some in group(whole.cells)]
    for some in parts:
        names = {one.id for one in some}
        assert all(one <= names or not one & names for one in groups)
    with pytest.raises(UsageError, match=f"the suite has {len(groups)} groups"):
        shard(whole, len(groups) + 1, len(groups) + 1)


def test_two_shards_make_the_run_that_one_machine_makes(tmp_path: Path) -> None:
    whole = run_whole(tmp_path / "whole", sweep())
    shards = [tmp_path / "shards" / str(number) for number in (1, 2)]
    for number, folder in enumerate(shards, 1):
        run_shard(folder, number, 2)
    assert merge(shards[::-1], tmp_path / "run") == ()
    found = record.read_run(tmp_path / "run")
    assert figures(found) == figures(whole)
    assert not found.missing
    assert (found.info.cells, found.info.suite_digest, found.info.environment) == (
        whole.info.cells, whole.info.suite_digest, whole.info.environment,
    )  # fmt: skip
    assert found.info.command == ("d2obench", "run", "x")
    for mine, theirs in zip(found.cells, whole.cells, strict=True):
        one, other = record.read_samples(tmp_path / "run", mine), record.read_samples(tmp_path / "whole", theirs)
        for part_ in (*one.get("rounds", []), *other.get("rounds", [])):
            part_["seconds"] = 0
        assert one == other != {}


def test_what_no_shard_has_is_run_in_the_merged_folder(tmp_path: Path) -> None:
    run_shard(tmp_path / "1", 1, 2)
    merge([tmp_path / "1"], tmp_path / "run")
    missing = record.read_run(tmp_path / "run").missing
    assert missing
    found = run_whole(tmp_path / "run", sweep(), log=str(tmp_path / "log"))
    assert not found.missing
    assert figures(found) == figures(run_whole(tmp_path / "whole", sweep()))


def test_a_shard_goes_on_as_a_shard(tmp_path: Path) -> None:
    first = run_shard(tmp_path / "2", 2, 2, crash=["d2o"])
    assert {"ok", "failed"} == {one.status for one in first.cells}
    again = run_shard(tmp_path / "2", 2, 2)
    assert [one.status for one in again.cells] == ["ok"] * len(first.cells)
    assert again.info.cells == first.info.cells
    assert len(again.cells) < len(sweep().cells)


def test_shards_that_are_unlike_are_refused(tmp_path: Path) -> None:
    run_shard(tmp_path / "1", 1, 2)
    run_shard(tmp_path / "2", 2, 2, facts={"gpu": "another"})
    with pytest.raises(RecordError, match=r"another environment .*it differs in gpu; run that shard again"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "run")
    info = json.loads((tmp_path / "2" / "run.json").read_text())
    (tmp_path / "2" / "run.json").write_text(json.dumps(info | {"suite_digest": "0" * 64}))
    with pytest.raises(RecordError, match="another suite"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecordError, match="is not a run folder"):
        merge([tmp_path / "nothing"], tmp_path / "run")
    with pytest.raises(RecordError, match="holds a run already"):
        merge([tmp_path / "1"], tmp_path / "1")


def test_samples_are_taken_from_the_shard_alone(tmp_path: Path) -> None:
    run_shard(tmp_path / "1", 1, 2)
    path = tmp_path / "1" / "cells.jsonl"
    path.write_text(path.read_text().replace('"samples":"samples/', '"samples":"../../samples/'))
    with pytest.raises(RecordError, match="not where a run writes them"):
        merge([tmp_path / "1"], tmp_path / "run")


def test_the_script_is_a_shell_script_that_runs_one_shard(tmp_path: Path) -> None:
    """Run by a real shell with a python that only writes its arguments down; then once more, to go on."""
    suite = load_suite("quick")
    text = slurm.script(suite, tmp_path, 4, WORDS, ["--partition=gpu", "--time=1:00:00"])
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert directives[-2:] == ["#SBATCH --partition=gpu", "#SBATCH --time=1:00:00"]
    assert {"#SBATCH --array=1-4", "#SBATCH --exclusive", f"#SBATCH --output={tmp_path}/logs/%a.log"} <= {*directives}
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    path = slurm.write(tmp_path, text.replace(shlex.quote(sys.executable), str(python)))
    assert (tmp_path / "logs").is_dir()

    def said() -> list[str]:
        done = subprocess.run(["sh", str(path)], env={"SLURM_ARRAY_TASK_ID": "3"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    folder = f"{tmp_path}/shards/3"
    assert said() == ["-m", "d2obench", "run", "--no-progress", *WORDS, "--shard", "3/4", "--out", folder]
    Path(folder).mkdir(parents=True)
    (Path(folder) / "run.json").write_text("{}")
    assert said() == ["-m", "d2obench", "run", "--no-progress", "--resume", folder]


def test_a_gpu_suite_asks_for_gpus(tmp_path: Path) -> None:
    text = slurm.script(load_suite("quick", {"axes.device": "cuda"}), tmp_path, 1, ["quick"])
    assert "#SBATCH --gpus=1" in text
    assert "exclusive" not in text


@pytest.mark.parametrize("option", ["partition=gpu", "--wrap=x\necho", "", "--a=\x00"])
def test_an_option_that_is_none_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(UsageError, match="--sbatch=--partition=gpu"):
        slurm.script(load_suite("quick"), tmp_path, 1, ["quick"], [option])


def test_a_folder_that_sbatch_would_misread_is_refused() -> None:
    with pytest.raises(UsageError, match="choose an --out"):
        slurm.script(load_suite("quick"), Path("/a b"), 1, ["quick"])


def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def ended(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["run", "quick", "--engine", "slurm", *words])
    return int(end.value.code or 0)


def test_submit_hands_the_script_to_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f'cp "$1" {tmp_path}/given; echo Submitted batch job 7')
    out = tmp_path / "sweep"
    assert ended("--policy", "full,d2o", "--shards", "2", "--sbatch=--partition=x", "--submit", "--out", str(out)) == 0
    shown = capsys.readouterr()
    assert (tmp_path / "given").read_text() == (out / "sweep.sbatch").read_text() == shown.out
    assert "Submitted batch job 7" in shown.err
    assert f"d2obench merge {out}/shards/* --out {out}/run" in shown.err
    assert "--set=axes.policy=full,d2o" in shown.out
    assert "#SBATCH --array=1-2" in shown.out


def test_without_submit_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f"touch {tmp_path}/given")
    assert ended("--out", str(tmp_path / "sweep")) == 0
    assert not (tmp_path / "given").exists()
    assert "submit it with: sbatch" in capsys.readouterr().err


def test_a_refusal_of_sbatch_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo no such partition >&2; exit 1")
    assert ended("--submit", "--out", str(tmp_path / "sweep")) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("sweep.sbatch: no such partition")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ended("--submit", "--out", str(tmp_path / "other")) == 2
    assert "there is no sbatch here; submit it where there is one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "slurm", "--shards", "99"], "99 shards are too many"),
        (["--engine", "slurm", "--shard", "1/2"], "--shard can't be used with --engine slurm"),
        (["--engine", "ray", "--submit"], "--submit is an option of --engine slurm; add --engine slurm"),
        (["--address", "auto"], "--address is an option of --engine ray; add --engine ray"),
        (["--engine", "spark"], "unknown engine 'spark'; use --engine local, ray or slurm"),
        (["--shard", "3/2"], "can't read the shard '3/2'"),
    ],
)
def test_options_of_another_engine_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "quick", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
