"""The first sentences of a report: what D2O gains and costs, and what the run can't tell.

D2O with its smallest budget, in the largest setting in which it was timed, is compared with the full cache and with
every policy at the same budget; another form of D2O is named where it does better. A run without D2O names the best
policies instead. A run of several budgets also names the policies that are the best choice at none of them. Each word
such as faster is based on an interval (:mod:`d2obench.report.evidence`), and every figure quoted here is in the tables,
too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from d2obench.metric import METRICS, show
from d2obench.record import Run, Value
from d2obench.report.derive import without_mass
from d2obench.report.evidence import NOT_MEASURED, Judged, busy, claim, first_place, processes, ranking, shown
from d2obench.report.rows import Key, Row, grouped, held, kv_bytes, primary, short_name, tasks_of, volume
from d2obench.report.view import ENDINGS, bounds_in_words, signed
from d2obench.stats import claims
from d2obench.stats.claims import Claim, Verdict
from d2obench.stats.ratios import FULL
from d2obench.suite.definition import SPEED

OURS = "d2o"
MAX_TASKS, MAX_NAMES = 2, 4
"""Tasks that are spoken of, and names in a list."""
SPEEDS = (("decode speed", ("speedup", "decode_rival")), ("time to first token", ("prefill_cost",)))
"""Words for a kind of speed, and the ratios that tell it."""
PAIRED = {"kl": "kl_rival", "score_diff": "score_rival", "gold_bpb_diff": "gold_bpb_rival"}
"""The metric that represents a task → the difference of this metric to another policy on the same items."""
OUTCOMES = {"met": "met", "missed": "missed", "no verdict": "without a verdict", NOT_MEASURED: NOT_MEASURED}
"""Outcome of a target → the word for it in a sentence."""


class Finding(NamedTuple):
    """A ratio or a difference of D2O to another policy, and what it shows."""

    task: str
    metric: str
    value: Value
    verdict: Verdict

    @property
    def other(self) -> str:
        """The policy that D2O is compared with."""
        return self.metric.partition(":")[2] or FULL


class Words(NamedTuple):
    """Sentences, and the claims in them as data."""

    sentences: tuple[str, ...]
    claims: tuple[Claim, ...] = ()


def of_targets(judged: Sequence[Judged]) -> tuple[str, ...]:
    """``Targets of the suite: 5 met, 1 missed (decode, ÷ streaming of d2o@0.2).``; nothing if there is no target."""
    if not judged:
        return ()
    counts = Counter(one.outcome for one in judged)
    wrong = [one for one in judged if one.outcome == "missed"]
    missed = [f"{METRICS[one.goal.metric].header} of {one.cells[0].key.described}" for one in wrong]
    named = f" ({'; '.join(missed[:MAX_NAMES])}{' and more' if len(missed) > MAX_NAMES else ''})"
    parts = [f"{counts[o]} {word}{named if o == 'missed' else ''}" for o, word in OUTCOMES.items() if counts[o]]
    return (f"Targets of the suite: {', '.join(parts)}.",)


def first_words(runs: Sequence[tuple[str, Run]], rows: Sequence[Row]) -> Words:
    """The sentences, the most important first."""
    group = main_group(rows)
    ours = _ours(group)
    found = _about(ours, group) if ours is not None else _leaders(group)
    more, ended = [_merging(group), _beaten(group)], _ended(runs)
    sentences = [*found.sentences, *(line for one in more for line in one.sentences), *([ended] if ended else [])]
    if not sentences:
        return Words(("Every planned cell gave its figures. There is nothing to compare them with.",))
    return Words(tuple(sentences), (*found.claims, *(told for one in more for told in one.claims)))


def main_group(rows: Sequence[Row]) -> list[Row]:
    """The rows of the largest setting in which D2O was timed, or in which any policies were timed if D2O was not."""

    def weight(group: Sequence[Row]) -> tuple[bool, bool, bool, int]:
        timed = [row for row in group if row.speed is not None and row.speed.record.status == "ok"]
        d2o = any(_is_ours(row) for row in timed)
        return d2o, len(timed) > 1, any(_is_ours(row) for row in group), volume(group[0].key)

    groups = grouped(rows)
    return max(groups, key=weight) if groups else []


def _is_ours(row: Row) -> bool:
    return row.key.policy.split("(")[0].split("+")[0] == OURS


def _ours(group: Sequence[Row]) -> Row | None:
    """D2O at its smallest budget, with the paper's settings if the run has them."""

    def order(row: Row) -> tuple[bool, float]:
        budget = row.value(SPEED, "budget_effective")
        asked = float(row.key.budget) if row.key.budget else 0.0
        return row.key.policy != OURS, (budget.value if budget and budget.value is not None else asked)

    good = [row for row in group if _is_ours(row) and any(cell.record.status == "ok" for cell in row.cells)]
    return min(good, key=order) if good else None


