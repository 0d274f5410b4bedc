"""What all tests share: no hub, no deadline on properties, and one tiny random model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest

from d2obench.models import LoadedModel, load

hypothesis.settings.register_profile("d2obench", deadline=None, derandomize=True)
hypothesis.settings.load_profile("d2obench")


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """``shape:tiny``: llama, 4 layers, 4 query and 2 KV heads, head_dim 16, vocab 256, float32 on the CPU."""
    return load("shape:tiny", "float32", "cpu")


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The real model, float32 on the CPU; for tests marked ``model``."""
    return load("embedded", "float32", "cpu")
