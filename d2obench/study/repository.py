"""How often a whole gate of a repository is right: known changes, each gated many times, beside other load if asked.

The folder has ``repository/``, with a ``gate.toml``; ``changes.toml``, with a table for each change that says what a
gate has to find; and ``changes/NAME/``, whose files are laid over the repository. A gate is *right* if it finds that;
it may be *undecided* about a time; anything else is *wrong*: a false OK, a false REGRESSED, or an error.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from d2obench.errors import D2OBenchError, UsageError
from d2obench.gate.gate import Side, gate
from d2obench.gate.verdict import Verdict, Verdicts
from d2obench.gate.worktree import terminable
from d2obench.measure.environment import fingerprint
from d2obench.metric import METRICS
from d2obench.record import write_atomic
from d2obench.stats.intervals import proportion
from d2obench.study.gate import RECORD, another, burning

Word = Literal["right", "undecided", "wrong"]
SUITE = "gate.toml"


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a gate has to say of a change: ``verdict`` is OK, REGRESSED, or ``error`` for one that must stop; ``metric``
    is the figure that has to be REGRESSED, and ``only`` whether no other one may be."""

    about: str
    verdict: Literal["OK", "REGRESSED", "error"]
    metric: str = ""
    only: bool = False


class Trial(msgspec.Struct, frozen=True):
    """One gate: the change, what it found, in words, whether that is right, how many seconds it took, and the commit of
    d2obench."""

    change: str
    word: Word
    found: str
    seconds: float
    commit: str


class Study(msgspec.Struct, frozen=True):
    """The whole study; ``load`` says whether another process kept a core busy, ``note`` in words what else ran."""

    changes: dict[str, Change]
    load: bool
    environment: dict[str, str]
    trials: tuple[Trial, ...]
    note: str = ""
    schema: int = 1

    def counts(self, change: str) -> Counter[Word]:
        """How many gates of a change were right, undecided and wrong."""
        return Counter(trial.word for trial in self.trials if trial.change == change)


def read_changes(folder: Path) -> dict[str, Change]:
    """The changes of a folder by name.

    Raises:
        UsageError: the folder has no repository or no changes that can be read.
    """
    try:
        table = tomllib.loads((folder / "changes.toml").read_text("utf-8"))
        found = msgspec.convert(table, dict[str, Change])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as problem:
        raise UsageError(f"{folder} has no changes to study", why=str(problem)) from None
    if not (folder / "repository" / SUITE).is_file():
        raise UsageError(f"{folder}/repository has no {SUITE}", remedy="write one with d2obench gate init")
    return found


def judge(change: Change, found: Verdicts | D2OBenchError) -> Word:
    """Whether a gate's result is right for a change."""
    if isinstance(found, D2OBenchError) or found.of(Verdict.INCOMPARABLE):
        return "right" if change.verdict == "error" else "wrong"
    regressed, open_ = ({row.metric for row in found.of(one)} for one in (Verdict.REGRESSED, Verdict.INCONCLUSIVE))
    if change.verdict == "OK":
        return "wrong" if regressed else "undecided" if open_ else "right"
    if change.verdict == "error" or (change.only and regressed - {change.metric}):
        return "wrong"
    if change.metric in regressed:
        return "right"
    metric = METRICS.get(change.metric)
    noisy = metric is not None and metric.kind in ("timed", "ratio", "sampled")
    return "undecided" if noisy and change.metric in open_ else "wrong"