def _about(ours: Row, group: Sequence[Row]) -> Words:
    """Four sentences: D2O against the full cache, D2O against its rivals, the form of D2O that loses less quality than
    most of them, and what the run can't tell."""
    # 1. the rivals, and the ratios and differences that say something about them or about the full cache
    alike = [row for row in group if row.key.budget == ours.key.budget is not None and not row.foreign]
    alike = [row for row in alike if _quantised(row) == _quantised(ours)]
    rivals = [row for row in alike if not _is_ours(row)]
    forms = [row for row in alike if _is_ours(row) and row is not ours]
    tasks = [(task, primary(group, task)) for task in tasks_of([ours])[:MAX_TASKS]]
    questions = [
        (SPEED, "speedup"),
        (SPEED, "prefill_cost"),
        *((task, metric) for task, metric in tasks if metric.endswith("_diff")),
    ]
    quality = [
        (task, f"{PAIRED[metric]}:{rival.key.policy}") for rival in rivals for task, metric in tasks if metric in PAIRED
    ]
    questions += [*quality, *((SPEED, f"decode_rival:{rival.key.policy}") for rival in rivals)]
    asked = {form.key: _answered(form, quality) for form in forms} | {ours.key: _answered(ours, questions)}
    # 2. what each of them shows, at a level at which all of these answers are right together
    count = sum(map(len, asked.values()))
    found = {
        row.key: [Finding(*one, shown(row, *one[:2], count, group)) for one in asked[row.key]] for row in (ours, *forms)
    }
    best = max(forms, key=lambda form: (_balance(found[form.key]), _merit(form, tasks)), default=ours)
    # 3. the sentences
    findings = found[ours.key]
    full = next((row for row in group if row.key.policy == FULL), None)
    to_full = [one for one in findings if one.other == FULL]
    to_rivals = [one for one in findings if one.other != FULL]
    sentences = [
        _against_full(ours, full, to_full, tasks),
        _against_rivals(ours, to_rivals, "Against the other policies with the same budget"),
        _untold(ours, findings, group),
    ]
    told = [claim(ours, one.task, one.metric, one.verdict, count) for one in findings]
    if _balance(found[best.key]) > max(0, _balance(findings)):
        hardest_first = sorted(found[best.key], key=lambda one: abs(one.value.value or 0.0))
        sentences.insert(2, _against_rivals(best, hardest_first, "Of the other forms of D2O"))
        told += [claim(best, one.task, one.metric, one.verdict, count) for one in found[best.key]]
    return Words(tuple(filter(None, sentences)), tuple(one for one in told if one is not None))


def _quantised(row: Row) -> str:
    """What stands behind the ``+`` of a policy: with fewer bits it holds fewer bytes at the same budget."""
    return row.key.policy.partition("+")[2]


def _answered(row: Row, questions: Sequence[tuple[str, str]]) -> list[tuple[str, str, Value]]:
    """The questions that have a figure in a row, with it."""
    return [(task, metric, value) for task, metric in questions if _known(value := row.value(task, metric)) and value]


def _balance(findings: Sequence[Finding]) -> int:
    """How many of the comparisons of quality are shown to be better, minus those that are shown to be worse."""
    words = Counter(one.verdict for one in findings if one.task != SPEED and one.other != FULL)
    return words["better"] - words["worse"]


