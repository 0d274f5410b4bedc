"""The verdict in words: what ran, what wins where, and what D2O gains and loses.

Every number said here is one of the tables'. What may be called faster, better or the best is decided by
``d2obench.report.evidence``: by intervals, widened so that all words of a report are right together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from d2obench.metric import METRICS, Metric, show
from d2obench.record import Run, Value
from d2obench.report.evidence import claim, leader, shown
from d2obench.report.rows import Row, grouped, kv_bytes, primary, tasks_of, volume
from d2obench.report.tables import ENDINGS, signed
from d2obench.stats.claims import Claim, Verdict
from d2obench.suite.definition import SPEED

MAX_SETTINGS, MAX_D2O = 4, 4
RIVALS = {
    "kl": "kl_rival",
    "score_diff": "score_rival",
    "gold_bpb_diff": "gold_bpb_rival",
    "decode_tok_s": "decode_rival",
}


def verdict(runs: Sequence[tuple[str, Run]], rows: Sequence[Row]) -> tuple[str, ...]:
    """The sentences, most important first."""
    words = [*_winners(rows), *_d2o(rows)]
    outcome = _outcome(runs)
    if not words:
        return (outcome or "Every planned cell gave its figures; there is nothing to compare them with.",)
    return (*words, outcome) if outcome else tuple(words)


def verdict_claims(rows: Sequence[Row]) -> list[Claim]:
    """What the sentences on D2O say of full and of its rivals, as data."""
    found: list[Claim | None] = []
    for row in rows:
        if not row.key.policy.startswith("d2o"):
            continue
        rivals = [other for other in rows if other.key.group == row.key.group and other.key.budget == row.key.budget]
        for task in (SPEED, *tasks_of([row])):
            mine = row.of(task)
            for metric in mine.values if mine else ():
                count = _words(row) * (max(1, len(rivals) - 1) if ":" in metric else 1)
                if metric == "speedup" or metric.endswith("_diff") or metric.partition(":")[0] in RIVALS.values():
                    found.append(claim(row, task, metric, shown(row, task, metric, count), count))
    return [one for one in found if one is not None]


def _outcome(runs: Sequence[tuple[str, Run]]) -> str:
    """How many planned cells gave no figure, and why; empty where all did."""
    found: Counter[str] = Counter()
    planned = 0
    for _, run in runs:
        found.update(ENDINGS[cell.status] for cell in run.cells if cell.status != "ok")
        found.update(["not run"] * len(run.missing))
        planned += len(run.cells) + len(run.missing)
    if not planned:
        return "The run has no cells yet."
    parts = ", ".join(f"{count} {word}" for word, count in found.items())
    return f"{found.total()} of {planned} cells gave no figures: {parts}." if found else ""


def _winners(rows: Sequence[Row]) -> list[str]:
    words = []
    groups = [group for group in grouped(rows) if len(group) > 1]
    for metric, what in (
        ("decode_tok_s", "Fastest decode"),
        ("ttft_s", "Shortest TTFT"),
        ("kv_bytes", "Smallest KV cache"),
    ):
        words += _tally(what, [_ranked(group, SPEED, metric) for group in groups], metric, SPEED)
    tasks = tasks_of(rows)
    for task in tasks[:3]:
        metric = primary(rows, task)
        ranked = [_ranked([row for row in group if row.key.policy != "full"], task, metric) for group in groups]
        different = {tuple(id(row.of(task)) for row in rows): rows for rows in ranked}
        ranked = list(different.values())
        words += _tally(f"Least loss of quality on {task}", ranked, metric, task)
    return words


def _ranked(group: Sequence[Row], task: str, metric: str) -> list[Row]:
    """The rows that have the figure, best first; none where there is nothing to choose from."""
    own = [row for row in group if not row.foreign]
    known = [row for row in own if (value := row.value(task, metric)) and value.value is not None]
    sign = 1 if METRICS[metric].direction == "lower" else -1
    return sorted(known, key=lambda row: sign * _bare(row, task, metric)) if len(known) > 1 else []


def _tally(what: str, ranked: Sequence[list[Row]], metric: str, task: str) -> list[str]:
    """``what``: who is first how often, its figure at the largest setting, and who is not clearly behind it there.

    A setting where the first can't be told from any other has no first.
    """
    settings = [rows for rows in ranked if rows]
    won = [rows for rows in settings if len(_close(rows, metric, task)) < len(rows) - 1]
    if not won:
        return [f"{what}: no clear difference between the policies."] if settings else []
    counts = Counter(rows[0].key.label for rows in won)
    (label, count), *others = counts.most_common()
    rows = max((rows for rows in won if rows[0].key.label == label), key=lambda rows: volume(rows[0].key))
    figure = (row_value(rows[0], task, "speedup") if metric == "decode_tok_s" else "") or row_value(
        rows[0], task, metric
    )
    at = f" at {rows[0].key.setting}" if rows[0].key.setting and task == SPEED else ""
    share = f" in {count} of {len(settings)} settings" if len(settings) > 1 else ""
    close = _close(rows, metric, task)
    word = "just as good" if METRICS[metric].kind == "exact" else "not told apart"
    near = f"; {word}: {', '.join(close[:4])}" + (" and more" if len(close) > 4 else "") if close else ""
    rest = [f"elsewhere {', '.join(other for other, _ in others[:3])}"] if others else []
    rest += [f"no clear difference in {len(settings) - len(won)}"] if len(won) < len(settings) else []
    return [f"{what}: {label}{share} ({figure}{at}){near}{''.join(f'; {word}' for word in rest)}."]


def _close(rows: Sequence[Row], metric: str, task: str) -> list[str]:
    """The labels of rows that can't be told from the first."""
    found = leader(rows, task, metric)
    if found is None or found.best != rows[0].key:
        return [row.key.label for row in rows[1:]]
    return [row.key.label for row in rows[1:] if row.key in found.near]


