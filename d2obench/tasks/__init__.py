"""Quality tasks: how much information a compressed cache still holds.

There is one file per task. ``base`` defines what a task is, ``generate`` is the loop of tasks in which the model
answers, ``together`` lets several cells share the prompts that they read, ``data`` reads records, ``prompts``
makes prompts, ``scoring`` compares answers. Tasks import the cache, the models and the measurements; only
``run``, ``bridges`` and ``cli`` import tasks. The registry below maps names to import paths, so that looking up a task
imports neither torch nor datasets. ``speed`` is no task of this package: ``run`` measures timed cells itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from d2obench.errors import DataError, ModelError, UsageError
from d2obench.plugin import Registry
from d2obench.policies import parse_choice
from d2obench.record import Axes, Value
from d2obench.suite.definition import SPEED, is_prompts
from d2obench.suite.grammar import parse_budget, parse_shape, parse_spec, show_value
from d2obench.tasks.base import Cell, Evaluation, Item, Quality, Report, Task, TextBatch, parameters

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

__all__ = [
    "LONGBENCH",
    "REGISTRY",
    "Evaluation",
    "Item",
    "Task",
    "TextBatch",
    "batches",
    "conclude",
    "evaluate",
    "parse_task",
    "read_cell",
    "ready",
    "rescore",
]

LONGBENCH = (  # noqa: SIM905
    "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader gov_report qmsum multi_news "
    "vcsum trec triviaqa samsum lsht passage_count passage_retrieval_en passage_retrieval_zh lcc repobench-p"
).split()

LONGBENCH_E = (  # noqa: SIM905
    "qasper_e multifieldqa_en_e hotpotqa_e 2wikimqa_e gov_report_e multi_news_e trec_e triviaqa_e samsum_e "
    "passage_count_e passage_retrieval_en_e lcc_e repobench-p_e"
).split()
"""The sets of LongBench-E, whose contexts have evenly spread lengths."""

RULER = (  # noqa: SIM905
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue "
    "niah_multiquery vt cwe fwe qa_1 qa_2"
).split()

REGISTRY = Registry(
    "task",
    "d2obench.tasks",
    {
        "fidelity": "d2obench.tasks.fidelity:Fidelity",
        "recall": "d2obench.tasks.recall:Recall",
        "needle": "d2obench.tasks.needle:Needle",
        "gsm8k": "d2obench.tasks.gsm8k:Gsm8k",
        "coqa": "d2obench.tasks.coqa:Coqa",
        "truthfulqa": "d2obench.tasks.truthfulqa:TruthfulQA",
        "long-recall": "d2obench.tasks.long_recall:LongRecall",
        "math500": "d2obench.tasks.competition:Math500",
        "aime": "d2obench.tasks.competition:Aime",
        "lambada": "d2obench.tasks.lambada:Lambada",
        "kernels": "d2obench.tasks.kernels:Kernels",
        "diagnosis": "d2obench.tasks.diagnosis:Diagnosis",
        **{f"longbench/{name}": "d2obench.tasks.longbench:LongBench" for name in (*LONGBENCH, *LONGBENCH_E)},
        **{f"ruler/{name}": "d2obench.tasks.ruler:Ruler" for name in RULER},
        "longbench-v2": "d2obench.tasks.longbench_v2:LongBenchV2",
    },
    UsageError,
)


def parse_task(text: str) -> Task:
    """Parses a task such as ``recall(items=4)``.

    Raises:
        UsageError: an unknown task, an unknown parameter, or a value of the wrong type or range.
    """
    parts = parse_spec(text, "task").parts
    if len(parts) > 1:
        why = "tasks can't be joined by +"
        raise UsageError(f"can't read the task '{text}'", why=why, remedy="separate tasks with commas")
    name, params = parts[0].name, dict(parts[0].params)
    if name == SPEED:
        raise UsageError("'speed' is the timed task", why="it has no parameters", remedy="give it alone, as speed")
    cls = REGISTRY.get(name)
    known = parameters(cls)
    for key in params:
        if key not in known:
            raise UsageError(
                f"the task '{name}' has no parameter '{key}'", remedy=f"its parameters are {', '.join(known) or 'none'}"
            )
    try:
        task: Task = msgspec.convert({**params, "name": name}, cls)
    except msgspec.ValidationError as problem:
        why, _, path = str(problem).partition(" - at `$.")
        which = path.rstrip("`").partition("[")[0] or "a parameter"
        example = f"its default is {name}({which}={show_value(known[which])})" if which in known else ""
        raise UsageError(f"the task '{name}' can't use this value of {which}", why=why, remedy=example) from None
    return task


def read_cell(sent: Mapping[str, Any]) -> Cell:
    """Reads the cell that :meth:`d2obench.tasks.base.Cell.sent` wrote; ``id`` and ``hash`` may be missing.

    Raises:
        UsageError, PolicyError: an axis that can't be read.
    """
    axes = msgspec.convert(sent["axes"], Axes)
    return Cell(
        id=sent.get("id", ""),
        hash=sent.get("hash", ""),
        axes=axes,
        policy=parse_choice(axes.policy),
        budget=None if axes.budget is None else parse_budget(axes.budget),
        shape=None if axes.shape is None else parse_shape(axes.shape)[0],
        batch=axes.batch if axes.batch is None or isinstance(axes.batch, int) else "max",
        task=None if axes.task == SPEED else parse_task(axes.task),
    )


def evaluate(loaded: LoadedModel, cell: Cell, quality: Quality, report: Report) -> Evaluation:
    """Runs a cell's quality task in this process; see :meth:`d2obench.tasks.base.Task.evaluate`.

    A policy that carries something from one prompt to the next begins each cell without it.
    """
    if cell.policy.carries_over:
        cell = dataclasses.replace(cell, policy=dataclasses.replace(cell.policy))  # which builds its policy anew
    return _completed(cell, ready(loaded, cell, quality).evaluate(loaded, cell, quality, report))


def batches(loaded: LoadedModel, cell: Cell, quality: Quality) -> list[TextBatch]:
    """The texts of a cell's task; see :meth:`d2obench.tasks.base.Task.batches`."""
    return ready(loaded, cell, quality).batches(loaded, cell, quality)


