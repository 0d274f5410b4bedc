"""Names, parameters and the lightness of asking about a task."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from d2obench.errors import UsageError
from d2obench.metric import METRICS
from d2obench.suite.definition import SPEED, load_suite
from d2obench.tasks import LONGBENCH, REGISTRY, parse_task
from d2obench.tasks.base import parameters, values_of
from d2obench.tasks.longbench import RULES, SETS


def test_asking_about_shapes_imports_nothing_heavy() -> None:
    script = (
        "import sys; from d2obench.tasks import parse_task, REGISTRY\n"
        "assert parse_task('fidelity(documents=2)').shaped and parse_task('recall').shaped\n"
        "assert parse_task('kernels(steps=2)').shaped\n"
        "rest = set(REGISTRY.names()) - {'fidelity', 'recall', 'kernels', 'diagnosis'}\n"
        "assert not any(parse_task(name).shaped for name in rest)\n"
        "heavy = {'torch', 'datasets', 'transformers', 'pandas', 'numpy', 'jieba', 'sacrebleu'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_task_is_documented_and_has_defaults(name: str) -> None:
    task = parse_task(name)
    assert task.name == name
    assert re.fullmatch(r"[A-Z].{20,}\.", (type(task).__doc__ or "").strip().partition("\n")[0])
    assert "name" not in parameters(type(task))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recal", "did you mean 'recall'"),
        ("recall(length=3)", "no parameter 'length'; its parameters are items, query, template"),
        (
            "recall(items=few)",
            "can't use this value of items: Expected `int`, got `str`; its default is recall(items=8)",
        ),
        ("recall(items=0)", "Expected `int` >= 1"),
        ("recall(name=x)", "no parameter 'name'"),
        ("needle(depths=[0.5,2])", "can't use this value of depths"),
        ("needle(contexts=[])", "can't use this value of contexts"),
        ("needle(kind=pin)", "can't use this value of kind"),
        ("recall+needle", "can't be joined"),
        ("speed(rounds=3)", "has no parameters"),
        ("longbench/none", "unknown task"),
    ],
)
def test_a_wrong_task_is_one_clear_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        parse_task(text)
    assert "\n" not in str(caught.value)


def test_longbench_has_its_21_sets_each_with_a_rule() -> None:
    assert list(SETS) == LONGBENCH
    assert len(LONGBENCH) == 21
    for found in SETS.values():
        assert found.rule in RULES
        assert "{context}" in found.template


@pytest.mark.parametrize("name", ["paper-accuracy", "longbench", "needle", "fidelity"])
def test_shipped_accuracy_suites_name_known_tasks(name: str) -> None:
    suite = load_suite(name)
    assert [parse_task(task).name for task in suite.axes.task]
    assert bool(suite.axes.shape) == any(task == SPEED or parse_task(task).shaped for task in suite.axes.task)


def test_values_are_clustered_by_document() -> None:
    items = [{"document": str(i // 10), "score": float(i // 10 % 2), "nll": [1.0, 2.0]} for i in range(40)]
    found = values_of(items)
    assert list(found) == [key for key in METRICS if key in found]
    assert (found["score"].value, found["score"].n) == (0.5, 4)  # documents, not items
    spread = (found["score"].hi or 0) - (found["score"].lo or 0)
    alone = values_of([{**item, "document": str(i)} for i, item in enumerate(items)])["score"]
    assert spread > 1.5 * ((alone.hi or 0) - (alone.lo or 0))
    assert found["nll"].value == 1.5
    assert found["ppl"].value == pytest.approx(4.4816890703)


def test_an_item_without_a_figure_is_left_out_of_that_figure_only() -> None:
    found = values_of([{"document": "a", "score": 1.0, "mc1": None}, {"document": "b", "score": 0.0, "mc1": 1.0}])
    assert (found["score"].n, found["mc1"].n) == (2, 1)
    assert values_of([]) == {}


def test_answers_that_are_all_wrong_leave_room_for_doubt_and_a_distance_of_zero_does_not() -> None:
    items = [{"document": str(i), "score": 0.0, "kl": [0.0, 0.0]} for i in range(20)]
    found = values_of(items)
    assert (found["score"].lo, found["score"].value) == (0, 0)
    assert found["score"].hi == pytest.approx(0.1684, abs=1e-4)  # Clopper and Pearson's bound for 0 of 20
    assert (found["kl"].lo, found["kl"].hi) == (0, 0)