def _merit(row: Row, tasks: Sequence[tuple[str, str]]) -> float:
    """The figure of the first task, larger where the quality is better: it decides between forms of equal balance."""
    value = row.value(*tasks[0]) if tasks else None
    figure = value.value if value is not None else None
    return -math.inf if figure is None else figure if METRICS[tasks[0][1]].direction == "higher" else -figure


def _against_full(ours: Row, full: Row | None, findings: Sequence[Finding], tasks: Sequence[tuple[str, str]]) -> str:
    parts = []
    if full is not None and (mine := kv_bytes(ours)) is not None and (theirs := kv_bytes(full)) is not None:
        parts.append(f"holds {show('kv_bytes', mine)} MiB of keys and values instead of {show('kv_bytes', theirs)} MiB")
    for one in findings:
        if one.metric == "speedup" and one.verdict in ("better", "worse"):
            pace = "decodes" if one.verdict == "better" else "decodes only"
            parts.append(f"{pace} {show('speedup', one.value.value)} times as fast ({_basis(ours, one)})")
        if one.metric == "prefill_cost" and one.verdict in ("better", "worse"):
            wait = show("prefill_cost", one.value.value)
            parts.append(f"takes {wait} times as long to the first token ({_basis(ours, one)})")
    for task, metric in tasks:
        value = ours.value(task, metric)
        if value is None or value.value is None:
            continue
        what = METRICS[metric].header.replace(" − full", "")
        if metric == "kl":
            parts.append(f"moves the next-token distribution by a KL of {_figure(metric, value)}")
        elif metric.endswith("_diff"):
            told = next((one.verdict for one in findings if (one.task, one.metric) == (task, metric)), "not told apart")
            verb = {"better": "gains", "worse": "loses"}.get(told)
            if verb:
                parts.append(f"{verb} quality on {short_name(task)}: {what} {_figure(metric, value)}")
        else:
            parts.append(f"reaches a {what} of {_figure(metric, value)} on {short_name(task)}")
    if not parts:
        return ""
    return f"{_at(ours.key)}{_named(ours)} {_listed(parts)}."


def _against_rivals(ours: Row, findings: Sequence[Finding], beginning: str) -> str:
    words = {
        (True, "better"): "decodes faster than", (True, "worse"): "decodes slower than",
        (False, "better"): "loses less quality than", (False, "worse"): "loses more quality than",
    }  # fmt: skip
    parts = []
    for (timed, verdict), verb in words.items():
        told = [one for one in findings if (one.task == SPEED) is timed and one.verdict == verdict]
        names = [_beside(ours, one) for one in told]
        if names:
            parts.append(f"{verb} {_listed(_few(names))}")
    if not parts:
        return ""
    return f"{beginning}, {_named(ours)} {_listed(parts)}."


def _beside(ours: Row, one: Finding) -> str:
    """``h2o (fidelity: KL +0.15 nats/token, 95 % interval 0.05 … 0.25)``."""
    key, task = one.metric.partition(":")[0], "" if one.task == SPEED else f"{short_name(one.task)}: "
    what = METRICS[key].header.replace(" − rival's", "").replace("decode ÷ rival's", "")
    text = f"{what} {signed(key, one.value.value)} {METRICS[key].unit}".strip()
    return f"{one.other} ({task}{text}, {_basis(ours, one)})"


def _basis(ours: Row, one: Finding) -> str:
    """The interval that a word is based on, and the remark that times come from one process only."""
    note = claims.resting_on(processes(ours)) if claims.timed(one.metric) else ""
    return ", ".join(filter(None, (bounds_in_words(one.metric, one.value), note)))


