"""Quality tasks: how much a compressed cache still knows.

One file a task; ``base`` says what a task is, ``generate`` is the loop of those whose model answers, ``data`` reads
records, ``prompts`` and ``text`` make prompts, ``scoring`` compares answers. Tasks import the cache, the models and the
measurements; only ``run``, ``bridges`` and ``cli`` import tasks. The registry below maps names to import paths, so that
asking for a task imports neither torch nor datasets. The timed task, ``speed``, belongs to ``run``; only its name is
known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2obench.errors import DataError, ModelError, UsageError
from d2obench.plugin import Registry
from d2obench.record import Value
from d2obench.suite.grammar import parse_spec
from d2obench.tasks.base import Cell, Evaluation, Item, Quality, Report, Task

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

__all__ = ["LONGBENCH", "REGISTRY", "Evaluation", "Item", "Task", "evaluate", "parse_task", "rescore", "uses_shape"]

SPEED = "speed"
LONGBENCH = (  # noqa: SIM905
    "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader gov_report qmsum multi_news "
    "vcsum trec triviaqa samsum lsht passage_count passage_retrieval_en passage_retrieval_zh lcc repobench-p"
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
        "lambada": "d2obench.tasks.lambada:Lambada",
        "kernels": "d2obench.tasks.kernels:Kernels",
        **{f"longbench/{name}": "d2obench.tasks.longbench:LongBench" for name in LONGBENCH},
    },
    UsageError,
)


def parse_task(text: str) -> Task:
    """The task that ``recall(items=4)`` stands for, with its parameters set.

    Raises:
        UsageError: an unknown task, an unknown parameter, or a value of the wrong type or range.
    """
    import msgspec

    from d2obench.tasks.base import parameters

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
        raise UsageError(f"the task '{name}' can't take {path.rstrip('`') or 'its parameters'} so", why=why) from None
    return task


def uses_shape(text: str) -> bool:
    """Whether a task is run once for each shape of the suite; imports neither torch nor datasets."""
    return text.strip() == SPEED or parse_task(text).shaped


def evaluate(loaded: LoadedModel, cell: Cell, quality: Quality, report: Report) -> Evaluation:
    """Runs a cell's quality task in this process; see :meth:`d2obench.tasks.base.Task.evaluate`."""
    task = parse_task(cell.axes.task)
    if task.sense and (not loaded.has_sense or loaded.tokenizer is None):
        raise ModelError(
            f"the task '{task.name}' can't use {loaded.name}",
            why="its weights are random or it has no tokenizer",
            remedy="use a model with real weights, for example --model embedded",
        )
    _check_data_unchanged(task.name, quality)
    found = task.evaluate(loaded, cell, quality, report)
    if paths := dict.fromkeys(item["decode_path"] for item in found.items if item.get("decode_path")):
        found.details["decode_path"] = "; ".join(paths)
    if _keeps_more_than_asked(cell, found):
        found.details["flags"] = [*found.details.get("flags", ()), "keeps more than asked"]
    return found


def _check_data_unchanged(name: str, quality: Quality) -> None:
    """Raises where a data file was edited during the run: its figures would stand under the wrong digest."""
    from d2obench.tasks.data import digest_of

    path, known = quality.data.get(name), quality.digests.get(name)
    if path and known and digest_of(path) != known:
        raise DataError(f"the data for '{name}' changed during the run", why=path, remedy="start a new run")


def _keeps_more_than_asked(cell: Cell, found: Evaluation) -> bool:
    """Whether a policy held more than its budget: because it grows while decoding, or keeps more of the prompts."""
    from d2obench.policies import other, parse_policy
    from d2obench.suite.grammar import parse_budget

    axes = cell.axes
    if axes.budget is None:
        return False
    budget, kept = parse_budget(axes.budget), found.values.get("budget_effective")
    if budget.ratio == 1.0:
        return False
    if other(axes.policy) is not None or parse_policy(axes.policy).grows:
        return True
    lengths = [item["prompt_tokens"] for item in found.items if item.get("prompt_tokens")]
    if kept is None or kept.value is None or not lengths:
        return False
    allowed = sum((budget.of(tokens) + 1) / tokens for tokens in lengths) / len(lengths)
    return bool(kept.value > allowed)


def rescore(text: str, items: list[Item]) -> dict[str, Value]:
    """The figures of a task's recorded items, computed again without the model."""
    return parse_task(text).rescore(items)
