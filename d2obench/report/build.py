"""Run folders → one :class:`Report`: the only place that decides what stands on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from d2obench.errors import RecordError
from d2obench.metric import METRICS, show
from d2obench.record import Run, Value, read_run
from d2obench.report.derive import metric_of, results
from d2obench.report.figures import figures
from d2obench.report.machine import again, cards, environment, suites, unlike
from d2obench.report.rows import Result, join
from d2obench.report.sentences import verdict, verdict_claims
from d2obench.report.tables import ENDINGS, UNLIKE, best_claims, headline, parts, ratios, signed
from d2obench.report.targets import judge, sayings, sentence, targets
from d2obench.report.view import Case, Column, CsvRow, Field, Outcome, Report, Table

MAX_CELLS, MAX_FLAGS = 2500, 5
EMBEDDED = (
    "The model embedded is SmolLM2-135M-Instruct with weights dequantised from 4 bits (GGUF Q4_1); "
    "its KV cache is full precision."
)
_PLACES = {key: place for place, key in enumerate(METRICS)}


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
    found = results(named)
    rows = join(found)
    tables, judged = headline(found, rows), judge(named, found)
    goals = targets(judged)
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
        results=tuple(csv_rows(found)),
        cases=tuple(_cases(found, named)),
        targets=goals,
        tables=(*ratios(rows), *parts(found)),
        claims=(*sayings(judged), *best_claims(found, rows), *verdict_claims(rows)),
    )


def csv_rows(found: Iterable[Result]) -> Iterable[CsvRow]:
    """One row for each cell and metric; a cell without figures still has the row of its time."""
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
    """Every cell that ran, then those that have no record."""
    outcomes: dict[str, Outcome] = {"ok": "passed", "skipped": "skipped"}
    for result in found:
        cell = result.record
        known = [(metric_of(key), key, value) for key, value in result.values.items()]
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
    bounds = ""
    if value.lo is not None and value.hi is not None and value.kind != "exact":
        few = f", range of {value.n}" if value.kind == "range" else ""
        bounds = f" [{show(metric.key, value.lo)} … {show(metric.key, value.hi)}{few}]"
    return f"{signed(metric.key, value.value)}{bounds} {metric.unit}".rstrip()


def _unit(key: str) -> str:
    """The unit of the recorded value; what is shown as a percentage is recorded as a fraction, without a unit."""
    metric = metric_of(key)
    return "" if metric is None or (metric.scale != 1 and not metric.base) else metric.base or metric.unit


def _place(key: str) -> tuple[int, str]:
    """Metrics in the order of their table, unknown ones last."""
    metric = metric_of(key)
    return (_PLACES[metric.key] if metric else len(_PLACES), key)


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


def _reading(found: Sequence[Result], tables: Sequence[Table]) -> tuple[str, ...]:
    """How to read the headline table; only what applies to it."""
    fields = [field for table in tables for row in table.rows for field in row]
    lines = []
    if any(field.interval and not field.range_of for field in fields):
        lines.append("a … b is the 95 % interval of the figure before it.")
    if any(field.range_of for field in fields):
        lines.append("a … b (range of n): n samples are too few for an interval; these are the lowest and the highest.")
    if any(column.direction != "none" for table in tables for column in table.columns):
        best = "; bold is told to be the best of its column among rows of the same model, shape and batch (95 %)"
        known = best if any(field.mark == "best" for field in fields) else ""
        lines.append(f"↓ lower is better, ↑ higher is better{known}.")
    rounds = sorted({n for result in found if isinstance(n := result.record.details.get("rounds"), int)})
    if rounds:
        count = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
        lines.append(
            f"Times come from {count} rounds in which the policies took turns; ratios are paired within a round."
        )
    if any(field.text.endswith(" ◆") for field in fields):
        lines.append(
            "◆ Pareto-optimal: every comparable row that holds as few KV bytes or fewer is told to be worse in the"
            " first task (95 %)."
        )
    if any(result.name.endswith(f" {UNLIKE}") for result in found):
        lines.append(
            f"{UNLIKE} after a run's name: made in another environment than the first run; compare its times with care."
        )
    return (*lines, "– was not asked for or can't be told; a cell without figures says why.")


def _cells(runs: Sequence[tuple[str, Run]], several: bool) -> Table:
    """Every planned cell with how it ended; those that gave no figures first."""
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