def _untold(ours: Row, findings: Sequence[Finding], group: Sequence[Row]) -> str:
    """What the run can't tell, and which options would narrow its intervals."""
    parts = []
    sentences = []
    if busy(ours) or any(busy(row) for row in group if row.key.policy == FULL):
        findings = [one for one in findings if one.task != SPEED]
        sentences.append("There is no verdict on speed, because the machine was busy.")
    for what, metrics in SPEEDS:
        parts += _names([one for one in findings if one.metric.partition(":")[0] in metrics], what)
    for task in dict.fromkeys(one.task for one in findings if one.task != SPEED):
        parts += _names([one for one in findings if one.task == task], f"quality on {short_name(task)}")
    if wrong := list(dict.fromkeys(one.other for one in findings if one.verdict == "impossible")):
        sentences.append(
            f"The decode speed measured against {_listed(wrong)} is more than the bytes of a step allow, which is "
            "impossible: something disturbed the measurement, so it says nothing."
        )
    if parts:
        more = [
            words
            for words, there in (
                ("more rounds (--rounds) narrow the intervals of speed", any(one.task == SPEED for one in findings)),
                ("more items (--limit) those of quality", any(one.task != SPEED for one in findings)),
            )
            if there
        ]
        hint = _listed(more) if len(more) > 1 else "".join(more).replace("those", "narrow the intervals")
        sentences.append(
            f"This run can't tell {_named(ours)} apart from {_listed(parts, ';')}. {hint[:1].upper()}{hint[1:]}."
        )
    return " ".join(sentences)


def _names(findings: Sequence[Finding], what: str) -> list[str]:
    """``h2o and streaming in decode speed``: the policies that were not told apart from D2O."""
    names = [one.other for one in findings if one.verdict == "not told apart"]
    return [f"{_listed(_few(names))} in {what}"] if names else []


def _leaders(group: Sequence[Row]) -> Words:
    """Sentences about a run without D2O: which policy leads in what, or that the policies were not told apart."""
    asked = [("Fastest decode", SPEED, "decode_tok_s"), ("Shortest time to first token", SPEED, "ttft_s")]
    asked += [("Smallest KV cache", SPEED, "kv_bytes")]
    asked += [(f"Least loss of quality on {short_name(task)}", task, primary(group, task)) for task in tasks_of(group)]
    asked = asked[: 3 + MAX_TASKS]
    # the sentences have to be right together, so every interval that one of them needs is counted
    rankings = [ranking(group, task, metric) for _, task, metric in asked if METRICS[metric].kind != "exact"]
    count = max(1, sum(found.compared for found in rankings if found is not None))
    sentences: list[str] = []
    told: list[Claim] = []
    for what, task, metric in asked:
        found = ranking(group, task, metric, count)
        if found is None:
            continue
        value = found.best.value(task, metric)
        if value is None or not found.behind:
            sentences.append(f"{what}: the policies were not told apart.")
            continue
        note = claims.resting_on(processes(found.best)) if claims.timed(metric) else ""
        near = _listed(_few([row.key.label for row in found.near]))
        same = f"; not told apart from it: {near}" if near else ""
        name, figure = found.best.key.label, _figure(metric, value)
        sentences.append(f"{what}: {name} with {figure}{f', {note}' if note else ''}{same}.")
        told.append(first_place("best", found.best, found.behind, task, metric, count))
    return Words(tuple(sentences), tuple(told))


def _merging(group: Sequence[Row]) -> Words:
    """What merging by mass changes, at the smallest budget, for each policy that a run has with and without it."""
    sentences: list[str] = []
    told: list[Claim] = []
    for task in tasks_of(group)[:MAX_TASKS]:
        paired = PAIRED.get(primary(group, task), "")
        pairs = [(row, f"{paired}:{without_mass(row.key.policy)}") for row in group if "merge=mass" in row.key.policy]
        pairs = [(row, name) for row, name in pairs if _known(row.value(task, name))]
        smallest = min((float(row.key.budget or 1) for row, _ in pairs), default=None)
        pairs = [(row, name) for row, name in pairs if float(row.key.budget or 1) == smallest]
        if not pairs:
            continue
        parts = []
        for row, name in pairs:
            plain = row.key._replace(policy=without_mass(row.key.policy)).label
            parts.append(f"{plain} by {_figure(name.partition(':')[0], row.value(task, name) or Value(None))}")
            told += filter(None, [claim(row, task, name, shown(row, task, name, len(pairs)), len(pairs))])
        what = METRICS[primary(group, task)].header
        sentences.append(
            f"On {short_name(task)}, merging by mass what is evicted changes {what} of {_listed(parts, ';')}."
        )
    return Words(tuple(sentences), tuple(told))


