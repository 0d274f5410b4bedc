"""``d2obench gate --suite … --base REV --head REV``: two revisions measured in turns, on the same machine.

    base, head ──► worktrees ──► one worker each ──► counts and quality cells once, both sides at the same time
                   (and wheels)                  ├─► speed cells in ABBA rounds (8 → 16 → 32), one side at a time
                                                 └─► a timed REGRESSED is measured once more by fresh processes

The base is measured again instead of being remembered. Timed figures are therefore comparable, and nothing about the
machine has to be stored. A timed regression has to be found twice: if the second sitting does not find it again, the
figure is INCONCLUSIVE. If no timed figure is asked for, two rounds show whether the exact figures really are exact. No
worker and no worktree remains, however the gate ends.

The repository is d2obench's own, or any other: a package with a policy, a task or a model, or a list of pinned
libraries. What each side then runs in is the matter of :mod:`d2obench.gate.environments`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec

from d2obench import __version__
from d2obench.errors import SuiteError
from d2obench.gate.arm import Arm
from d2obench.gate.baseline import differences, settings_of
from d2obench.gate.environments import mode_of
from d2obench.gate.environments import places as built
from d2obench.gate.sides import Watch, compare_arms
from d2obench.gate.verdict import KINDS, Row, Verdict, Verdicts, gather
from d2obench.gate.worktree import Repository, terminable, work_tree, worktrees
from d2obench.metric import METRICS
from d2obench.record import dump
from d2obench.run.run_folder import now
from d2obench.suite.definition import Suite, load_suite, shipped

WORK_TREE = "work tree"


class Side(NamedTuple):
    """What one side runs: a revision, or the work tree as it is if ``revision`` is None, and the interpreter."""

    revision: str | None
    python: str = sys.executable


def gate(
    suite_name: str,
    overrides: Mapping[str, str],
    base: Side,
    head: Side,
    *,
    folder: Path,
    watch: Watch,
    kinds: Collection[str] = KINDS,
) -> Verdicts:
    """Compares two revisions of the repository that contains ``folder``.

    Args:
        suite_name: a suite that both revisions have, or the path of a file that both sides run.
        overrides: keys of the suite that were set on the command line.
        base: without a revision, it is the merge base of HEAD and the trunk.
        head: without a revision, it is the work tree.
        folder: any folder of the repository.
        watch: receives a line on what is going on.
        kinds: of figures to compare; what only figures of other kinds need is not measured.

    Raises:
        UsageError: there is no repository or no such revision, or nothing can be compared.
        WorkerError: the code of a side can't be imported; its log is on stderr.
    """
    # 1. the commits of both sides; a side without a commit is the work tree
    repository = Repository(folder)
    commits, names = revisions(repository, base, head)
    with terminable(), ExitStack() as stack:
        # 2. checkouts, and the suite as each of them has it
        watch("checking out")
        roots = {"head": repository.root, **stack.enter_context(worktrees(repository, commits))}
        own = mode_of("auto", roots["head"]) == "none"
        suites, notes = suites_in(roots, suite_name, overrides, own=own)
        suites = {side: asked(suite, kinds) for side, suite in suites.items()}
        suite = suites["head"]
        title = f"gate {suite.name}"
        apart = differences(settings_of(suites["base"]), settings_of(suite))
        if apart:
            row = Row("*", "suite", Verdict.INCOMPARABLE, "exact", reason=f"the suites differ: {', '.join(apart)}")
            return gather(title, names["base"], names["head"], [row])
        # 3. what both sides are imported from
        mode = mode_of(suite.gate.environment, roots["head"])
        if mode != "none" and "head" not in commits:
            roots["head"] = stack.enter_context(work_tree(repository))
        pythons = {"base": base.python, "head": head.python}
        places = stack.enter_context(built(roots, pythons, mode, watch))
        # 4. a worker for each side, and the comparison
        arms = {
            side: stack.enter_context(Arm(side, place.code, suite, place.python, paths=place.paths))
            for side, place in ((side, places[side]) for side in ("base", "head"))
        }
        rows, more, about = compare_arms(arms, suite, watch, kinds, libraries_may_differ=mode != "none")
    changed = "" if head.revision or not repository.dirty else "+dirty"
    if commits["base"] == repository.commit(head.revision or "HEAD") and not changed:
        more.append("base and head are the same code: what differs is noise")
    about |= {
        "when": now(),
        "suite": suite.name,
        "settings": hashlib.sha256(dump(settings_of(suite))).hexdigest()[:16],
        "commit": repository.commit(head.revision or "HEAD") + changed,
        "d2obench": __version__,
    }
    return gather(title, names["base"], names["head"], rows, [*notes, *more], about=about)


def revisions(repository: Repository, base: Side, head: Side) -> tuple[dict[str, str], dict[str, str]]:
    """The commits to check out, and what both sides are called: by side. A head that is the work tree has no commit.

    Raises:
        UsageError: there is no such revision.
    """
    commits = {"base": repository.commit(base.revision) if base.revision else repository.merge_base()}
    if head.revision:
        commits["head"] = repository.commit(head.revision)
    return commits, {side: commits[side][:12] if side in commits else WORK_TREE for side in ("base", "head")}


def suites_in(
    roots: Mapping[str, Path], name: str, overrides: Mapping[str, str], *, own: bool
) -> tuple[dict[str, Suite], list[str]]:
    """The suite as each side has it, and notes for the reader.

    In another repository than d2obench's own, a suite that only the head has is used for both sides, because the commit
    that introduces the gate needs one, and a suite that ships with d2obench can be named as well.

    Raises:
        SuiteError: there is no such suite, or this version can't read it.
    """
    if own or _is_absolute(name):
        return {side: suite_in(root, name, overrides) for side, root in roots.items()}, []
    if not _file(roots["head"], name).is_file() and name in shipped():
        return dict.fromkeys(roots, load_suite(name, overrides)), []
    head = suite_in(roots["head"], name, overrides)
    if _file(roots["base"], name).is_file():
        return {"base": suite_in(roots["base"], name, overrides), "head": head}, []
    return dict.fromkeys(roots, head), [f"the base has no {name}: the head's suite was used for both sides"]


def suite_in(place: Path, name: str, overrides: Mapping[str, str]) -> Suite:
    """The suite as a checkout has it. An absolute path is the same file for both sides.

    Raises:
        SuiteError: the checkout has no such suite, or this version can't read it.
    """
    if _is_absolute(name):
        return load_suite(name, overrides)
    file = _file(place, name)
    if not file.is_file():
        raise SuiteError(
            f"{place} has no suite '{name}'",
            why=f"it has no file {file.relative_to(place)}",
            remedy="choose a base that has it, give the path of a file, or write one with d2obench gate init",
        )
    return load_suite(str(file), overrides)


def _is_absolute(name: str) -> bool:
    return name.endswith(".toml") and Path(name).is_absolute()


def _file(place: Path, name: str) -> Path:
    return place / (name if name.endswith(".toml") else f"suites/{name}.toml")


def asked(suite: Suite, kinds: Collection[str]) -> Suite:
    """The suite with only those timed figures that are of these kinds. If none is left, two rounds are measured."""
    metrics = tuple(name for name in suite.gate.metrics if name not in METRICS or METRICS[name].kind in kinds)
    gate_ = msgspec.structs.replace(suite.gate, metrics=metrics, looks=suite.gate.looks if metrics else (2,))
    return msgspec.structs.replace(suite, gate=gate_)
