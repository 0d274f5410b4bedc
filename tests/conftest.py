"""What all tests share: no hub, no deadline on properties, one process per core, and the models that most tests use."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and two threads that must meet lose to other load
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a job in the background is started: Ctrl-C is tested too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest

from d2obench.models import LoadedModel, load

MOST_PROCESSES = 8  # each holds PyTorch and a small model, about 1 GiB
hypothesis.settings.register_profile("d2obench", deadline=None, derandomize=True)
hypothesis.settings.load_profile("d2obench")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its own options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in one process per core; tests named on the command line run in this one.

    The fixtures of a file are made once, because all its tests run in the same process. ``-n`` overrides this, and
    without pytest-xdist everything runs here.
    """
    if hasattr(config, "workerinput"):  # this is one of those processes
        return
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not named and cores > 1:
        config.option.numprocesses = min(cores, MOST_PROCESSES)
        config.option.dist = "loadfile"


@functools.cache
def interpret_triton() -> None:
    """Triton's own library is made for its interpreter or for a GPU when it is imported, and others import it, too."""
    if importlib.util.find_spec("triton"):
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
            import triton  # noqa: F401

            del os.environ["TRITON_INTERPRET"]


def pytest_pycollect_makemodule() -> None:
    """Before a test module is imported; not in a process that only hands tests out, which so needs no PyTorch."""
    interpret_triton()


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose package (``@pytest.mark.needs``) is not installed."""
    for mark in item.iter_markers("needs"):
        for package in mark.args:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs the package {package}: pip install -e '.[test-all]'")


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """``shape:tiny``: llama, 4 layers, 4 query and 2 KV heads, head_dim 16, vocab 256, float32 on the CPU."""
    return load("shape:tiny", "float32", "cpu")


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The real model, float32 on the CPU; for tests marked ``model``."""
    return load("embedded", "float32", "cpu")
