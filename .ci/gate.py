"""The project's gate on itself: the exact and sampled figures of this tree, against what is there to compare with.

1. The committed baseline of this device class. A difference fails; the command that accepts it on purpose is printed.
2. Where there is none, or it is of another environment: the commit this tree is built on, measured here. A difference
   fails, unless the same change rewrites a baseline, which is how a difference is accepted.
3. Where there is no such commit (a first commit, a shallow clone): nothing. It says so and passes.

``python .ci/gate.py TREE CHECKOUT``: the tree to run, and the checkout with its history (the same folder, or none).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OK, REGRESSED, INCOMPARABLE = 0, 1, 2
KINDS = ("--kind", "exact", "--kind", "sampled")
COMMAND = (sys.executable, "-m", "d2obench")
BASELINES = "reports/baselines"


def main(tree: Path, checkout: Path) -> int:
    """0 where nothing is worse or nothing could be compared, else 1."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        suite = [*COMMAND, "run", "ci", "--quiet", "--out", str(place / "run")]
        if subprocess.run(suite, cwd=tree, stdout=subprocess.DEVNULL, check=False).returncode:
            return said("the suite ci did not run", failed=True)
        run = next((place / "run").rglob("run.json")).parent
        code, why = gate(place / "stored", tree, str(run))
        if code == OK:
            return said("compared with the committed baseline: nothing is worse")
        if code == REGRESSED or why is None:
            return said("compared with the committed baseline: see above", failed=True)
        print(f"gate: not compared with a baseline: {why}")
        base = parent(checkout)
        if base is None:
            return said("not compared with another commit: this one has none here (a first commit or a shallow clone)")
        code, why = gate(place / "commits", checkout, "--suite", "ci", "--base", base)
        if code == REGRESSED and git(checkout, "diff", "--name-only", base, "--", BASELINES):
            return said(f"worse than {base[:12]}, and accepted: a baseline is rewritten since")
        if code == INCOMPARABLE:
            return said(f"not compared with {base[:12]}: {why or 'see above'}")
        return said(f"compared with {base[:12]}", failed=code != OK)


def gate(output: Path, cwd: Path, *words: str) -> tuple[int, str | None]:
    """The exit code, and with INCOMPARABLE why nothing at all was compared; None where some figures were."""
    command = [*COMMAND, "gate", *words, *KINDS, "--format", "text", "--format", "json", "--output", str(output)]
    done = subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, text=True, check=False)
    print(done.stderr, end="")
    if done.returncode != INCOMPARABLE:
        return done.returncode, None
    file = output / "verdicts.json"
    if not file.is_file():  # no baseline, or a base that does not build
        return INCOMPARABLE, (done.stderr.strip().splitlines() or ["no verdict"])[-1]
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    foreign = [row["reason"] for row in rows if row["metric"] == "environment"]
    return INCOMPARABLE, "; ".join(foreign) or None


def parent(checkout: Path) -> str | None:
    """Where the tree left the trunk; on the trunk the commit before, or HEAD while something is not committed."""
    head = git(checkout, "rev-parse", "--verify", "--quiet", "HEAD")
    for trunk in ("origin/main", "main"):
        base = git(checkout, "merge-base", "HEAD", trunk) if head else None
        if base and base != head:
            return base
    if head and git(checkout, "status", "--porcelain", "--untracked-files=no"):
        return head
    return git(checkout, "rev-parse", "--verify", "--quiet", "HEAD^") if head else None


def git(checkout: Path, *words: str) -> str | None:
    """The output of one git command; None where it fails, or there is no repository of this folder's own."""
    if not (checkout / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def said(words: str, *, failed: bool = False) -> int:
    """Prints how it ended; the exit code."""
    print(f"gate: {words}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*(Path(word).resolve() for word in sys.argv[1:3])))
