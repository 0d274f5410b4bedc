"""How gates end that are disturbed: two at once, cancelled jobs, full disks. Whole gates with real processes, signals
and file systems, in a throw-away repository; each says in one line what happened, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_checkout import Checkout
from repository import TEMPLATE, Plugin
from waiting import LIMIT_S, is_dead, wait_for

from d2obench.cli import main
from d2obench.errors import UsageError, WorkerError
from d2obench.gate import environments, worktree
from d2obench.gate.environments import places
from d2obench.gate.gate import Side, gate
from d2obench.gate.verdict import Verdict
from d2obench.gate.worktree import Repository, scratch, terminable

CODE = "import sys; from d2obench.cli import main; main(sys.argv[1:])"
FULL = "No space left on device"


class Machine:
    """A repository, and the folders that the gates on it share: for temporary files, for the cache, and for results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary, self.cache, self.small = (folder / name for name in ("temporary", "cache", "small"))
        for place in (self.temporary, self.cache, self.small):
            place.mkdir()
        self.repo = Checkout(folder / "repo", self.temporary)
        self.repo.commit()
        self.began: list[subprocess.Popen[str]] = []

    def start(self, *words: str, before: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
        """Starts ``d2obench gate`` on the repository, behind the words ``before``."""
        known = {
            **os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "FAKE_SCRATCH": str(self.temporary),
            "TMPDIR": str(self.temporary), "D2OBENCH_CACHE": str(self.cache), **env,
        }  # fmt: skip
        command = [*before, sys.executable, "-P", "-c", CODE, "gate", "--suite", "fake", *words]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=self.repo.root, env=known, text=True, stdout=pipe, stderr=pipe)
        self.began.append(process)
        return process

    def hang(self) -> subprocess.Popen[str]:
        """Starts a gate whose head measures until there is a file ``go``; it does so when this returns."""
        self.repo.work(hang=True)
        first = self.start()
        wait_for((self.temporary / "hanging").exists, alive=lambda: first.poll() is None)
        return first

    def waiting(self) -> subprocess.Popen[str]:
        """Starts a gate of what is committed; when this returns, it waits for the one that measures."""
        second = self.start("--base", "HEAD", "--head", "HEAD")
        said = until(second, "another gate measures on this machine")
        assert f"(pid {self.began[0].pid}): waiting for it" in said
        return second

    def check(self) -> None:
        """Nothing is left: no process, no worktree, no temporary file, and no lock that is held."""
        assert all(process.poll() is not None for process in self.began)
        assert self.repo.workers_alive() == []
        assert self.repo.worktrees == 1
        assert self.repo.git("worktree", "prune", "--dry-run", "--verbose") == ""
        assert not list(self.temporary.glob("d2obench-*"))


def until(process: subprocess.Popen[str], words: str) -> str:
    """The first line on stderr that has these words."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"the gate ended without saying '{words}'")


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code, and the last line on stderr."""
    _, said = process.communicate(timeout=LIMIT_S)
    assert "Traceback" not in said
    return process.returncode, (said.splitlines() or [""])[-1]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for process in made.began:
        process.kill()
    made.check()


def test_two_gates_of_one_repository_measure_one_after_the_other(machine):
    first = machine.hang()
    second = machine.waiting()
    assert machine.repo.worktrees == 4  # the user's own, the base of the first, both sides of the second
    assert first.poll() is None and second.poll() is None
    (machine.temporary / "go").touch()
    assert end(first)[0] == 0
    assert end(second)[0] == 0


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_cancelled_while_it_waits_leaves_the_other_alone(machine, sign):
    first = machine.hang()
    second = machine.waiting()
    workers = set(machine.repo.workers_alive())
    second.send_signal(sign)
    assert end(second)[0] == 130
    assert len(machine.repo.workers_alive()) == len(workers) - 2
    assert machine.repo.worktrees == 2
    (machine.temporary / "go").touch()
    assert end(first)[0] == 0


def test_signals_that_follow_the_first_do_not_disturb_the_cleaning_up(machine):
    """GitHub cancels a job by SIGINT and then SIGTERM."""
    first = machine.hang()
    for sign in (signal.SIGINT, *[signal.SIGTERM, signal.SIGINT] * 5):
        first.send_signal(sign)
    assert end(first)[0] == 130
    machine.check()


def test_after_the_first_signal_others_are_ignored_until_everything_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    cleaned = []

    def stopped() -> None:
        with terminable(), scratch("test"):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                cleaned.append(True)

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell without one ignores it
        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert cleaned and not list(tmp_path.iterdir())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with terminable():
            signal.raise_signal(signal.SIGINT)  # whoever started us wants it to be ignored
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_what_a_killed_gate_left_is_removed_by_the_next_one(machine, monkeypatch):
    """Not what another gate uses, and not what is not the gates' own."""
    killed = machine.hang()
    (machine.temporary / "d2obench-other").mkdir()
    monkeypatch.setattr(worktree, "ABANDONED_S", -1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(machine.temporary))
    worktree.remove_abandoned()
    assert len(list(machine.temporary.glob("d2obench-scratch-*"))) == 1, "it is in use"
    killed.kill()
    (machine.temporary / "go").touch()  # its worker ends
    killed.communicate()
    wait_for(lambda: machine.repo.workers_alive() == [], alive=lambda: True)
    with worktree.worktrees(Repository(machine.repo.root), {"head": machine.repo.git("rev-parse", "HEAD")}):
        assert len(list(machine.temporary.glob("d2obench-scratch-*"))) == 1, "its own"
    (machine.temporary / "d2obench-other").rmdir()
    machine.check()


