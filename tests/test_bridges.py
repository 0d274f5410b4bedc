"""What holds of the bridges whether or not the tools they lead to are installed."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2obench.bridges import lm_eval
from d2obench.bridges.lm_eval_model import batches, window


def test_without_the_harness_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    assert lm_eval.main() == 2
    wanted = "d2obench: this command needs lm-evaluation-harness; install it: pip install 'd2obench[lm-eval]'\n"
    assert capsys.readouterr().err == wanted


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, d2obench.bridges.lm_eval; print({'torch', 'transformers', 'lm_eval'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


sizes = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 60)).filter(lambda s: sum(s) <= 100), max_size=12)


@given(sizes, st.integers(1, 5))
def test_batches_hold_everything_once_and_fit(found: list[tuple[int, int]], batch: int) -> None:
    parts = list(batches(found, batch, 100))
    assert sorted(i for part in parts for i in part) == list(range(len(found)))
    for part in parts:
        prompts, news = zip(*(found[i] for i in part), strict=True)
        assert len(part) <= batch
        assert max(prompts) - 1 + max(news) <= 100
        assert (1 in prompts) == (max(prompts) == 1)
    assert all(found[a[-1]][0] >= found[b[0]][0] for a, b in pairwise(parts))


@given(st.integers(1, 80), st.integers(0, 40), st.booleans())
def test_a_window_scores_the_whole_continuation_once(before: int, after: int, rolling: bool) -> None:
    context, continuation = list(range(before)), list(range(1000, 1000 + after))
    item = window(context, continuation, 60, rolling=rolling)
    assert [*item.prompt[item.opening :], *item.rest] == continuation
    assert len(item.prompt) + len(item.rest) <= 61
    assert item.prompt[: item.opening] == tuple(context[-item.opening :])
    if rolling:
        assert len(item.rest) <= len(item.prompt)
    elif item.opening > 1:
        assert len(item.prompt) == item.opening
