"""No test depends on how fast the machine is: none sleeps or measures a duration.

A test waits for what happens (``waiting.wait_for``), counts what was done, or moves a clock of its own.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CLOCKS = {
    "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "process_time_ns", "sleep",
    "thread_time", "thread_time_ns", "timeit", "Timer",
}  # fmt: skip
MODULES = {"time", "threading", "timeit"}


def clocks_of(code: str) -> set[str]:
    """The clocks that a module uses, as it names them."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            found |= {node.attr} & CLOCKS
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found |= {name.name for name in node.names} & CLOCKS
    return found


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_no_test_depends_on_how_fast_the_machine_is(path: Path) -> None:
    assert not clocks_of(path.read_text("utf-8"))


def test_a_clock_is_found_under_either_form() -> None:
    assert clocks_of("import time, threading\ntime.sleep(1)\nthreading.Timer(1, f)") == {"sleep", "Timer"}
    assert clocks_of("from time import perf_counter, time") == {"perf_counter"}
