"""The README against the program: its commands are real, its links lead somewhere, its tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import d2obench
from d2obench.cache import Session
from d2obench.cli import COMMANDS, main
from d2obench.models import LoadedModel
from d2obench.suite.definition import shipped

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else ""
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)


def _commands() -> list[str]:
    """Every ``d2obench …`` line of the code blocks, without comments and continuations."""
    text = "\n".join(body.replace("\\\n", " ") for _, body in BLOCKS)
    return re.findall(r"(?:^|[\s/])d2obench ([a-z][^#\n&]*)", text, re.M)


def test_it_is_short() -> None:
    """Words are what has a letter or a digit."""
    assert len([word for word in README.split() if re.search(r"\w", word)]) <= 1300


def test_every_command_is_named() -> None:
    named = {words.split()[0] for words in re.findall(r"d2obench ([a-z][\w -]*)", README)}
    assert {name for name in COMMANDS if " " not in name} <= named
    assert all(name in README for name in COMMANDS)


def test_commands_exist_with_their_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert _commands()
    for line in _commands():
        name, *words = line.split()
        assert name in COMMANDS, line
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        if options:
            group = [words[0]] if f"{name} {words[0]}" in COMMANDS else []
            with pytest.raises(SystemExit):
                main([name, *group, "--help"])
            shown = capsys.readouterr().out
            assert not {option for option in options if option not in shown}, line


def test_suites_named_in_runs_ship() -> None:
    for line in _commands():
        name, *words = line.split()
        if name == "run" and words and not words[0].startswith("-") and words[0].islower():
            assert words[0] in shipped() or words[0].endswith(".toml"), line


def test_ci_finds_its_command() -> None:
    lines = [line for line in README.splitlines() if line.endswith("-m pytest")]
    assert len(lines) == 1
    assert lines[0].startswith("python3 -m venv .venv && ")


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#\s]+)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()


def test_the_map_is_the_tree() -> None:
    """Every room and module that the map names exists, and no room and no module of the top level is left out."""
    named = set(re.findall(r"^    ([\w.]+/?)  ", d2obench.__doc__ or "", re.M))
    package = ROOT / "d2obench"
    assert len(named) > 10 and all((package / name.rstrip("/")).exists() for name in named)
    assert {f"{path.parent.name}/" for path in package.glob("*/__init__.py")} == {n for n in named if n.endswith("/")}
    assert {path.name for path in package.glob("[!_]*.py")} == {n for n in named if n.endswith(".py")}


def test_the_recipe_of_a_policy_runs(tiny: LoadedModel) -> None:
    """The README's policy, as it stands there: within budget, and never without a finite answer."""
    (code,) = [body for kind, body in BLOCKS if kind == "python" and "class Strided" in body]
    assert code.count("\n") < 40
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, "README.md", "exec"), names)
    session = Session(tiny, names["Strided"](), "0.3", max_new=12)
    logits = session.prefill([list(range(100)), list(range(60))])
    session.compress()
    for _ in range(12):
        logits = session.step(logits.argmax(-1))
    assert logits.isfinite().all()
    assert session.footprint().held == [[30.0, 18.0]] * tiny.layers
