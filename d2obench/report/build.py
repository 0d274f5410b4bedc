"""Makes a :class:`Report` of one or several run folders: the only place that decides what is on the page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from d2obench.errors import RecordError
from d2obench.metric import METRICS
from d2obench.record import Run, Value, read_run, with_kinds
from d2obench.report.derive import metric_of, results
from d2obench.report.evidence import front_claims, judge, target_claims
from d2obench.report.figures import figures, in_order
from d2obench.report.machine import again, cards, environment, suites, unlike
from d2obench.report.rows import KEEPS_MORE, Result, join, unseen
from d2obench.report.sentences import first_words, of_targets
from d2obench.report.tables import UNLIKE, best_claims, first, headline, parts, ratios, targets
from d2obench.report.view import (
    ENDINGS,
    Case,
    Column,
    CsvRow,
    Field,
    Figure,
    Outcome,
    Report,
    Table,
    bounds_in_words,
    signed,
)
from d2obench.stats.claims import Claim
from d2obench.suite.definition import SPEED

MAX_CELLS, MAX_FLAGS = 2500, 8
"""Rows of the table of cells, and flags that are explained."""
EMBEDDED = (
    "The model embedded is SmolLM2-135M-Instruct with weights dequantised from 4 bits (GGUF Q4_1); "
    "its KV cache is full precision."
)
BUSY_MACHINE = (
    "The machine was busy: other work disturbed most of the timings of {count}, so there is no verdict on their speed. "
    "End the other work (d2obench doctor shows the load) and run again. Quality, counts and bytes are not affected."
)
FLAGS = {
    KEEPS_MORE: "the policy holds more than its budget allows, so it can't be compared at that budget",
    "sampled decode": "decoding was measured in windows of the generation, and the whole was estimated from them",
    "beyond the model's context": "the text is longer than the model was made for: its time is true, its text is not",
    "not measured beside full": "the full cache was measured in other rounds, so there is no ratio to it",
    "differs between rounds": "figures that should be equal in every round were not",
    "some windows left out": "they were disturbed by other work and are in no figure of time",
    "some rounds left out": "they were disturbed by other work and are in no figure of time",
    "some windows disturbed": "too many were disturbed by other work to leave them all out",
    "some rounds disturbed": "too many were disturbed by other work to leave them all out",
    "busy machine": "other work disturbed most of its timings, so there is no verdict on its speed",
}
"""Beginning of a flag → what it means for the reader."""
_COUNTED = re.compile(r"^\d+ of \d+ ((?:windows|rounds) [a-z ]+):.*")
"""Matches flags that differ from cell to cell only in the number of rounds or windows and in what disturbed them."""
_PLACES = {key: place for place, key in enumerate(METRICS)}
"""Metric → its place in the metric table."""


class _Published(msgspec.Struct):
    """What the ``report.json`` of a published run keeps of the raw samples: derived figures of cells, and charts."""

    tidy: tuple[CsvRow, ...] = ()
    figures: tuple[Figure, ...] = ()


READ = {
    True: "where the task allows it, policies shared the reading of prompts",
    False: "each read its prompts itself",
}
"""``quality.share`` of a suite → what it means for the reader."""


def build(folders: Sequence[Path]) -> Report:
    """The report of one run, or of several side by side.

    A published run no longer has its raw samples; what was computed from them is read from its ``report.json``.

    Raises:
        RecordError: a folder is no run, or its records can't be read.
    """
    runs = [read_run(folder) for folder in folders]
    kept = {place: _stored(folder / "report.json") for place, folder in enumerate(folders) if _published(folder)}
    runs = [_with_derived(run, kept[place]) if place in kept else run for place, run in enumerate(runs)]
    report = assemble(runs)
    if len(runs) == 1 and kept:
        missing = [figure for figure in kept[0].figures if figure.kind in ("position", "timeline")]
        report = msgspec.structs.replace(report, figures=tuple(in_order((*report.figures, *missing))))
    return report


def assemble(runs: Sequence[Run]) -> Report:
    """The report of runs that have been read."""
    named = list(zip(_names(runs), runs, strict=True))
    found = results(named)
    rows = join(found)
    screen, judged = first(rows), judge(named, found)
    tables = [*headline(found, rows), *ratios(rows), *parts(found)]
    words = first_words(named, rows)
    return Report(
        title=" · ".join(dict.fromkeys(run.info.name for run in runs)),
        subtitle=" ".join(dict.fromkeys(str(run.info.suite.get("about", "")) for run in runs)).strip(),
        verdict=(*of_targets(judged), *words.sentences),
        warnings=(*_warnings(named), *unlike(named)),
        headline=tuple(screen),
        reading=_reading(found, screen),
        notes=tuple(_notes(named)),
        machine=cards(named, rows),
        figures=tuple(figures(found, rows)),
        cells=_cells(named, len(runs) > 1),
        environment=environment(named),
        suites=suites(named),
        again=again(named),
        results=tuple(csv_rows(found)),
        cases=tuple(_cases(found, named)),
        targets=targets(judged),
        tables=tuple(tables),
        glossary=_glossary([*screen, *tables]),
        claims=_different((*target_claims(judged), *words.claims, *best_claims(found, rows), *front_claims(rows))),
    )


def _different(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    """Each statement once, even if a sentence and a bold figure make the same one, or several rows share a cell."""
    first_of: dict[object, Claim] = {}
    for claim in claims:
        key = (claim.word, claim.cell, claim.metric, claim.least, claim.most, claim.others)
        first_of.setdefault(key, claim)
    return tuple(first_of.values())


def csv_rows(found: Iterable[Result]) -> Iterable[CsvRow]:
    """One row for each cell and metric, and one for the time that each cell took."""
    for result in found:
        cell, axes = result.record, result.record.axes
        policy, budget, shape, batch = (
            "" if x is None else str(x) for x in (axes.policy, axes.budget, axes.shape, axes.batch)
        )
        where = (result.name, cell.id, axes.task, axes.model, axes.dtype, axes.device)
        head = (*where, policy, budget, shape, batch, axes.seed, cell.status)
        flags = "; ".join(cell.flags)
        path = str(cell.details.get("decode_path", ""))
        for key in sorted(result.values, key=_place):
            value = result.values[key]
            figure = (value.value, _unit(key), value.lo, value.hi, value.n)
            yield CsvRow(*head, key, *figure, _in_words(key, value), flags, value.note, path, value.kind)
        spent = round(cell.seconds, 1)
        yield CsvRow(*head, "seconds", spent, "s", None, None, None, f"{spent:.1f}", flags, cell.reason, path)


def _cases(found: Iterable[Result], runs: Sequence[tuple[str, Run]]) -> Iterable[Case]:
    """A test case for every cell that ran, then for those that have no record."""
    outcomes: dict[str, Outcome] = {"ok": "passed", "skipped": "skipped"}
    for result in found:
        cell = result.record
        known = [
            (metric_of(key), key, value) for key, value in sorted(result.values.items(), key=lambda one: _place(one[0]))
        ]
        text = "\n".join(f"{metric.header}: {_in_words(key, value)}" for metric, key, value in known if metric)
        outcome = outcomes.get(cell.status, "error")
        seconds = round(cell.seconds, 3)
        yield Case(result.name, cell.id, cell.axes.task, cell.status, cell.reason, seconds, text, outcome)
    for name, run in runs:
        for cell_id in run.missing:
            yield Case(name, cell_id, "missing", "missing", "no record yet", 0.0, "", "skipped")


def _in_words(key: str, value: Value) -> str:
    """A figure as the views print it: value, interval, unit."""
    metric = metric_of(key)
    if metric is None or value.value is None:
        return "" if value.value is None else f"{value.value:g}"
    bounds = bounds_in_words(key, value)
    return f"{signed(metric.key, value.value)} {metric.unit}".rstrip() + (f" [{bounds}]" if bounds else "")


def _unit(key: str) -> str:
    """The unit of the recorded value. What is shown as a percentage is recorded as a fraction and has no unit."""
    metric = metric_of(key)
    return "" if metric is None or (metric.scale != 1 and not metric.base) else metric.base or metric.unit


def _place(key: str) -> tuple[int, str]:
    """Sort key: metrics in the order of the metric table, unknown ones last."""
    metric = metric_of(key)
    return (_PLACES[metric.key] if metric else len(_PLACES), key)


def _published(folder: Path) -> bool:
    return (folder / "report.json").is_file() and not (folder / "samples").is_dir()


def _stored(path: Path) -> _Published:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Published)
    except (OSError, msgspec.DecodeError, RecursionError) as problem:
        raise RecordError(f"can't read {path}", why=str(problem), remedy="publish the run again") from None


def _with_derived(run: Run, kept: _Published) -> Run:
    """The run with the figures that were derived from its samples; a figure that the record holds is not replaced."""
    derived: dict[str, dict[str, Value]] = {}
    for row in kept.tidy:
        if row.metric != "seconds":
            value = Value(row.value, row.lo, row.hi, row.n or 1, row.note, row.kind)
            derived.setdefault(row.cell, {})[row.metric] = value
    cells = (msgspec.structs.replace(cell, values=derived.get(cell.id, {}) | cell.values) for cell in run.cells)
    return msgspec.structs.replace(run, cells=tuple(map(with_kinds, cells)))


def _names(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: that of its suite, or of its folder if the suites are the same, or a number.

    The name is in every row of every view. It therefore also carries the mark of a run that was made in another
    environment than the first run.
    """
    numbered = [f"{run.info.name} #{number}" for number, run in enumerate(runs, 1)]
    candidates = ([run.info.name for run in runs], [run.path.resolve().name for run in runs], numbered)
    names = next(names for names in candidates if len(set(names)) == len(names))
    like = [run.info.environment_hash == runs[0].info.environment_hash for run in runs]
    return [name if same else f"{name} {UNLIKE}" for name, same in zip(names, like, strict=True)]


