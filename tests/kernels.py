"""Triton kernels made for Triton's interpreter, which is asked for when their modules are imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator

import pytest

NAMES = ("attend", "merge", "update")


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Decode steps run in the interpreter; what other tests import stays as it was."""
    package = importlib.import_module("d2obench.decode.triton")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # rows that pad a group to 16 and lanes that are masked compute with −inf; nothing of them is kept
        warnings.simplefilter("ignore", RuntimeWarning)
        patch.setenv("TRITON_INTERPRET", "1")
        for name in NAMES:
            patch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
            patch.delattr(package, name, raising=False)
        for name in NAMES:
            made = importlib.import_module(f"{package.__name__}.{name}")
            patch.setitem(sys.modules, made.__name__, made)
            patch.setattr(package, name, made)
        yield