def conclude(cell: Cell, quality: Quality, items: list[Item]) -> Evaluation:
    """The result of a cell from the items of all batches, in the order of their places."""
    assert cell.task is not None
    return _completed(cell, cell.task.conclude(cell, quality, items))


def ready(loaded: LoadedModel, cell: Cell, quality: Quality) -> Task:
    """The cell's task, if it can use the model and its data is that of the run."""
    task = cell.task
    if task is None:
        raise TypeError(f"the timed cell {cell.id} has no quality to evaluate")
    if task.sense and (not loaded.has_sense or loaded.tokenizer is None):
        raise ModelError(
            f"the task '{task.name}' can't use {loaded.name}",
            why="its weights are random or it has no tokenizer",
            remedy="use a model with real weights, for example --model embedded",
        )
    _check_data_unchanged(task.name, quality)
    return task


def _completed(cell: Cell, result: Evaluation) -> Evaluation:
    """The result with the decode paths of its items, and the flag of a cell that keeps more than it was asked to."""
    if paths := dict.fromkeys(item["decode_path"] for item in result.items if item.get("decode_path")):
        result.details["decode_path"] = "; ".join(paths)
    if _keeps_more_than_asked(cell, result):
        result.details["flags"] = [*result.details.get("flags", ()), "keeps more than asked"]
    return result


def _check_data_unchanged(name: str, quality: Quality) -> None:
    """Raises a DataError if a data file was edited during the run, because the record holds the digest of its earlier
    content."""
    from d2obench.tasks.data import digest_of

    for key, path in quality.data.items():
        known = quality.digests.get(key) if key == name or is_prompts(key) else None
        if known and digest_of(path) != known:
            raise DataError(f"the data for '{key}' changed during the run", why=path, remedy="start a new run")


def _keeps_more_than_asked(cell: Cell, result: Evaluation) -> bool:
    """Whether a policy holds more than its budget: its cache grows while decoding, or it keeps more of the prompts."""
    if cell.budget is None or cell.budget.ratio == 1.0:
        return False
    if cell.policy.protects_prompt:  # the budget says nothing about the prompt
        return False
    kept = result.values.get("budget_effective")
    if cell.policy.yardstick is not None or cell.policy.policy.grows:
        return True
    lengths = [item["prompt_tokens"] for item in result.items if item.get("prompt_tokens")]
    if kept is None or kept.value is None or not lengths:
        return False
    allowed = sum((cell.budget.of(tokens) + 1) / tokens for tokens in lengths) / len(lengths)
    return bool(kept.value > allowed)


def rescore(text: str, items: list[Item]) -> dict[str, Value]:
    """Computes the figures of a task again from its recorded items, without the model."""
    return parse_task(text).rescore(items)
