"""Every renderer against stored text. ``python tests/test_report_golden.py`` writes it anew, on purpose only."""

from __future__ import annotations

import io
import json
import random
import tempfile
from pathlib import Path

import pytest
import report_runs as made
from rich.console import Console

from d2obench.report.build import build
from d2obench.report.charts import spec
from d2obench.report.render import data, markdown
from d2obench.report.render.console import show_report
from d2obench.report.render.html import html
from d2obench.report.view import Report

GOLDEN = Path(__file__).parent / "golden" / "report"


def stored_run(folder: Path) -> Path:
    """One setting; every status, a flag, a missing cell."""
    draw = random.Random(3)
    full, rounds = made.speed_cell(folder, made.axes("speed", "full", shape="256+16", batch=2), None, draw)
    cells = [full]
    for policy in ("h2o", "d2o"):
        point = made.axes("speed", policy, "0.2", shape="256+16", batch=2)
        cells.append(made.speed_cell(folder, point, rounds, draw)[0])
    for task in ("fidelity", "needle"):
        policies = (("full", None), ("h2o", "0.2"), ("d2o", "0.2"))
        cells += [made.quality_cell(folder, made.axes(task, *policy), draw) for policy in policies]
    wide = [made.axes("speed", policy, "0.2", shape="256+16", batch=64) for policy in ("h2o", "d2o", "streaming")]
    cells.append(made.record(wide[0], "oom", reason="out of memory: 8 GiB asked", flags=("sampled decode",)))
    cells.append(made.record(wide[1], "skipped", reason="a smaller batch ran out of memory"))
    cells.append(made.record(wide[2], "failed", reason="WorkerError: the worker ended with signal 9"))
    return made.write_run(folder, "golden", cells, missing=("speed/embedded/float32/cpu/local@0.2/256+16/b2/s0",))


def rendered(report: Report) -> dict[str, str]:
    """File name → text, of every format that people read."""
    console = Console(file=io.StringIO(), width=120, color_system=None)
    show_report(report, console)
    specs = {figure.id: {**spec(figure), "$schema": ""} for figure in report.figures}
    return {
        "console.txt": "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n",  # type: ignore[attr-defined]
        "report.md": markdown.markdown(report, [figure.id for figure in report.figures]),
        "results.csv": data.results(report),
        "results-wide.csv": data.wide(report),
        "junit.xml": data.junit(report),
        "summary.md": markdown.summary(report),
        "report.html": html(report, {}),
        "figures.json": json.dumps(specs, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return build([stored_run(tmp_path_factory.mktemp("run") / "golden")])


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*")))
def test_renders_as_stored(report: Report, name: str) -> None:
    assert rendered(report)[name] == (GOLDEN / name).read_text("utf-8")


def test_every_renderer_is_stored(report: Report) -> None:
    assert set(rendered(report)) == {path.name for path in GOLDEN.glob("*")}


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for name, text in rendered(build([stored_run(Path(place) / "golden")])).items():
            (GOLDEN / name).write_text(text, "utf-8")
