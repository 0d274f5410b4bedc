"""The grammar of policies, tasks, budgets, shapes and lists."""

from __future__ import annotations

import contextlib
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2obench.errors import UsageError
from d2obench.suite.grammar import (
    Budget,
    Part,
    Shape,
    Spec,
    parse_bound,
    parse_budget,
    parse_duration,
    parse_memory,
    parse_numbers,
    parse_shape,
    parse_spec,
    split_list,
)

NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=6).filter(
    lambda name: name not in ("true", "false", "none")
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(-1e9, 1e9)
    | NAMES.filter(lambda n: n not in ("nan", "inf"))
)
PARTS = st.builds(Part, NAMES, st.dictionaries(NAMES, SCALARS | st.lists(SCALARS, max_size=3), max_size=3))


@given(st.lists(PARTS, min_size=1, max_size=3))
def test_what_is_written_is_read_back(parts: list[Part]) -> None:
    spec = Spec(tuple(parts))
    assert parse_spec(str(spec)) == spec


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (
        parse_spec,
        parse_budget,
        parse_shape,
        parse_numbers,
        split_list,
        lambda word: parse_memory(word, 100),
    ):
        with contextlib.suppress(UsageError):
            parse(text)


def test_parts_and_parameters() -> None:
    spec = parse_spec("d2o(merge=values,exempt=[0,1],beta=0.5,alpha=none,inherit=true)+quant(bits=4)")
    assert spec.parts[0].name == "d2o"
    assert spec.parts[0].params == {"merge": "values", "exempt": [0, 1], "beta": 0.5, "alpha": None, "inherit": True}
    assert spec.parts[1] == Part("quant", {"bits": 4})


@pytest.mark.parametrize(
    "text", ["", "d2o(", "d2o(merge)", "d2o)", "d2o(a=1,,b=2)", "+d2o", "d2o+", "d2o x", "d2o(1=2)", "(a=1)"]
)
def test_a_broken_policy_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.2", Budget(ratio=0.2)),
        (0.2, Budget(ratio=0.2)),
        ("1.0", Budget(ratio=1.0)),
        ("2e-1", Budget(ratio=0.2)),
        ("512", Budget(tokens=512)),
        (512, Budget(tokens=512)),
        ("1", Budget(tokens=1)),
    ],
)
def test_a_budget_with_a_point_is_a_ratio_and_a_whole_number_is_tokens(text: str | float, expected: Budget) -> None:
    assert parse_budget(text) == expected
    assert parse_budget(str(expected)) == expected


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "1.5", "-0.2", "nan", "inf", "1e400", "", "20%", "half", True])
def test_a_budget_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="budget"):
        parse_budget(text)


@given(st.floats(0.001, 1), st.integers(1, 10**6))
def test_a_ratio_keeps_its_share_and_never_nothing(ratio: float, prompt: int) -> None:
    kept = Budget(ratio=ratio).of(prompt)
    assert 1 <= kept <= prompt
    assert abs(kept - ratio * prompt) <= 0.5 or kept == 1


def test_a_count_of_tokens_is_kept_as_it_is() -> None:
    assert Budget(tokens=512).of(10) == 512


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2048+8192", [(2048, 8192)]),
        ("512..2048*2+64", [(512, 64), (1024, 64), (2048, 64)]),
        ("512..1536+512+64", [(512, 64), (1024, 64), (1536, 64)]),
        ("8+16..64*2", [(8, 16), (8, 32), (8, 64)]),
        ("1..3*2+1..3*2", [(1, 1), (1, 2), (2, 1), (2, 2)]),
    ],
)
def test_shapes(text: str, expected: list[tuple[int, int]]) -> None:
    assert parse_shape(text) == [Shape(*pair) for pair in expected]


@pytest.mark.parametrize(
    "text", ["", "512", "512+", "+64", "512+0", "0+64", "-1+64", "512..2048+64", "2048..512*2+64", "5.5+2", "8..16*1+4"]
)
def test_a_broken_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_shape(text)


@pytest.mark.parametrize("text", ["1..99999999+1", "1..2", "8..4*2", "²", "1_000", "٣"])
def test_an_endless_or_odd_range_is_refused(text: str) -> None:
    if text == "٣":  # a digit of another script is a number to Python too
        assert parse_numbers(text) == [3]
        return
    with pytest.raises(UsageError):
        parse_numbers(text)


def test_commas_inside_brackets_do_not_split() -> None:
    assert split_list("d2o(a=1,b=[2,3]),h2o , full") == ["d2o(a=1,b=[2,3])", "h2o", "full"]


@pytest.mark.parametrize(
    ("text", "expected"), [("24GiB", 24 * 2**30), ("500MB", 500 * 10**6), ("0.5", 50), ("1.5KiB", 1536), ("1", 100)]
)
def test_memory(text: str, expected: int) -> None:
    assert parse_memory(text, 100) == expected


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "24", "1.5", "lots", "24 gib", "nan", "1e9"])
def test_a_broken_memory_limit_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="memory limit"):
        parse_memory(text, 100)


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("10m", 600), ("2h", 7200), (" 1.5 m ", 90), ("30s", 30)])
def test_durations(text: str, expected: float) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "abc", "90", "1s", "29.9s", "-3m", "3 min", "1e3s", "nan", "3M"])
def test_a_broken_or_short_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "recorded", "shown", "bound"),
    [
        ("≤ 60 ms", "s", "ms", (None, 0.06)),
        ("<= 0.06", "s", "ms", (None, 0.06)),
        (">=2 GiB", "bytes", "MiB", (2 * 2**30, None)),
        ("≥ 90 %", "", "%", (0.9, None)),
        ("≤ 0.3", "nats", "nats/token", (None, 0.3)),
        ("≤ 0.3 nats/token", "nats", "nats/token", (None, 0.3)),
        ("≥ 1e2 tok/s", "tok/s", "tok/s", (100.0, None)),
    ],
)
def test_bounds(text: str, recorded: str, shown: str, bound: tuple[float | None, float | None]) -> None:
    assert parse_bound(text, recorded, shown) == pytest.approx(bound)


@pytest.mark.parametrize("text", ["60 ms", "< 60 ms", "≤ 60 km", "≤ -1", "≤", "", "≤ 60 ms, or so"])
def test_bounds_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="can't read the bound"):
        parse_bound(text, "s", "ms")
