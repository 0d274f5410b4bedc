"""The template repository of a policy plug-in as a git repository, for tests that gate it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TEMPLATE = Path(__file__).parent / "template_plugin"


class Plugin:
    """The repository, with one commit; ``change`` lays the files of one of its changes over the work tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(TEMPLATE / "repository", root)
        self.git("init", "-q", "-b", "main")
        self.commit()

    def change(self, name: str) -> None:
        shutil.copytree(TEMPLATE / "changes" / name, self.root, dirs_exist_ok=True)

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "x")
        return self.git("rev-parse", "HEAD")

    def git(self, *words: str) -> str:
        done = subprocess.run(["git", "-C", str(self.root), *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    @property
    def leftovers(self) -> list[str]:
        """Worktrees beside the user's own, and files that nobody asked for."""
        trees = self.git("worktree", "list").splitlines()[1:]
        return [*trees, *self.git("status", "--porcelain", "--ignored").splitlines()]