def _warnings(runs: Sequence[tuple[str, Run]]) -> list[str]:
    """What a reader must know before trusting a figure."""
    words = []
    for name, run in runs:
        at = f"{name}: " if len(runs) > 1 else ""
        if run.missing:
            words.append(
                f"{at}The run is not finished: {len(run.missing)} of {len(run.info.cells)} cells have no record yet."
            )
        disturbed = [cell for cell in run.cells if cell.axes.task == SPEED and cell.details.get("busy")]
        if disturbed:
            timed = sum(cell.axes.task == SPEED for cell in run.cells)
            words.append(at + BUSY_MACHINE.format(count=f"{len(disturbed)} of {timed} timed cells"))
        words += [f"{at}{warning}" for warning in run.warnings[:5]]
    return words


def _notes(runs: Sequence[tuple[str, Run]]) -> Iterator[str]:
    """Further remarks: the commonest flags of cells and what they mean."""
    flags = Counter(_COUNTED.sub(r"some \1", flag) for _, run in runs for cell in run.cells for flag in cell.flags)
    for flag, count in flags.most_common(MAX_FLAGS):
        meaning = next((words for begin, words in FLAGS.items() if flag.startswith(begin)), "")
        cells = f"{count} cells carry" if count > 1 else "1 cell carries"
        yield f"{cells} the flag “{flag}”" + (f": {meaning}." if meaning else ".")
    for name, run in runs:
        share = run.info.suite.get("quality", {}).get("share")
        quality = [cell for cell in run.cells if cell.axes.task != SPEED and cell.status == "ok"]
        if share is not None and len(quality) > 1:
            at, seconds = f"{name}: " if len(runs) > 1 else "", sum(cell.seconds for cell in quality)
            yield f"{at}{len(quality)} quality cells took {seconds:,.1f} s; {READ[share]}."
    if any(cell.axes.model == "embedded" for _, run in runs for cell in run.cells):
        yield EMBEDDED


