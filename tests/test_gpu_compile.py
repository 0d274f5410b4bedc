"""Our kernels compile to machine code for GPUs that are not here: shared memory that the cards have, few spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("triton")
EVERY = {"attend", "join", "weigh", "mix", "update", "rotate", "gate", "nearest", "add", "_sum_columns", "_sum_rows"}
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may have, by compute capability."""
SMALLEST = min(SHARED.values())
MOST_SPILLED = 256
"""Bytes of a thread."""


def lines(folder: Path, *words: str) -> list[list[str]]:
    """What :mod:`compile_kernels` prints, which needs a process that does not interpret kernels."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """All rules, for the dimensions of Llama-3-8B; what fits the smallest card's shared memory fits Hopper's."""
    found = lines(tmp_path, "90", "bfloat16", "4x128")
    assert {line[0] for line in found} == EVERY
    for name, what, _, _, spilt, shared, products in found:
        assert int(spilt) == 0, (name, what)
        assert int(shared) <= SMALLEST * 1024, (name, what)
        if name in ("attend", "weigh", "mix"):
            assert products != "-", "no tensor cores"
        if name.startswith("_sum") or name == "nearest":
            assert products == "wgmma", "no tensor cores of this generation"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_kernels_compile_for_every_card(tmp_path: Path, dtype: str) -> None:
    found = lines(tmp_path, ",".join(map(str, SHARED)), dtype, "4x128")
    assert {(line[0], line[2]) for line in found} == {(name, str(card)) for name in EVERY for card in SHARED}
    for name, what, card, _, spilt, shared, _ in found:
        assert int(spilt) < MOST_SPILLED, (name, what, card)
        assert int(shared) <= SHARED[int(card)] * 1024, (name, what, card)


@pytest.mark.slow
def test_kernels_compile_for_other_heads(tmp_path: Path) -> None:
    """As many query heads and as many channels as are served, on the card with the least shared memory."""
    for name, what, _, _, spilt, shared, _ in lines(tmp_path, "86", "bfloat16", "31x64", "3x64", "7x128", "16x256"):
        assert int(spilt) < MOST_SPILLED, (name, what)
        assert int(shared) <= SHARED[86] * 1024, (name, what)