def study(
    folder: Path,
    *,
    gates: int = 20,
    burn: bool = False,
    only: Iterable[str] = (),
    known: Study | None = None,
    watch: Callable[[str], None] = print,
    keep: Callable[[Study], None] = lambda found: None,
) -> Study:
    """Gates every change ``gates`` times. A gate of the template repository takes about a minute.

    Args:
        folder: see above.
        gates: of each change.
        burn: whether another process keeps one core busy meanwhile.
        only: names of changes; all by default.
        known: a part of this study that was made before, whose gates count.
        watch: receives a line after each gate.
        keep: receives what has been found after each gate.

    Raises:
        UsageError: the folder has nothing to study, or ``known`` is of other changes, of another load, or of another
            machine.
    """
    changes = read_changes(folder)
    chosen = [name for name in changes if not set(only) or name in set(only)]
    if known is not None and (known.changes, known.load) != (changes, burn):
        raise another("its changes or its load are others")
    trials: list[Trial] = [*known.trials] if known else []
    facts: dict[str, str] = {**known.environment} if known else {}
    before = Counter(trial.change for trial in trials)
    commit, note = _own_commit(), known.note if known else ""
    with terminable(), tempfile.TemporaryDirectory(prefix="d2obench-study-") as scratch, burning(burn):
        root = Path(scratch) / "repository"
        _commit(folder / "repository", root)
        for number in range(gates):  # the changes take turns, so that the hour does not favour one
            for name in chosen:
                if number < before[name]:
                    continue
                _git(root, "reset", "-q", "--hard")
                _git(root, "clean", "-q", "-f", "-d", "-x")
                shutil.copytree(folder / "changes" / name, root, dirs_exist_ok=True)
                since = time.monotonic()
                found = _gate(root)
                if isinstance(found, Verdicts):
                    mine = {key: value for key, value in found.about.items() if key not in ("when", "commit")}
                    if known is not None and facts and mine != facts:
                        raise another("it was made with another machine, suite or library")
                    facts = mine
                word = judge(changes[name], found)
                said = found.summary if isinstance(found, Verdicts) else str(found)
                trials.append(Trial(name, word, said, round(time.monotonic() - since, 1), commit))
                watch(f"{name}, gate {number + 1} of {gates}: {word}: {said}")
                keep(Study(changes, burn, facts, tuple(trials), note))
    return Study(changes, burn, facts, tuple(trials), note)


def _own_commit() -> str:
    """The commit of this d2obench; ``unknown`` where it is in no checkout."""
    own = fingerprint()
    return str(own["commit"] or "unknown")[:12] + ("+dirty" if own["dirty"] else "")


def _gate(root: Path) -> Verdicts | D2OBenchError:
    try:
        return gate(SUITE, {}, Side("HEAD"), Side(None), folder=root, watch=lambda words: None)
    except D2OBenchError as problem:
        return problem


def _commit(source: Path, root: Path) -> None:
    shutil.copytree(source, root)
    _git(root, "init", "-q", "-b", "main")
    _git(root, "add", "-A")
    _git(root, "-c", "user.name=study", "-c", "user.email=study@localhost", "commit", "-q", "-m", "base")


def _git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, stdin=subprocess.DEVNULL)


def write_study(folder: Path, found: Study) -> None:
    """Writes ``study.json`` and ``README.md``."""
    text = json.dumps(msgspec.to_builtins(found), sort_keys=True, indent=1, ensure_ascii=False)
    write_atomic(folder / RECORD, text.encode() + b"\n")
    write_atomic(folder / "README.md", as_markdown(found).encode())


def as_markdown(found: Study) -> str:
    """The text of ``README.md``: what was tried, on which machine, and how often a gate was right."""
    facts: Mapping[str, str] = found.environment
    others = "another process kept one core busy" if found.load else "nothing else was started"
    others += f"; {found.note}" if found.note else ""
    seconds = [trial.seconds for trial in found.trials]
    commits = ", ".join(dict.fromkeys(trial.commit for trial in found.trials))
    lines = [
        "# Whole gates of a repository, tried\n",
        f"{facts.get('cpu', 'unknown processor')}, torch {facts.get('torch', '?')}, commit {commits}; {others}."
        f" {len(seconds)} gates took {sum(seconds):.0f} s. Undecided: the gate says of the figure, or of any"
        " figure where nothing is changed, that it does not know. Wrong: a false OK, a false REGRESSED, or an"
        " error.\n",
        "| change | must be | gates | right | undecided | wrong | share wrong (95 %) |\n"
        "|---|---|--:|--:|--:|--:|--:|\n" + "".join(_row(found, name) for name in found.changes) + _row(found, ""),
        "The shares have exact binomial intervals. `study.json` holds every gate. Made by `d2obench doctor"
        f" --study-repository FOLDER{' --load' if found.load else ''} --output FOLDER`; the same command goes on where"
        " it was stopped.\n",
    ]
    return "\n".join(lines)


def _row(found: Study, name: str) -> str:
    """The row of a change, or of all of them together if there is no name."""
    counts = found.counts(name) if name else Counter(trial.word for trial in found.trials)
    total = sum(counts.values())
    if not total:
        return ""
    share = proportion(counts["wrong"], total)
    what, must = "all", ""
    if name:
        change = found.changes[name]
        what = f"{name}: {change.about}"
        must = f"{change.verdict} in {change.metric}" if change.metric else change.verdict
    return (
        f"| {what} | {must} | {total} | {counts['right']} | {counts['undecided']} | {counts['wrong']} "
        f"| {share.value:.1%} ({share.lo:.1%} … {share.hi:.1%}) |\n"
    )