def _reading(found: Sequence[Result], tables: Sequence[Table]) -> tuple[str, ...]:
    """How to read the first table: only the remarks that apply to it."""
    fields = [field for table in tables for row in table.rows for field in row]
    lines = []
    taken = {str(how) for result in found if (how := result.record.details.get("turns"))}
    if taken:
        how = "in windows of decode steps, one cache after the other" if "windows" in taken else "request by request"
        fresh = sorted({count for result in found if isinstance(count := result.record.details.get("processes"), int)})
        processes = f" in {fresh[0]} fresh processes" if fresh and fresh[0] > 1 else " in one process"
        lines.append(f"Caches took turns {how},{processes}. × full compares what was measured side by side.")
    if any(field.interval and not field.range_of for field in fields):
        lines.append(
            "± and a … b are 95 % intervals for the conditions of this run. Words such as faster need wider ones, so "
            "that all are right together."
        )
    if any(unseen(result.record.axes.task) for result in found):
        lines.append(
            "“Question unseen”: each context was compressed before its question was read. Without these words context "
            "and question were compressed together."
        )
    if any(field.range_of < 0 for field in fields):
        lines.append("The bounds of an older record were not tested to cover 95 %, so they tell no policies apart.")
    if any(field.range_of > 0 for field in fields):
        lines.append(
            "A figure with a range instead of an interval comes from too few samples, so it tells no policies apart."
        )
    if any(column.direction != "none" for table in tables for column in table.columns):
        told = " A bold figure is shown, with 95 %, to be the best of its column for its model, shape and batch."
        known = told if any(field.mark == "best" for field in fields) else ""
        lines.append(f"↓ means that lower is better, ↑ that higher is better.{known}")
    if any(field.text.endswith(" ◆") for field in fields):
        lines.append(
            "◆ marks a row that is shown, with 95 %, to be beaten by no comparable row in both quality (of the first "
            "task) and KV bytes."
        )
    if any(result.name.endswith(f" {UNLIKE}") for result in found):
        lines.append(
            f"{UNLIKE} marks runs of another environment than the first: their times can't be compared with it."
        )
    if any(field.mark == "quiet" for field in fields):
        lines.append("– does not apply, or was not measured.")
    return tuple(lines)