def row_value(row: Row, task: str, metric: str) -> str:
    """``decode, equal batch 1.42 × full [1.38 … 1.46]``; empty where there is none."""
    value = row.value(task, metric)
    return said(metric, value) if value is not None and value.value is not None else ""


def said(metric: str, value: Value) -> str:
    """A figure with its name, unit and interval."""
    bounds = ""
    if value.lo is not None and value.hi is not None and value.kind != "exact":
        few = f", range of {value.n}" if value.kind == "range" else ""
        bounds = f" [{show(metric, value.lo)} … {show(metric, value.hi)}{few}]"
    return f"{METRICS[metric].header} {signed(metric, value.value)} {METRICS[metric].unit}".rstrip() + bounds


def _d2o(rows: Sequence[Row]) -> list[str]:
    """D2O at the largest setting of each machine and model: against full, then against its rivals."""
    words: list[str] = []
    largest: dict[tuple[str, str, str, str], list[Row]] = {}
    for group in grouped(rows):
        key = group[0].key
        home = (key.run, key.model, key.dtype, key.device)
        if home not in largest or _weight(group) > _weight(largest[home]):
            largest[home] = group
    each = MAX_D2O if len(largest) == 1 else 1
    for home, group in list(largest.items())[:MAX_SETTINGS]:
        apart = [word for place, word in enumerate(home) if len({other[place] for other in largest}) > 1]
        where = ", ".join(word for word in (*apart, group[0].key.setting) if word)
        for row in [row for row in group if row.key.policy.startswith("d2o")][:each]:
            words += _against_full(row, group, where) + _against_rivals(row, group)
    return words


def _weight(group: Sequence[Row]) -> tuple[bool, int]:
    """Settings where D2O was timed against full come first, then the larger ones."""
    timed = any(row.value(SPEED, "speedup") for row in group if row.key.policy.startswith("d2o"))
    return timed, volume(group[0].key)


def _against_full(row: Row, group: Sequence[Row], where: str) -> list[str]:
    full = next((other for other in group if other.key.policy == "full"), None)
    gains = [row_value(row, SPEED, metric) for metric in ("speedup", "speedup_memory")]
    words = [word for word in gains if word]
    if full is not None and (mine := kv_bytes(row)) is not None and (theirs := kv_bytes(full)) is not None:
        words.append(f"KV {show('kv_bytes', mine)} MiB instead of {show('kv_bytes', theirs)} MiB")
    for task in tasks_of([row]):
        metric = primary(group, task)
        said = row_value(row, task, metric)
        if said:
            words.append(f"{task}: {said}{_doubt(row, task, metric, _words(row))}")
    place = f" ({where})" if where else ""
    return [f"{row.key.label} against the full cache{place}: {'; '.join(words)}."] if words else []


def _doubt(row: Row, task: str, metric: str, comparisons: int) -> str:
    """Says when a difference to full is none that these items can show."""
    unclear = metric.endswith("_diff") and shown(row, task, metric, comparisons) == "not told apart"
    return " (no difference shown)" if unclear else ""


def _words(row: Row) -> int:
    """How many words the sentences on a row of D2O may say: to full and to a rival, in speed and in each task."""
    return 2 * (1 + len(tasks_of([row])))


def _against_rivals(row: Row, group: Sequence[Row]) -> list[str]:
    """The best rival of the same budget in each task, compared on the same items or rounds."""
    rivals = [other for other in group if other.key.budget == row.key.budget and not other.key.policy.startswith("d2o")]
    tasks = tasks_of([row])
    wheres = [(task, primary(group, task)) for task in tasks[:3]] + [(SPEED, "decode_tok_s")]
    words = []
    for task, metric in wheres:
        ranked = [other for other in _ranked([*rivals, row], task, metric) if other is not row]
        paired = RIVALS.get(metric)
        rival = f"{paired}:{ranked[0].key.policy}" if ranked and paired else ""
        value = row.value(task, rival)
        if paired and value is not None and value.value is not None:
            how = _how(shown(row, task, rival, _words(row) * len(rivals)), METRICS[paired])
            words.append(f"{how} {ranked[0].key.policy} in {task} ({said(paired, value)})")
    return [f"{row.key.label} is {'; '.join(words)}: each time the best rival of its budget."] if words else []


def _how(found: Verdict, metric: Metric) -> str:
    """What a paired difference or ratio shows, in words."""
    if found in ("not told apart", "impossible"):
        return "not told apart from" if found == "not told apart" else "impossibly far from"
    faster, slower = ("faster than", "slower than") if metric.kind == "ratio" else ("better than", "worse than")
    return faster if found == "better" else slower


def _bare(row: Row, task: str, metric: str) -> float:
    value = row.value(task, metric)
    return value.value if value is not None and value.value is not None else 0.0
