"""Checkouts of other revisions in temporary git worktrees, which are removed however the gate ends; after a gate that
was killed, by the next one.

git is called with lists of arguments, never through a shell, and revisions are resolved to commits first. The user's
own checkout is not touched. Removal can't be interrupted: SIGINT and SIGTERM wait until it is done.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from d2obench.errors import UsageError
from d2obench.record import cannot_write

PREFIX = "d2obench-scratch-"
"""Of the names of temporary folders; all that bear it are locked while they are in use."""
ABANDONED_S = 60.0
"""Age from which a folder that nobody has locked is an abandoned one."""
SPACE = "free some space or set TMPDIR to another folder"
TRUNKS = ("origin/HEAD", "origin/main", "main", "origin/master", "master")
"""Branches that can be the trunk; the first that exists is taken."""


class Repository:
    """The git repository that holds ``folder``.

    Raises:
        UsageError: git is missing or ``folder`` is in no repository.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.root = Path(self.git("rev-parse", "--show-toplevel"))

    def git(self, *words: str) -> str:
        """The output of one git command, stripped."""
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), *words],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except OSError as problem:
            raise UsageError("can't run git", why=problem.strerror or str(problem), remedy="install git") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            full = full_disk(lines)
            raise UsageError(f"git {words[0]} failed", why=full or lines[-1], remedy=SPACE if full else "")
        return done.stdout.strip()

    def commit(self, revision: str) -> str:
        """The full commit id of a revision.

        Raises:
            UsageError: there is none of that name.
        """
        try:
            return self.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        except UsageError:
            self._refuse_shallow(f"the revision '{revision}'")
            raise UsageError(
                f"there is no revision '{revision}' in {self.root}",
                remedy="fetch it (in CI: fetch-depth: 0), or name another with --base",
            ) from None

    def merge_base(self) -> str:
        """The commit at which the work tree left the trunk: the merge base of HEAD and the first of TRUNKS that exists.

        Raises:
            UsageError: none of them exists.
        """
        for trunk in TRUNKS:
            try:
                return self.git("merge-base", "HEAD", self.commit(trunk))
            except UsageError:
                continue
        self._refuse_shallow("the commit to compare with")
        raise UsageError(
            "there is no trunk to compare with",
            why=f"none of {', '.join(TRUNKS)} exists here",
            remedy="name one with --base",
        )

    def _refuse_shallow(self, what: str) -> None:
        """Raises a UsageError if commits may be missing because the clone is shallow."""
        if self.git("rev-parse", "--is-shallow-repository") == "true":
            raise UsageError(
                f"{what} is not in {self.root}",
                why="the clone is shallow: it holds only the last commits",
                remedy="run git fetch --unshallow, in CI check out with fetch-depth: 0, or name a commit that is here "
                "with --base",
            )

    @property
    def dirty(self) -> bool:
        """Whether tracked files differ from HEAD."""
        return bool(self.git("status", "--porcelain", "--untracked-files=no"))

    def files(self, *options: str) -> list[str]:
        """The files that ``git ls-files`` lists with these options, relative to the root."""
        return [name for name in self.git("ls-files", "-z", *options).split("\0") if name]


def full_disk(log: Iterable[str]) -> str:
    """The shortest line of a log that says that the disk is full, or that a file can't be written, which is how git
    puts it; empty if none does."""
    words = (os.strerror(errno.ENOSPC), "unable to write file")
    return min((line.strip() for line in log if any(word in line for word in words)), key=len, default="")


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A temporary folder, which is removed however the block ends; if the process is killed, by the next gate.

    Raises:
        RecordError: it can't be made.
    """
    remove_abandoned()
    try:
        place = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{name}-"))
        handle = os.open(place, os.O_RDONLY)
    except OSError as problem:
        raise cannot_write(Path(tempfile.gettempdir()), problem, SPACE) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # until the process ends
        yield place
    finally:
        with uninterrupted():
            shutil.rmtree(place, ignore_errors=True)
            os.close(handle)


def remove_abandoned() -> None:
    """Removes the temporary folders of this user's gates that were killed. Those that are in use are locked; those that
    were made just now may not be locked yet."""
    for place in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            found = os.fstat(handle)
            if found.st_uid == os.getuid() and time.time() - found.st_ctime > ABANDONED_S:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)
        except OSError:
            continue  # in use
        finally:
            os.close(handle)


@contextmanager
def worktrees(repository: Repository, commits: dict[str, str]) -> Iterator[dict[str, Path]]:
    """Checks out each commit, by name → commit, and yields name → folder; all checkouts are removed afterwards."""
    try:
        with scratch("trees") as place:
            for name, commit in commits.items():
                repository.git("worktree", "add", "--detach", "--quiet", str(place / name), commit)
            yield {name: place / name for name in commits}
    finally:
        with uninterrupted():
            repository.git("worktree", "prune")  # git forgets the worktrees whose folder no longer exists


@contextmanager
def work_tree(repository: Repository) -> Iterator[Path]:
    """A checkout of HEAD with the changes of the work tree laid over it, untracked files included; so nothing that is
    done there touches the user's own files. Files that git ignores, and virtual environments, are left out."""
    with worktrees(repository, {"head": repository.commit("HEAD")}) as made:
        copy = made["head"]
        try:
            for name in repository.files("--modified", "--others", "--exclude-standard", "--deduplicate"):
                source = repository.root / name
                above = source.relative_to(repository.root).parents
                inside = any((repository.root / folder / "pyvenv.cfg").is_file() for folder in above)
                if inside or source.is_dir() or not os.path.lexists(source):
                    continue
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).unlink(missing_ok=True)
                shutil.copy2(source, copy / name, follow_symlinks=False)
            for name in repository.files("--deleted"):
                (copy / name).unlink(missing_ok=True)
        except OSError as problem:
            raise cannot_write(copy, problem, SPACE) from None
        yield copy


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays SIGINT and SIGTERM until the block is done. Only the main thread receives signals; others go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM, which CI sends to cancel a job, end the block as Ctrl-C does.

    Whichever comes first, later ones are ignored until the block is done, so that they don't disturb its cleaning up:
    GitHub sends SIGINT, and SIGTERM some seconds later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise KeyboardInterrupt

    heard = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, stop) for one in heard}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