def _glossary(tables: Sequence[Table]) -> tuple[Table, ...]:
    """The table with the definition of every figure in these tables."""
    columns = dict.fromkeys(part for table in tables for column in table.columns for part in column.key.split(":"))
    rows = tuple(
        (Field(METRICS[key].header), Field(METRICS[key].unit), Field(METRICS[key].about))
        for key in columns
        if key in METRICS
    )
    head = (Column("figure", "figure", numeric=False), Column("unit", "unit", numeric=False))
    return (
        (Table("What each figure means", (*head, Column("about", "definition", numeric=False)), rows),) if rows else ()
    )


def _cells(runs: Sequence[tuple[str, Run]], several: bool) -> Table:
    """The table of every planned cell and how it ended; cells without figures come first."""
    columns = [Column("run", "run", numeric=False)] if several else []
    columns += [Column("cell", "cell", numeric=False), Column("status", "status", numeric=False)]
    paths = any(cell.details.get("decode_path") for _, run in runs for cell in run.cells)
    columns += [Column("seconds", "time", "s"), *([Column("path", "decode path", numeric=False)] if paths else [])]
    columns += [Column("remarks", "remarks", numeric=False)]
    bad: list[tuple[Field, ...]] = []
    good: list[tuple[Field, ...]] = []
    for name, run in runs:
        first = [Field(name)] if several else []
        for cell in run.cells:
            ok = cell.status == "ok"
            status = Field("ok") if ok else Field(ENDINGS[cell.status], mark="bad")
            seconds = Field(f"{cell.seconds:.1f}", sort=round(cell.seconds, 1))
            remark = Field("; ".join(word for word in (cell.reason, *cell.flags) if word))
            path = [Field(str(cell.details.get("decode_path", "")))] if paths else []
            (good if ok else bad).append((*first, Field(cell.id), status, seconds, *path, remark))
        missing = (Field("not run", mark="bad"), Field("–", mark="quiet"), *[Field("")] * (1 + paths))
        bad += [(*first, Field(cell), *missing) for cell in run.missing]
    body = [*bad, *good]
    return Table("Cells", tuple(columns), tuple(body[:MAX_CELLS]), left_out=max(0, len(body) - MAX_CELLS))
