"""How much work a quality task roughly is, known before its data is: for ``--dry-run``, and for nothing else.

Sizes of the sets are the published ones; prompt lengths are round figures for an English tokenizer, answers are taken
to be as long as they may be.
"""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

from d2obench.suite.definition import Quality
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Task


class Work(NamedTuple):
    """``items`` prompts of ``prompt`` tokens and ``new`` decode steps after each."""

    items: int
    prompt: int
    new: int


SETS = {"gsm8k": (1319, 700), "coqa": (500, 600), "truthfulqa": (817, 30), "lambada": (5153, 90)}
"""Task → records of its split, tokens of a prompt."""
LONGBENCH = (200, 10_000)
TURNS = 16
"""Questions of a CoQA story."""
CANDIDATES = 80
"""Steps that scoring TruthfulQA's candidates takes, beside the answer's."""


def work(task: Task, quality: Quality, shape: Shape | None, context: int) -> Work | None:
    """The work of one cell; None where it can't be told, as for a plug-in's task.

    Args:
        task: with its parameters.
        quality: whose ``limit`` bounds the items.
        shape: of the cell, where the task uses one.
        context: positions of the model; longer prompts are cut.
    """
    limits = getattr(task, "limits", None)
    new = limits().max_new if limits else 0
    if task.name == "fidelity" and shape is not None:
        return Work(_most(getattr(task, "documents"), quality), shape.prompt, shape.gen)  # noqa: B009 - full is run once for all
    if task.name == "kernels" and shape is not None:  # one more request warms up
        return Work((getattr(task, "requests") + 1) * quality.batch, shape.prompt, shape.gen)  # noqa: B009
    if task.name == "recall" and shape is not None:
        return Work(_most(getattr(task, "items"), quality), shape.prompt, 2 * new)  # noqa: B009 - the gold too
    if task.name == "needle":
        fit = [length for length in getattr(task, "contexts") if length + new <= context]  # noqa: B009
        points = len(fit) * len(getattr(task, "depths")) * getattr(task, "items")  # noqa: B009
        return Work(_most(points, quality), round(fmean(fit)), 2 * new) if fit else None
    known = LONGBENCH if task.name.startswith("longbench/") else SETS.get(task.name)
    if known is None:
        return None
    records, prompt = known
    items = _most(records, quality) * (TURNS if getattr(task, "turns", "") == "all" else 1)
    scored = CANDIDATES if getattr(task, "choices", False) else 0
    return Work(items, min(prompt, context - new), new + scored)


def _most(items: int, quality: Quality) -> int:
    return min(items, quality.limit or items)
