"""Suites: strict files, overrides as typed, the product of cells, and the suites that ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2obench.errors import D2OBenchError, SuiteError, UsageError
from d2obench.run.check import check_suite
from d2obench.run.plan import cells
from d2obench.suite.definition import Suite, load_suite, shipped

GOOD = """
name = "t"
about = "a test"
[axes]
policy = ["full", "d2o"]
budget = [0.2, 512]
shape = ["64+8"]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "t.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("[axes]", "[axis]"), "axis"),
        (('name = "t"', "name = 7"), "name"),
        (("[axes]", 'colour = "red"\n[axes]'), "colour"),
        (("shape =", "shapes ="), "shapes"),
        (("budget = [0.2, 512]", 'budget = ["0.2"]'), "axes.budget"),
        (("budget = [0.2, 512]", "budget = [true]"), "axes.budget"),
        (("[axes]", '[timing]\nrounds = "five"\n[axes]'), "timing.rounds"),
        (("[axes]", "[timing]\nrounds = 0\n[axes]"), "timing.rounds"),
        (("[axes]", "[timing]\nspeed = 1\n[axes]"), "timing"),
        (("[axes]", '[worker]\nmode = "both"\n[axes]'), "worker.mode"),
        (("[axes]", "[worker]\ntimeout_s = -1\n[axes]"), "worker.timeout_s"),
        (("[axes]", '[quality]\ndata = "x"\n[axes]'), "quality.data"),
        (("[axes]", "schema = 2\n[axes]"), "schema"),
        (('policy = ["full", "d2o"]', ""), "policy"),
        (('policy = ["full", "d2o"]', "policy = []"), "axes.policy"),
        (('policy = ["full", "d2o"]', 'policy = "full"'), "axes.policy"),
    ],
)
def test_a_wrong_key_or_type_names_file_and_key(tmp_path: Path, change: tuple[str, str], key: str) -> None:
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    assert path in str(caught.value)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["name = ", "\x00", "[axes\n", "name = 'a'\nname = 'b'"])
def test_what_is_no_toml_names_the_file(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SuiteError, match=r"t\.toml is not valid TOML"):
        load_suite(path)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="can't read the suite"):
        load_suite(str(tmp_path / "none.toml"))
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SuiteError, match="can't read the suite"):
        load_suite(str(tmp_path / "b.toml"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SuiteError, match=r"unknown suite 'quik'.*quick"):
        load_suite("quik")


@pytest.mark.parametrize(
    ("key", "text", "where", "expected"),
    [
        ("axes.policy", "d2o(merge=values,beta=0.5),h2o", ("axes", "policy"), ("d2o(merge=values,beta=0.5)", "h2o")),
        ("axes.budget", "0.2,512", ("axes", "budget"), (0.2, 512)),
        ("axes.batch", "1,8,max", ("axes", "batch"), (1, 8, "max")),
        ("axes.shape", "64+8,8..16*2+4", ("axes", "shape"), ("64+8", "8..16*2+4")),
        ("axes.seed", "0,1", ("axes", "seed"), (0, 1)),
        ("timing.rounds", "9", ("timing", "rounds"), 9),
        ("timing.decode", "sampled", ("timing", "decode"), "sampled"),
        ("worker.timeout_s", "2.5", ("worker", "timeout_s"), 2.5),
        ("quality.data.gsm8k", "/a/b.json", ("quality", "data"), {"gsm8k": "/a/b.json"}),
    ],
)
def test_overrides_are_read_as_typed(
    tmp_path: Path, key: str, text: str, where: tuple[str, str], expected: Any
) -> None:
    suite = load_suite(write(tmp_path, GOOD), {key: text})
    assert getattr(getattr(suite, where[0]), where[1]) == expected


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("axes.budget", "half"), ("axes.budget", "0"), ("axes.budget", "-0.5"), ("axes.shape", "64"),
        ("axes.batch", "0"),
        ("axes.batch", "many"), ("axes.policy", "d2o("), ("axes.dtype", "float64"), ("axes.colour", "red"),
        ("timing.rounds", "x"), ("name.x", "1"), ("axes", "1"), ("timing.rounds", "1\n[axes]\npolicy=['full']"),
        ("axes.policy", ""), ("axes.task", "speed,,recall"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_one_clear_error(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises((SuiteError, UsageError)) as caught:
        load_suite(write(tmp_path, GOOD), {key: text})
    assert isinstance(caught.value, D2OBenchError)


def test_cells_are_the_product_and_full_takes_no_budget(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, GOOD), {"axes.shape": "64+8,32+8", "axes.batch": "1,2"})
    found = cells(suite)
    assert len(found) == 2 * 2 * (1 + 2)
    assert len({cell.id for cell in found}) == len({cell.hash for cell in found}) == len(found)
    assert {cell.axes.budget for cell in found if cell.axes.policy == "full"} == {None}
    assert {cell.axes.budget for cell in found if cell.axes.policy == "d2o"} == {"0.2", "512"}


def test_a_shape_is_needed_where_a_task_uses_one(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="needs a shape"):
        cells(load_suite(write(tmp_path, GOOD.replace('shape = ["64+8"]', ""))))


def test_the_hash_covers_what_a_result_depends_on_and_nothing_else(tmp_path: Path) -> None:
    def hashes(**overrides: str) -> list[str]:
        changes = {key.replace("__", "."): value for key, value in overrides.items()}
        return [cell.hash for cell in cells(load_suite(write(tmp_path, GOOD), changes))]

    assert hashes() == hashes(worker__timeout_s="5")
    assert hashes() == hashes(quality__limit="3")  # only speed cells here
    assert not set(hashes()) & set(hashes(timing__rounds="4", timing__max_rounds="4"))
    assert not set(hashes()) & set(hashes(axes__seed="1"))
    assert not set(hashes()) & set(hashes(worker__threads="1"))


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_suite_can_run(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.about.endswith(".")
    check_suite(suite)
    found = cells(suite)
    assert len({cell.id for cell in found}) == len(found) > 0


def test_the_paper_suite_has_the_papers_shapes_and_budgets() -> None:
    suite: Suite = load_suite("paper-throughput")
    assert suite.axes.shape == ("256+1024", "512+512", "512+4096", "2048+8192")
    assert suite.axes.budget == (0.2, 0.4, 0.6, 0.8)
