"""Waiting threads spin for some microseconds, and a user's own choice stands."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from d2obench.openmp_wait import SPIN_S, VARIABLE, bounded_spin, pause_s
from d2obench.run.worker_client import WorkerClient

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="measured on x86 only")


def test_the_count_stands_for_some_microseconds() -> None:
    count = int(bounded_spin({})[VARIABLE])
    assert SPIN_S / 2 < count * pause_s() < SPIN_S * 2
    assert 1e-10 < pause_s() < 1e-6  # from a few to some hundred cycles


@pytest.mark.parametrize("chosen", [{VARIABLE: "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_the_user_chose_stands(chosen: dict[str, str]) -> None:
    assert bounded_spin(chosen) == {}


def test_the_runtime_of_a_worker_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    env = WorkerClient().env
    told = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, VARIABLE: env[VARIABLE], "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{VARIABLE} = '{env[VARIABLE]}'" in told.stderr
