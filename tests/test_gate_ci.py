"""``.ci/gate.py``, which picks what this tree is compared with: a scripted ``d2obench``, real git repositories."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci/gate.py"
FAKE = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
if words[0] == "run":
    out = Path(words[words.index("--out") + 1])
    out.mkdir(parents=True)
    (out / "run.json").write_text("{}")
    sys.exit(STORY["run"])
code, row = STORY["commits" if "--suite" in words else "stored"]
print("a word", file=sys.stderr)
if row:
    folder = Path(words[words.index("--output") + 1])
    folder.mkdir(parents=True)
    (folder / "verdicts.json").write_text(json.dumps({"rows": [{"metric": row, "reason": "torch: 2.1 → 2.2"}]}))
sys.exit(code)
"""
MISSING, FOREIGN, STALE = (2, ""), (2, "environment"), (2, "suite")


@pytest.fixture
def ci() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_gate", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tree:
    """A repository with one commit on its trunk for each ``commit``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *words: str) -> str:
        command = ["git", "-C", str(self.root), "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, path: str, text: str) -> str:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "x")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


def go(ci: ModuleType, tree: Path, stored: object, commits: object = MISSING, run: int = 0) -> int:
    story = {"run": run, "stored": stored, "commits": commits}
    script = tree.parent / "fake.py"
    script.write_text(f"STORY = json.loads({json.dumps(story)!r})".join(["import json\n", FAKE]))
    ci.COMMAND = (sys.executable, str(script))
    return ci.main(tree, tree)


@pytest.mark.parametrize(("stored", "failed"), [((0, "kl"), 0), ((1, "kl"), 1), (STALE, 1), ((2, "kl"), 1)])
def test_a_committed_baseline_of_this_environment_decides(ci, tree, stored, failed, capfd):
    tree.commit("a", "1")
    tree.commit("a", "2")
    assert go(ci, tree.root, stored, commits=(1, "kl")) == failed
    assert "committed baseline" in capfd.readouterr().out


@pytest.mark.parametrize("stored", [MISSING, FOREIGN])
@pytest.mark.parametrize(
    ("commits", "failed"), [((0, "kl"), 0), ((1, "kl"), 1), (FOREIGN, 0), (STALE, 0), (MISSING, 0)]
)
def test_without_one_the_commit_before_decides(ci, tree, stored, commits, failed, capfd):
    before = tree.commit("a", "1")
    tree.commit("a", "2")
    assert go(ci, tree.root, stored, commits) == failed
    said = capfd.readouterr().out
    assert before[:12] in said
    assert "not compared with a baseline: " + ("a word" if stored is MISSING else "torch: 2.1 → 2.2") in said


def test_a_change_that_rewrites_a_baseline_is_accepted(ci, tree, capfd):
    tree.commit("reports/baselines/ci/cpu.json", "1")
    tree.commit("reports/baselines/ci/cpu.json", "2")
    assert go(ci, tree.root, FOREIGN, (1, "kl")) == 0
    assert "accepted" in capfd.readouterr().out


def test_a_first_commit_and_a_tree_without_history_pass_and_say_so(ci, tree, capfd):
    tree.commit("a", "1")
    assert go(ci, tree.root, FOREIGN, (1, "kl")) == 0
    bare = tree.root / "bare"
    bare.mkdir()
    assert go(ci, bare, MISSING, (1, "kl")) == 0  # not the repository that the folder happens to lie in
    assert capfd.readouterr().out.count("not compared with another commit") == 2


def test_a_shallow_clone_passes_and_says_so(ci, tree, tmp_path, capfd):
    tree.commit("a", "1")
    tree.commit("a", "2")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{tree.root}", str(clone)], check=True)
    assert go(ci, clone, MISSING, (1, "kl")) == 0
    assert "shallow clone" in capfd.readouterr().out


def test_the_base_is_where_the_tree_left_the_trunk(ci, tree):
    first, second = tree.commit("a", "1"), tree.commit("a", "2")
    assert ci.parent(tree.root) == first
    (tree.root / "a").write_text("not committed")
    assert ci.parent(tree.root) == second
    tree.git("checkout", "-q", "-b", "topic")
    tree.commit("b", "1")
    tree.commit("b", "2")
    assert ci.parent(tree.root) == second


def test_a_suite_that_does_not_run_fails(ci, tree, capfd):
    tree.commit("a", "1")
    assert go(ci, tree.root, (0, "kl"), run=2) == 1
    assert "did not run" in capfd.readouterr().out
