"""Run folders → one :class:`Report`: the only place that decides what stands on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from d2obench.errors import RecordError
from d2obench.record import Run, read_run
from d2obench.report.derive import entries
from d2obench.report.fields import UNLIKE, WORDS
from d2obench.report.figures import figures
from d2obench.report.headline import headline
from d2obench.report.machine import again, cards, environment, suites, unlike
from d2obench.report.parts import parts
from d2obench.report.rows import Entry, join
from d2obench.report.targets import ratios, sentence, targets
from d2obench.report.tidy import cases, tidy
from d2obench.report.view import Column, Report, Table
from d2obench.report.view import Entry as Field
from d2obench.report.words import verdict

MAX_CELLS, MAX_FLAGS = 2500, 5
EMBEDDED = (
    "The model embedded is SmolLM2-135M-Instruct with weights dequantised from 4 bits (GGUF Q4_1); "
    "its KV cache is full precision."
)


def build(folders: Sequence[Path]) -> Report:
    """The report of one run or several side by side.

    A published run has no raw samples any more; its report is read back from ``report.json``.
    """
    if len(folders) == 1 and _published(folders[0]):
        return _stored(folders[0] / "report.json")
    return assemble([read_run(folder) for folder in folders])


def assemble(runs: Sequence[Run]) -> Report:
    """The report of runs that were read."""
    named = list(zip(_names(runs), runs, strict=True))
    found = entries(named)
    rows = join(found)
    tables, goals = headline(found, rows), targets(named, found)
    return Report(
        title=" · ".join(dict.fromkeys(run.info.name for run in runs)),
        subtitle=" ".join(dict.fromkeys(str(run.info.suite.get("about", "")) for run in runs)).strip(),
        verdict=(*sentence(goals), *verdict(named, rows)),
        warnings=(*_warnings(named), *unlike(named)),
        headline=tuple(tables),
        reading=_reading(found, tables),
        machine=cards(named, rows),
        figures=tuple(figures(found, rows)),
        cells=_cells(named, len(runs) > 1),
        environment=environment(named),
        suites=suites(named),
        again=again(named),
        tidy=tuple(tidy(found)),
        cases=tuple(cases(found, named)),
        targets=goals,
        tables=(*ratios(rows), *parts(found)),
    )


def _published(folder: Path) -> bool:
    return (folder / "report.json").is_file() and not (folder / "samples").is_dir()


def _stored(path: Path) -> Report:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError, RecursionError) as problem:
        raise RecordError(f"can't read {path}", why=str(problem), remedy="publish the run again") from None


def _names(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its suite's, its folder's where suites are the same, else a number.

    The name stands in every row of every view, so a run of another environment than the first's is marked in it.
    """
    numbered = [f"{run.info.name} #{number}" for number, run in enumerate(runs, 1)]
    candidates = ([run.info.name for run in runs], [run.path.resolve().name for run in runs], numbered)
    names = next(names for names in candidates if len(set(names)) == len(names))
    like = [run.info.environment_hash == runs[0].info.environment_hash for run in runs]
    return [name if same else f"{name} {UNLIKE}" for name, same in zip(names, like, strict=True)]


def _warnings(runs: Sequence[tuple[str, Run]]) -> list[str]:
    words = []
    for name, run in runs:
        at = f"{name}: " if len(runs) > 1 else ""
        if run.missing:
            words.append(
                f"{at}The run is not finished: {len(run.missing)} of {len(run.info.cells)} cells have no record yet."
            )
        words += [f"{at}{warning}" for warning in run.warnings[:5]]
    flags = Counter(flag for _, run in runs for cell in run.cells for flag in cell.flags)
    words += [f"{count} cells: {flag}." for flag, count in flags.most_common(MAX_FLAGS)]
    if any(cell.axes.model == "embedded" for _, run in runs for cell in run.cells):
        words.append(EMBEDDED)
    return words


def _reading(found: Sequence[Entry], tables: Sequence[Table]) -> tuple[str, ...]:
    """How to read the headline table; only what applies to it."""
    fields = [entry for table in tables for row in table.rows for entry in row]
    lines = []
    if any(entry.interval for entry in fields):
        apart = "where intervals overlap, figures are not clearly apart"
        lines.append(f"a … b is the 95 % interval of the figure before it; {apart}.")
    if any(column.direction != "none" for table in tables for column in table.columns):
        best = "; bold is the best among rows of the same model, shape and batch"
        known = best if any(entry.mark == "best" for entry in fields) else ""
        lines.append(f"↓ lower is better, ↑ higher is better{known}.")
    rounds = sorted({n for entry in found if isinstance(n := entry.record.details.get("rounds"), int)})
    if rounds:
        count = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
        lines.append(
            f"Times come from {count} rounds in which the policies took turns; ratios are paired within a round."
        )
    if any(entry.text.endswith(" ◆") for entry in fields):
        lines.append(
            "◆ Pareto-optimal: no comparable row has both better quality (in the first task) and fewer KV bytes."
        )
    if any(entry.name.endswith(f" {UNLIKE}") for entry in found):
        lines.append(
            f"{UNLIKE} after a run's name: made in another environment than the first run; compare its times with care."
        )
    return (*lines, "– was not asked for or can't be told; a cell without figures says why.")


def _cells(runs: Sequence[tuple[str, Run]], several: bool) -> Table:
    """Every planned cell with how it ended; those that gave no figures first."""
    columns = [Column("run", "run", numeric=False)] if several else []
    columns += [Column("cell", "cell", numeric=False), Column("status", "status", numeric=False)]
    columns += [Column("seconds", "time", "s"), Column("remarks", "remarks", numeric=False)]
    bad: list[tuple[Field, ...]] = []
    good: list[tuple[Field, ...]] = []
    for name, run in runs:
        first = [Field(name)] if several else []
        for cell in run.cells:
            ok = cell.status == "ok"
            status = Field("ok") if ok else Field(WORDS[cell.status], mark="bad")
            seconds = Field(f"{cell.seconds:.1f}", sort=round(cell.seconds, 1))
            remark = Field("; ".join(word for word in (cell.reason, *cell.flags) if word))
            (good if ok else bad).append((*first, Field(cell.id), status, seconds, remark))
        missing = (Field("not run", mark="bad"), Field("–", mark="quiet"), Field(""))
        bad += [(*first, Field(cell), *missing) for cell in run.missing]
    body = [*bad, *good]
    return Table("Cells", tuple(columns), tuple(body[:MAX_CELLS]), left_out=max(0, len(body) - MAX_CELLS))
