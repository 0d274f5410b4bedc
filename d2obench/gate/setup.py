"""What ``d2obench gate init`` writes: a suite that fits the noise of this machine, and a workflow for CI.

The first line of each file has a digest of what follows it. A file whose digest is still right was not changed by
anybody and may be written anew; any other file is left alone.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from d2obench import __version__
from d2obench.errors import UsageError
from d2obench.record import write_atomic

SUITE = Path("gate.toml")
CI = Literal["github", "gitlab", "none"]
LIMITS = (0.05, 0.10)
"""Tolerated slowdowns to choose from: the first at which the machine can tell as much again from noise."""
LOOKS = ((8, 16), (8, 16, 32))
_STAMP = re.compile(r"# Written by d2obench gate init \(([0-9a-f]{12})\)[^\n]*\n")
_WORDS = "Change it as you like: a changed file is left alone."


class Size(NamedTuple):
    """How a suite is sized for a machine.

    Args:
        looks: numbers of rounds after which times are judged.
        limit: the tolerated slowdown.
        detects: the slowdown that is found 4 times of 5 with the most rounds.
        noisy: whether the machine can't tell 10 % from noise, so that only ratios within a side are judged.
    """

    looks: tuple[int, ...]
    limit: float
    detects: float
    noisy: bool


def size_for(detectable: Mapping[int, float]) -> Size:
    """The size of a suite for a machine on which changes of ``detectable`` (number of rounds → share) are told from
    noise (:func:`d2obench.measure.checkup.measure_noise`)."""
    for limit in LIMITS:
        for looks in LOOKS:
            if detectable[looks[-1]] <= limit:
                return Size(looks, limit, _beyond(limit, detectable[looks[-1]]), noisy=False)
    looks, limit = LOOKS[-1], LIMITS[-1]
    return Size(looks, limit, _beyond(limit, detectable[looks[-1]]), noisy=True)


def _beyond(limit: float, change: float) -> float:
    return (1 + limit) * (1 + change) - 1


def metrics_of(size: Size) -> tuple[str, ...]:
    """The timed figures that a suite of this size judges.

    On a noisy machine they are only ratios to a policy that took turns with it in the same rounds; both sides have
    such ratios, in which a busy machine cancels.
    """
    return ("speedup", "to_streaming") if size.noisy else ("ttft_s", "tpot_s", "speedup")


def policies_of(folder: Path) -> list[str]:
    """The policies that the package in ``folder`` offers under ``d2obench.policies``, as its pyproject.toml says."""
    try:
        table = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
        points = table.get("project", {}).get("entry-points", {}).get("d2obench.policies", {})
        return [str(name) for name in points]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, AttributeError):
        return []


def suite_text(size: Size, policies: Sequence[str], model: str, device: str) -> str:
    """The suite. Without a ``model``, speed is measured on a tiny one, where the policy's own work shows, and fidelity
    on the embedded one."""
    names = list(dict.fromkeys(["full", "streaming", *policies]))
    exclude = (
        '\nexclude = [\n  { task = "speed", model = "embedded" },\n'
        '  { task = "fidelity(documents=8)", model = "shape:tiny" },\n]\n'
    )
    tolerance = "\n".join(f"{name} = {size.limit}" for name in metrics_of(size))
    return _filled(
        "gate.toml",
        EXCLUDE="" if model else exclude,
        POLICIES=_quoted(names),
        MODELS=_quoted([model] if model else ["shape:tiny", "embedded"]),
        DEVICE=device,
        LOOKS=", ".join(map(str, size.looks)),
        METRICS=_quoted(metrics_of(size)),
        TOLERANCE=tolerance,
    )


def workflow_files(ci: CI, action: str, package: str) -> dict[Path, str]:
    """The files of a CI service, by path.

    Args:
        ci: the service.
        action: ``OWNER/REPOSITORY`` on GitHub that holds the actions of d2obench.
        package: what pip installs on GitLab.

    Raises:
        UsageError: GitHub without an action.
    """
    known = {"VERSION": __version__, "ACTION": action, "PACKAGE": package}
    if ci == "gitlab":
        return {Path(".gitlab/d2obench-gate.yml"): _filled("gitlab-gate.yml", **known)}
    if ci == "none":
        return {}
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", action):
        raise UsageError(
            "a workflow for GitHub needs the repository that holds the actions of d2obench",
            why=f"'{action}' is not OWNER/REPOSITORY" if action else "",
            remedy="give --action OWNER/REPOSITORY, or --ci gitlab, or --ci none for the suite alone",
        )
    folder = Path(".github/workflows")
    return {
        folder / "gate.yml": _filled("github-gate.yml", **known),
        folder / "gate-comment.yml": _filled("github-comment.yml", **known),
    }


def write_files(folder: Path, files: Mapping[Path, str]) -> list[str]:
    """Writes the files that do not exist or that nobody has changed. Returns a line on each.

    Raises:
        RecordError: a file can't be written.
    """
    said = []
    for name, text in files.items():
        path = folder / name
        made = stamped(text)
        old = path.read_text("utf-8", "replace") if path.is_file() else None
        if old == made:
            said.append(f"{name}: as it should be")
        elif old is not None and not untouched(old):
            said.append(f"{name}: left alone, because it is not as it was written here; delete it to have it written")
        else:
            write_atomic(path, made.encode())
            said.append(f"{name}: written")
    return said


def stamped(text: str) -> str:
    """The text with its digest in the first line."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"# Written by d2obench gate init ({digest}). {_WORDS}\n{text}"


def untouched(text: str) -> bool:
    """Whether a file is as it was written."""
    match = _STAMP.match(text)
    return match is not None and hashlib.sha256(text[match.end() :].encode()).hexdigest()[:12] == match[1]


def _filled(name: str, **words: str) -> str:
    text = (importlib.resources.files("d2obench.gate") / "templates" / name).read_text("utf-8")
    return re.sub(r"@@(\w+)@@", lambda found: words[found[1]], text)


def _quoted(words: Sequence[str]) -> str:
    return ", ".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' for word in words)