def _beaten(group: Sequence[Row]) -> Words:
    """Which policies are never on the Pareto front of budget and quality: at each of several budgets, another policy
    with the same or a smaller one is shown to be better. Quantised policies hold fewer bytes and are left out."""
    sentences: list[str] = []
    told: list[Claim] = []
    for task in tasks_of(group)[:MAX_TASKS]:
        metric = primary(group, task)
        rows = [row for row in group if row.key.budget and not row.foreign and not _quantised(row)]
        rows = [row for row in rows if _known(row.value(task, metric)) and _known(row.value(task, "budget_effective"))]
        by_policy = {row.key.policy: [one for one in rows if one.key.policy == row.key.policy] for row in rows}
        # 1. D2O's differences on the same items tell more than two intervals; all that are looked at are counted
        names = {row.key: f"{PAIRED.get(metric)}:{row.key.policy}" for row in rows}
        paired = [(row, one) for row in rows for one in rows if _known(one.value(task, names[row.key]))]
        paired = [(row, one) for row, one in paired if one.key.budget == row.key.budget]
        count = len(rows) + len(paired)
        # 2. who beats each row
        beaten = {row.key: _beating(row, rows, task, metric, count) for row in rows}
        for row, one in paired:
            if held(one, task) <= held(row, task) and shown(one, task, names[row.key], count) == "better":
                beaten[row.key] = beaten[row.key] or claim(one, task, names[row.key], "better", count)
        # 3. policies of which that holds at every budget
        never = [name for name, own in by_policy.items() if len(own) > 1 and all(beaten[row.key] for row in own)]
        told += [found for name in never for row in by_policy[name] if (found := beaten[row.key]) is not None]
        if never:
            sentences.append(
                f"On {short_name(task)}, at every budget, another policy with the same or a smaller one is shown to be "
                f"better than {_listed(never)}."
            )
    return Words(tuple(sentences), tuple(told))


def _beating(row: Row, rows: Sequence[Row], task: str, metric: str, count: int) -> Claim | None:
    """The claim that one of the rows, which holds no more, is better than this one."""
    mine = row.value(task, metric)
    for one in rows:
        theirs = one.value(task, metric)
        if one is row or held(one, task) > held(row, task) or mine is None or theirs is None:
            continue
        if claims.apart(metric, theirs, mine, count) == "better":
            return first_place("best", one, [row], task, metric, count)
    return None


def _ended(runs: Sequence[tuple[str, Run]]) -> str:
    """How many planned cells gave no figures, and why; empty if all of them did."""
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


def _at(key: Key) -> str:
    """``With a prompt of 768 tokens, 32 generated ones and batch 4, ``."""
    prompt, plus, gen = (key.shape or "").partition("+")
    words = [f"a prompt of {prompt} tokens", f"{gen} generated ones"] if plus else []
    words += [f"batch {key.batch}"] if key.batch is not None else []
    return f"With {_listed(words)}, " if words else ""


def _named(row: Row) -> str:
    """``d2o with budget 0.2``."""
    return f"{row.key.policy} with budget {row.key.budget}" if row.key.budget else row.key.policy


def _figure(metric: str, value: Value) -> str:
    """A figure with its unit and its bounds, or with the remark that it has none because it comes from one sample."""
    text = f"{signed(metric, value.value)} {METRICS[metric].unit}".rstrip()
    varies = METRICS[metric].kind not in ("exact", "info") and value.kind != "exact"
    bounds = bounds_in_words(metric, value) or ("one sample, so no interval" if varies else "")
    return f"{text} ({bounds})" if bounds else text


def _few(names: Sequence[str]) -> list[str]:
    """At most MAX_NAMES of the names; the last is ``others`` if there are more."""
    return [*names] if len(names) <= MAX_NAMES else [*names[: MAX_NAMES - 1], "others"]


def _listed(words: Sequence[str], comma: str = ",") -> str:
    """``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{f'{comma} '.join(words[:-1])}{comma if comma == ';' else ''} and {words[-1]}"


def _known(value: Value | None) -> bool:
    return value is not None and value.value is not None
