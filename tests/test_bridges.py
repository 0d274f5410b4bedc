"""What holds of the bridges whether or not the tools they lead to are installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from d2obench.bridges import lm_eval


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