def test_a_job_that_is_cancelled_during_a_build_ends_the_build(tmp_path, monkeypatch):
    """The build is a script that waits; it ends with the gate that started it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        f"open({str(tmp_path / 'new')!r}, 'w').write(str(os.getpid())); os.rename({str(tmp_path / 'new')!r}, "
        f"{str(tmp_path / 'pid')!r})\ntime.sleep(900)\n"
    )
    code = (
        "import sys; from d2obench.gate import environments as e; from d2obench.cli import main\n"
        f"e._installer = lambda *given, **more: [sys.executable, {str(script)!r}]\n"
        "main(['gate', '--suite', 'gate.toml', '--base', 'HEAD'])"
    )
    plugin = Plugin(tmp_path / "plugin")
    (tmp_path / "temporary").mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], cwd=plugin.root, env=env, stderr=subprocess.PIPE, text=True
    )
    wait_for((tmp_path / "pid").exists, alive=lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130
    wait_for(lambda: is_dead(int((tmp_path / "pid").read_text())))
    assert plugin.leftovers == []
    assert not list((tmp_path / "temporary").glob("d2obench-*"))


def small(machine: Machine, kib: int) -> tuple[str, ...]:
    """The words in front of a command that give it a file system of so many KiB in the folder ``small``."""
    own = ("unshare", "--user", "--map-root-user", "--mount")
    if not shutil.which("unshare") or subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a file system of his own")
    mount = 'mount -t tmpfs -o size="$1"k none "$0" && shift && exec "$@"'
    return (*own, "sh", "-c", mount, str(machine.small), str(kib))


@pytest.mark.parametrize("kib", [4, 64])
def test_a_disk_that_is_full_when_revisions_are_checked_out(machine, kib):
    (machine.repo.root / "large.bin").write_bytes(bytes(range(256)) * 400)
    machine.repo.commit()
    code, said = end(machine.start(before=small(machine, kib), TMPDIR=str(machine.small)))
    assert code == 2
    assert said.startswith("d2obench: git worktree failed: ")
    assert FULL in said or "unable to write" in said
    assert said.endswith("free some space or set TMPDIR to another folder")


def test_a_disk_that_is_full_when_the_results_are_written(machine):
    words = ("--format", "json", "--output", str(machine.small / "out"))
    code, said = end(machine.start(*words, before=small(machine, 4)))
    assert code == 2
    assert said.startswith("d2obench: can't write ") and "verdicts.json" in said
    assert FULL in said


def test_a_full_cache_does_not_matter_to_a_lock(machine):
    assert end(machine.start(before=small(machine, 4), D2OBENCH_CACHE=str(machine.small)))[0] == 0


def test_a_disk_that_is_full_at_any_other_moment_is_no_internal_error(monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, FULL, "/tmp/x")

    monkeypatch.setattr("d2obench.gate.gate.gate", full)
    with pytest.raises(SystemExit) as ended:
        main(["gate", "--suite", "ci"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"d2obench: can't write /tmp/x: {FULL}; free some space\n"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "Traceback\nOSError: [Errno 28] No space left on device: 'x'\nerror: failed to build",
            "left on device: 'x'; free",
        ),
        ("note\nerror: failed to build", "error: failed to build; see its log above"),
        ("", "exit code 1; see its log above"),
    ],
)
def test_a_build_that_fails_names_its_cause(tmp_path, monkeypatch, log, said):
    script = f"import sys; sys.exit({log!r} or 1)"
    monkeypatch.setattr(environments, "_installer", lambda *given, **more: [sys.executable, "-c", script])
    with (
        pytest.raises(WorkerError, match="the head does not build") as problem,
        places({"head": TEMPLATE / "repository"}, {"head": sys.executable}, "shared", str),
    ):
        pass
    assert said in str(problem.value)


def test_a_base_without_d2obench_is_one_clear_line(machine, monkeypatch):
    monkeypatch.setenv("FAKE_SCRATCH", str(machine.temporary))
    machine.repo.git("rm", "-rqf", "d2obench")
    bare = machine.repo.commit()
    machine.repo.git("checkout", "-q", "HEAD~1", "--", "d2obench")
    code, said = end(machine.start("--base", bare))
    assert code == 2
    assert said.startswith(("d2obench: the base does not build: ModuleNotFoundError", "d2obench: the base would run"))


def test_a_detached_head_is_compared_with_where_it_left_the_trunk(machine, monkeypatch):
    """As CI checks it out: no branch, and the trunk only as a remote one."""
    machine.repo.git("checkout", "-q", "--detach")
    machine.repo.commit(kv_bytes=5000)
    machine.repo.git("update-ref", "refs/remotes/origin/main", "main")
    machine.repo.git("branch", "-q", "-D", "main")
    monkeypatch.setenv("FAKE_SCRATCH", str(machine.temporary))
    found = gate("fake", {}, Side(None), Side("HEAD"), folder=machine.repo.root, watch=str, kinds=("exact",))
    assert {row.metric for row in found.of(Verdict.REGRESSED)} == {"kv_bytes", "kv_prompt_bytes"}
    assert found.base == machine.repo.git("rev-parse", "--short=12", "origin/main")


def test_a_shallow_clone_says_what_to_fetch_and_leaves_nothing(machine, tmp_path):
    first = machine.repo.git("rev-parse", "HEAD")
    machine.repo.commit()
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{machine.repo.root}", str(clone)], check=True)
    with pytest.raises(UsageError, match=r"the clone is shallow.*fetch-depth: 0"):
        gate("fake", {}, Side(first), Side(None), folder=clone, watch=str)
    assert Repository(clone).git("worktree", "list").count("\n") == 0
