"""The command line: help that loads nothing, bad input in one line, and a run that is stopped and goes on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from runs import cell, checked
from waiting import LIMIT_S, wait_for

from d2obench import __version__
from d2obench.bridges import lm_eval
from d2obench.cli import COMMANDS, app, main
from d2obench.cli.dry_run import show_plan
from d2obench.models import Dimensions
from d2obench.record import read_run
from d2obench.run.predict import Device, predict
from d2obench.suite.definition import Timing
from d2obench.suite.grammar import show_duration

TINY = [
    "--model",
    "shape:tiny",
    "--task",
    "speed",
    "--policy",
    "full,h2o",
    "--budget",
    "0.2",
    "--shape",
    "32+12",
    "--batch",
    "2",
]


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "pandas", "numpy", "altair", "datasets", "accelerate", "huggingface_hub"}
    asked = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    code = (
        "import sys\nfrom d2obench.cli import main\n"
        f"for words in {asked!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert not end.code\n"
        f"    print('heavy:', *words, *({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("heavy:")]
    assert found == [" ".join(["heavy:", *words]) for words in asked]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = say(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: d2obench {name}" in out


def every_command() -> Iterator[tuple[str, Any]]:
    """Each command and each subcommand by its words."""
    contents = typer.main.get_command(app)
    for name in COMMANDS:
        command = contents.get_command(None, name)  # type: ignore[attr-defined]
        yield name, command
        for word, part in getattr(command, "commands", {}).items():
            yield f"{name} {word}", part


@pytest.mark.parametrize(
    ("words", "command"), [*every_command()], ids=lambda part: part if isinstance(part, str) else ""
)
def test_help_is_sentences_with_an_example_and_every_default(words: str, command: Any) -> None:
    name = words.split()[0]
    assert "Example" in command.help and f"d2obench {name}" in command.help
    assert command.help.partition("\n\n")[0].endswith(".")
    for option in command.params:
        if option.name == "help":
            continue
        text = option.help or ""
        assert text.endswith(".") and text[0].isupper() and len(text.split()) > 4, (words, option.name)
        shown = option.required or (
            option.show_default and option.default not in (None, "") and option.default is not False
        )
        assert shown or "default" in text.lower(), (words, option.name)


def test_the_help_of_all_commands_fits_one_line_each(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = say(capsys, "--help")
    assert (code, err) == (0, "")
    for name, entry in COMMANDS.items():
        assert f"{name} " in out and entry.about in out and entry.panel in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys, "--version") == (0, f"d2obench {__version__}\n", "")


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "d2obench", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"d2obench {__version__}\n"


BAD = {
    "no suite": (["run"], "which suite?; name a .toml or one of"),
    "unknown suite": (["run", "quik"], "unknown suite 'quik'"),
    "no such file": (["run", "none.toml"], "can't read the suite none.toml"),
    "unknown policy": (["run", "quick", "--policy", "d2oo"], "unknown policy 'd2oo'; did you mean 'd2o'?"),
    "unknown parameter": (["run", "quick", "--policy", "d2o(merg=kv)"], "no parameter 'merg'"),
    "broken policy": (["run", "quick", "--policy", "d2o("], "d2o("),
    "budget of 0": (["run", "quick", "--budget", "0"], "budget 0 is out of range"),
    "negative budget": (["run", "quick", "--budget", "-0.2"], "budget -0.2 is out of range"),
    "budget above 1": (["run", "quick", "--budget", "1.5"], "budget 1.5 is out of range"),
    "budget in words": (["run", "quick", "--budget", "half"], "axes.budget"),
    "broken shape": (["run", "quick", "--shape", "512"], "can't read the shape '512'"),
    "empty shape": (["run", "quick", "--shape", "0+64"], "0"),
    "batch of 0": (["run", "quick", "--batch", "0"], "can't read the batch '0'"),
    "unknown dtype": (["run", "quick", "--dtype", "float8"], "axes.dtype"),
    "unknown task": (["run", "quick", "--task", "speeed"], "unknown task 'speeed'"),
    "no rounds": (["run", "quick", "--rounds", "0"], "--rounds"),
    "a time that is too short": (["run", "quick", "--within", "1s"], "the time '1s' is too short"),
    "a time that is none": (
        ["run", "quick", "--within", "abc"],
        "can't read the time 'abc'; use a number with s",
    ),
    "a time without a unit": (["run", "quick", "--within", "90"], "can't read the time '90'"),
    "unknown decode": (["run", "quick", "--decode", "half"], "timing.decode"),
    "broken limit": (["run", "quick", "--memory-limit", "lots"], "memory limit 'lots'"),
    "broken --set": (["run", "quick", "--set", "timing.rounds"], "can't read --set 'timing.rounds'"),
    "unknown key": (["run", "quick", "--set", "timing.speed=1"], "unknown field `speed`"),
    "broken --data": (["run", "quick", "--data", "gsm8k="], "can't read --data 'gsm8k='"),
    "a text that is not there": (["run", "quick", "--data", "x.txt"], "the data for 'fidelity'"),
    "data of another task": (["run", "quick", "--data", "gsm8k=x.json"], "data is given for 'gsm8k'"),
    "data that is not there": (["run", "quick", "--task", "gsm8k", "--data", "gsm8k=x.json"], "the data for 'gsm8k'"),
    "sense asked of random weights": (["run", "quick", "--model", "shape:tiny"], "its weights are random"),
    "unknown model": (["run", "quick", "--model", "gpt5"], "unknown model 'gpt5'"),
    "unknown shape of a model": (["run", "quick", *TINY, "--model", "shape:gpt5"], "unknown shape 'gpt5'"),
    "longer than the context": (
        ["run", "quick", "--task", "fidelity", "--shape", "9000+64"],
        "longer than the context of embedded (8,192 tokens)",
    ),
    "no such device": (["run", "quick", "--device", "tpu9"], "tpu9"),
    "an out that is a file": (["run", "quick", *TINY, "--out", "a-file/run"], "can't write a-file/run"),
    "no run to go on with": (["run", "--resume", "nowhere"], "nowhere is not a run folder"),
    "axes while going on": (["run", "--resume", "nowhere", "--budget", "0.2"], "as it was started"),
    "unknown option": (["run", "quick", "--colour", "red"], "No such option: --colour"),
    "unknown command": (["rum"], "No such command 'rum'"),
    "unknown list": (["list", "colours"], "can't list 'colours'"),
    "pull of an unknown model": (["models", "pull", "gpt5"], "unknown model 'gpt5'"),
    "control characters": (["run", "a\x1b[31m\nb"], r"unknown suite 'a\x1b[31m\nb'"),
}


@pytest.mark.parametrize(("words", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], expected: str
) -> None:
    (tmp_path / "a-file").touch()
    code, out, err = say(capsys, *words)
    assert code == 2, err
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1
    assert err.startswith("d2obench: ")
    assert "internal error" not in err
    assert not (tmp_path / "d2obench-runs").exists()


@pytest.mark.parametrize("kind", ["suites", "policies", "tasks", "metrics", "models"])
def test_lists(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    known = {"suites": "quick", "policies": "d2o", "tasks": "fidelity", "metrics": "tpot_s", "models": "embedded"}
    code, out, err = say(capsys, "list", kind)
    assert (code, err) == (0, "")
    assert known[kind] in out
    code, out, _ = say(capsys, "list", kind, "--plugins")
    assert code == 0
    assert known[kind] not in out


def test_a_dry_run_shows_every_cell_and_runs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = say(capsys, "run", "quick", *TINY, "--memory-limit", "0.5", "--dry-run")
    assert (code, err) == (0, "")
    assert "speed/shape:tiny/float32/cpu/full/32+12/b2/s0" in out
    assert "h2o@0.2" in out
    assert "2 cells" in out
    assert not list(tmp_path.iterdir())


DIMENSIONS = Dimensions("llama", 2, 4, 2, 4, 16, 64, 4096, 10**6)
RATES = Device(1e6, 1e6)


@pytest.mark.parametrize(("seconds", "cut"), [(1e9, False), (1.0, True)])
def test_the_total_of_a_dry_run_is_bounded_but_holds_a_round(
    capsys: Any, monkeypatch: Any, seconds: float, cut: bool
) -> None:
    """``timing.max_seconds`` cuts the predicted time, but one round is always measured."""
    monkeypatch.setenv("COLUMNS", "120")
    cells = [cell("full"), cell("h2o", "0.2")]
    work = checked(cells, Timing(rounds=4, max_rounds=4, max_seconds=seconds))
    work = dataclasses.replace(work, models={"fake": DIMENSIONS})
    show_plan(work, lambda device, dtype: RATES)
    out = capsys.readouterr().out
    told = [predict(one, work.suite, DIMENSIONS, RATES).seconds or 0.0 for one in cells]
    total = sum(told) / 4 if cut else sum(told)
    last = next(line for line in out.splitlines() if "2 cells" in line)
    assert last.rstrip().endswith(show_duration(total))
    assert ("timing.max_seconds" in out) == cut


def test_a_dry_run_plans_without_loading_anything() -> None:
    """780 cells of five models: no worker, no torch, and the first line is there before the last cell is planned."""
    code = (
        "import sys, subprocess\nfrom d2obench.cli import main\n"
        "started = []\nsubprocess.Popen.__init__ = lambda *a, **k: started.append(a)\n"
        "try: main(['run', 'paper-throughput', '--device', 'cpu', '--dry-run'])\n"
        "except SystemExit: pass\n"
        "heavy = 'torch', 'transformers', 'pandas', 'datasets', 'scipy'\n"
        "print(started, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] []"
    assert "780 cells" in done.stdout


def test_a_run_stopped_before_its_first_record_does_not_point_to_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the environment is read: nothing can be resumed or rendered yet."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("d2obench.run.runner.LocalEngine.environment", stopped)
    code, _, err = say(capsys, "run", "quick", *TINY, "--out", "r", "--quiet")
    assert code == 130
    assert "stopped before anything was measured" in err
    assert "--resume" not in err
    assert "d2obench report" not in err


def test_a_run_is_stopped_by_ctrl_c_and_goes_on(tmp_path: Path) -> None:
    """The real worker on a tiny model: exit 130, a readable run, and --resume finishes it."""
    words = [sys.executable, "-m", "d2obench", "run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for rounds in (10, 200, 4000):  # a run that ended before it could be stopped is made longer
        shutil.rmtree("r", ignore_errors=True)
        first = [*words, "quick", *TINY, "--rounds", str(rounds), "--set", "timing.max_seconds=20", "--out", "r"]
        first += ["--set", "timing.processes=1"]
        process = subprocess.Popen(first, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        wait_for(lambda: list(tmp_path.glob("r/samples/*.json")) or process.poll() is not None)  # noqa: B023
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)
        if process.returncode:
            break
    assert process.returncode == 130, err
    assert err.endswith(
        "stopped; go on with: d2obench run --resume r\nd2obench: or look at what is there: d2obench report r\n"
    )
    assert "Traceback" not in err
    run = read_run(tmp_path / "r")
    assert len(run.missing) == 2

    done = subprocess.run(
        [*words, "--resume", "r", "-q"], capture_output=True, text=True, env=env, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "r/report.md" in done.stdout
    run = read_run(tmp_path / "r")
    assert not run.missing
    assert [cell.status for cell in run.cells] == ["ok", "ok"]
    assert run.cells[1].values["speedup"].n > 1


def test_without_the_harness_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    assert lm_eval.main() == 2
    wanted = "d2obench: this command needs lm-evaluation-harness; install it: pip install 'd2obench[lm-eval]'\n"
    assert capsys.readouterr().err == wanted


def test_the_bridge_to_the_harness_imports_nothing_heavy_before_it_is_asked_for() -> None:
    code = "import sys, d2obench.bridges.lm_eval; print({'torch', 'transformers', 'lm_eval'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
