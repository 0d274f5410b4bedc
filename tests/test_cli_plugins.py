"""Everything another package can add, from a distribution on the path: listed and used, or a row with its error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_runs import usual
from waiting import LIMIT_S

from d2obench.cli import main
from d2obench.errors import RecordError, UsageError
from d2obench.models import REGISTRY as MODELS
from d2obench.report.render import RENDERERS, check

SOURCE = '''
from d2obench.policies.streaming import Streaming


class Mine(Streaming):
    """Mine keeps what I like."""


def lines(report, drawn):
    """One line a row."""
    return [("lines.txt", f"{report.title}\\n")]


def astray(report, drawn):
    return [("../lines.txt", "")]


def over(report, drawn):
    return [("cells.jsonl", "")]


def fails(report, drawn):
    raise KeyError("nothing")


class Place:
    """Models from my place."""

    def __init__(self, rest):
        self.rest = rest
'''
POINTS = """
[d2obench.policies]
mine = throwaway_parts:Mine
d2o = throwaway_parts:Mine
[d2obench.tasks]
lost = throwaway_missing:Task
[d2obench.models]
place = throwaway_parts:Place
[d2obench.renderers]
lines = throwaway_parts:lines
astray = throwaway_parts:astray
over = throwaway_parts:over
fails = throwaway_parts:fails
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "throwaway_parts.py").write_text(SOURCE)
    info = tmp_path / "throwaway-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: throwaway\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("throwaway_parts", None)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(list(words))
    out, err = capsys.readouterr()
    assert done.value.code == 0, err
    return out


@pytest.mark.parametrize("words", [("list", "plugins"), ("list", "--plugins")])
def test_every_plugin_is_a_row(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    rows = {line.split()[0]: line for line in shown(capsys, *words).splitlines() if "throwaway" in line}
    assert rows.keys() >= {"mine", "d2o", "lost", "place", "lines"}
    assert all("throwaway" in line and "2.1" in line for line in rows.values())
    assert "policy" in rows["mine"]
    assert "model source" in rows["place"]
    assert "format" in rows["lines"]
    assert "ModuleNotFoundError" in rows["lost"]
    assert "built in" in rows["d2o"]
    assert "Error" not in rows["mine"]


def test_lists_of_one_kind_show_them_beside_the_built_in_ones(capsys: pytest.CaptureFixture[str]) -> None:
    policies = shown(capsys, "list", "policies")
    assert "Mine keeps what I like." in policies
    assert all(name in policies for name in ("hf-quantized", "kvpress:…", "llama.cpp"))
    assert "broken: the task plugin 'lost'" in shown(capsys, "list", "tasks", "--plugins")
    assert "One line a row." in shown(capsys, "list", "formats")
    assert MODELS.get("place")("x").rest == "x"


def test_a_renderer_is_found_by_its_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = usual(tmp_path / "run")
    out = shown(capsys, "report", str(run), "--format", "csv,lines")
    assert "lines.txt" in out
    assert (run / "lines.txt").read_text().strip()
    for form, said in (("astray", "may not write"), ("over", "may not write"), ("fails", "failed: KeyError")):
        with pytest.raises(SystemExit) as done:
            main(["report", str(run), "--format", form])
        assert done.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "lines.txt").exists()
    assert (run / "cells.jsonl").read_text()
    with pytest.raises(UsageError, match=r"unknown format 'docx'.*lines"):
        check(["docx"])
    assert RENDERERS.names()[:6] == ["md", "csv", "html", "json", "junit", "github"]
    assert issubclass(RecordError, Exception)


def test_no_other_library_is_imported_for_its_name() -> None:
    code = (
        "import sys; from d2obench.policies import parse_choice; import d2obench.cli.listing\n"
        "for text in ('hf-quantized(bits=2)', 'kvpress:SnapKVPress', 'llama.cpp(cache=q8_0)'):\n"
        "    parse_choice(text).takes_budget, parse_choice(text).yardstick\n"
        "assert not {'kvpress', 'xllamacpp', 'optimum', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=LIMIT_S)
