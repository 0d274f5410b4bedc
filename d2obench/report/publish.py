"""Publishing: copies what is worth keeping of a run to ``reports/<name>/`` and lists all runs in ``reports/README.md``.

Raw samples are not copied. What was computed from them, ratios and charts, is kept in ``cells.jsonl`` and
``report.json``, so that a published run can be rendered again to the same bytes. The baselines of the gate, in the
same folder, are left alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from d2obench.errors import D2OBenchError, RecordError, UsageError
from d2obench.record import CellRecord, Run, cannot_write, dump, read_run, write_atomic
from d2obench.report.build import build
from d2obench.report.derive import results
from d2obench.report.render import write_report
from d2obench.report.render.markdown import escape
from d2obench.report.view import Report

RECORDS = ("run.json", "cells.jsonl")
RAW = "samples"
FORMATS = ("json", "csv", "md", "html", "svg")
"""Formats of a published run."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
RESERVED = ("baselines",)
"""Names of folders that can't be the name of a run."""


def publish(folder: Path, reports: Path, name: str = "", replace: bool = False) -> list[Path]:
    """Copies a run's records and views to ``reports/<name>`` and rebuilds the index.

    Args:
        folder: the run.
        reports: where published runs live.
        name: the new folder's name; if it is empty, the name of the run's suite.
        replace: whether a published run of that name may be overwritten.

    Returns: the files written; the index is the last.

    Raises:
        UsageError: the name is no plain file name.
        RecordError: the folder is no run, the name is taken, or the new folder can't be written.
    """
    run = read_run(folder)
    name = name or run.info.name
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise UsageError(
            f"'{name[:80]}' can't name a report", remedy="use letters, digits, '.', '_' and '-': --name my-run"
        )
    target = reports / name
    if target.resolve() == folder.resolve():
        raise UsageError(f"{folder} is published already", remedy="render it with d2obench report")
    if target.exists() and not replace:
        raise RecordError(f"{target} exists", remedy="choose another --name, or --replace it on purpose")
    try:
        if target.exists():
            read_run(target)  # raises unless the folder is a run, because nothing else may be removed
            shutil.rmtree(target)
        target.mkdir(parents=True)
        for record in RECORDS:
            if (folder / record).is_file():
                shutil.copyfile(folder / record, target / record)
        write_atomic(target / "run.json", _at_home(folder / "run.json"))
        if (folder / RAW).is_dir():
            shutil.copytree(folder / RAW, target / RAW)
        report = build([target])
        cells = [*_with_derived(read_run(target))]
        write_atomic(target / "cells.jsonl", b"".join(dump(cell) + b"\n" for cell in cells))
        shutil.rmtree(target / RAW, ignore_errors=True)
    except OSError as problem:
        raise cannot_write(target, problem) from problem
    written = write_report(report, target, FORMATS)
    return [*(target / record for record in RECORDS), *written, index(reports)]


def _with_derived(run: Run) -> Iterator[CellRecord]:
    """The cells with the figures that need raw samples: ratios and differences between cells."""
    for result in results([(run.info.name, run)]):
        yield msgspec.structs.replace(result.record, values=result.values)


def _at_home(record: Path) -> bytes:
    """``run.json`` without folders of the machine on which it was made; data files are given by name only."""
    run = json.loads(record.read_bytes())
    run["command"] = [_named(word) for word in run.get("command", [])]
    quality = run.get("suite", {}).get("quality", {})
    if data := quality.get("data"):
        quality["data"] = {task: _named(path) for task, path in data.items()}
    return json.dumps(run, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _named(word: str) -> str:
    option, equals, path = word.rpartition("=")
    return f"{option}{equals}{Path(path).name}" if path.startswith("/") else word


def index(reports: Path) -> Path:
    """Rebuilds the ``README.md`` of a folder of published runs: a table of the runs, and a list of the studies, which
    are folders that have a ``README.md`` and no run."""
    rows = []
    for folder in sorted(path for path in reports.iterdir() if (path / "run.json").is_file()):
        try:
            rows.append(_row(folder, read_run(folder), build([folder])))
        except D2OBenchError:
            continue
    head = [
        "# Published runs",
        "Rebuilt by `d2obench report publish`. Each folder holds the records of a run and the views made from them; "
        "`d2obench report reports/NAME` makes the views again, to the same bytes.",
    ]
    table = ["| run | suite | models | device | started | cells | verdict |", "|---|---|---|---|---|---:|---|", *rows]
    studies = [_study(folder) for folder in sorted(reports.iterdir()) if not (folder / "run.json").is_file()]
    listed = [line for line in studies if line]
    tail = ["## Studies of the project's own statistics", "\n".join(listed)] if listed else []
    path = reports / "README.md"
    write_atomic(path, ("\n\n".join([*head, "\n".join(table), *tail]) + "\n").encode())
    return path


def _study(folder: Path) -> str:
    """The line of a study, with the title of its ``README.md``; empty for a folder without one."""
    path = folder / "README.md"
    title = path.read_text("utf-8").partition("\n")[0].lstrip("# ").strip() if path.is_file() else ""
    return f"* [{folder.name}]({folder.name}/README.md): {escape(title, 200)}" if title else ""


def _row(folder: Path, run: Run, report: Report) -> str:
    models = ", ".join(dict.fromkeys(cell.axes.model for cell in run.cells))
    devices = [str(run.info.environment.get(key) or "") for key in ("gpu", "cpu")]
    fields: Sequence[str] = (
        run.info.name,
        models,
        next((device for device in devices if device), "–"),
        run.info.started[:10],
        str(len(run.cells)),
        report.verdict[0] if report.verdict else "",
    )
    return f"| [{folder.name}]({folder.name}/report.md) | " + " | ".join(escape(field, 400) for field in fields) + " |"
