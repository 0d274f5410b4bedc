"""What all tests share: no hub, no deadline on properties, and one tiny random model."""

from __future__ import annotations

import importlib.util
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and two threads that must meet lose to other load
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a job in the background is started: Ctrl-C is tested too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton's own library is made for its interpreter or for a GPU when it is imported, and others import it, too
    os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

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
