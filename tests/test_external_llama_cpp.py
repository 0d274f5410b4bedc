"""llama.cpp as a yardstick: what its session makes of the stream, what its cache takes, and what it refuses."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from d2obench.cli import main
from d2obench.errors import ModelError, PolicyError, UsageError, WorkerError
from d2obench.external import open_session
from d2obench.external.llama_cpp import GgufModel, load
from d2obench.models.base import LoadedModel
from d2obench.policies import parse_choice

PIECES = {"a": 5, "b": 6, "é": 7}


class Server:
    """Streams what ``SCRIPT`` says: (sequence, text, tokens so far)."""

    script: ClassVar[list[tuple[int, str, int]]] = []
    asked: ClassVar[list[Any]] = []
    requests: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, asked: Any) -> None:
        Server.asked.append(asked)

    def handle_completions(self, request: dict[str, Any], take: Callable[[Any], bool]) -> None:
        Server.requests.append(request)
        take(None)
        for at, text, count in Server.script:
            if take({"choices": [{"index": at, "text": text}], "timings": {"predicted_n": count}}):
                return
        if not Server.script:
            take({"error": {"message": "out of slots"}})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    module = types.ModuleType("xllamacpp")

    def params() -> Any:
        empty = types.SimpleNamespace
        return empty(model=empty(path=""), cpuparams=empty(), cpuparams_batch=empty(), n_batch=2048)

    module.CommonParams = params  # type: ignore[attr-defined]
    module.Server = Server  # type: ignore[attr-defined]
    names = ("GGML_TYPE_F16", "GGML_TYPE_Q8_0", "GGML_TYPE_Q4_0")
    module.ggml_type = types.SimpleNamespace(**{name: name for name in names})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xllamacpp", module)
    Server.asked, Server.requests = [], []
    return Server


def loaded(**changes: Any) -> LoadedModel:
    """The dimensions of the embedded model."""
    words = {
        "name": "embedded", "model": GgufModel(Path("x.gguf"), 10, PIECES), "tokenizer": None, "dtype": torch.float32,
        "device": torch.device("cpu"), "context": 8192, "has_sense": True, "digest": "0", "weights_bytes": 1,
        "layers": 30, "kv_heads": 3, "head_dim": 64,
    }  # fmt: skip
    return LoadedModel(**(words | changes))


def test_tokens_come_in_the_order_of_their_sequences(fake: type[Server]) -> None:
    fake.script = [(1, "b", 1), (0, "a", 1), (0, "é", 3), (1, "a", 2), (1, "?", 3)]
    marked: list[str] = []
    session = open_session(loaded(), "llama.cpp(cache=q8_0)", None, max_new=2, mark=marked.append)
    steps = [session.prefill([[1, 2, 3], [1, 2]])]
    session.compress()
    steps += [session.step(torch.tensor([0, 0])) for _ in range(2)]
    assert [one.argmax(-1).tolist() for one in steps] == [[5, 6], [7, 5], [7, 0]], (
        "a character of two tokens counts twice"
    )
    assert steps[0].shape == (2, 10)
    assert marked == ["prefill", "decode"]
    found = session.footprint()
    assert found.held == [[5.0, 4.0]] * 30
    assert found.kept[0] == [3.0, 2.0]
    session.close()
    (asked,) = fake.asked
    assert (asked.cache_type_k, asked.cache_type_v, asked.n_parallel, asked.n_ctx) == ("GGML_TYPE_Q8_0",) * 2 + (2, 512)
    assert asked.api_keys, "nobody else may use its server"
    assert fake.requests[0]["prompt"] == [[1, 2, 3], [1, 2]]
    assert fake.requests[0]["ignore_eos"]


@pytest.mark.parametrize(("cache", "size"), [("f16", 11_796_480), ("q8_0", 6_266_880), ("q4_0", 3_317_760)])
def test_the_cache_takes_what_llama_cpp_says(fake: type[Server], cache: str, size: int) -> None:
    """Two sequences of 256 cells: its own log says 11.25, 5.98 and 3.16 MiB."""
    fake.script = [(0, "a", 1), (1, "a", 1)]
    session = open_session(loaded(), f"llama.cpp(cache={cache})", None, max_new=8)
    session.prefill([[1] * 64, [1] * 64])
    assert session.footprint().kv_bytes == size
    session.close()


def test_what_goes_wrong_is_said(fake: type[Server]) -> None:
    fake.script = []
    with pytest.raises(WorkerError, match="out of slots"):
        open_session(loaded(), "llama.cpp", None, max_new=2).prefill([[1]])
    fake.script = [(0, "a", 1)]
    session = open_session(loaded(), "llama.cpp", None, max_new=2)
    session.prefill([[1]])
    with pytest.raises(WorkerError, match="before all tokens came"):
        session.step(torch.tensor([0]))
    with pytest.raises(ModelError, match="--decode full"):
        session.skip_to(3)
    with pytest.raises(ModelError, match="forked"):
        session.snapshot()
    with pytest.raises(UsageError, match="its context is 8 tokens"):
        open_session(loaded(context=8), "llama.cpp", None, max_new=2).prefill([[1] * 8])
    with pytest.raises(ModelError, match="on the CPU"):
        load("embedded", "float32", "cuda:0")


def test_the_words_of_the_policy() -> None:
    assert not parse_choice("llama.cpp(cache=q4_0)").takes_budget
    found = parse_choice("llama.cpp").yardstick
    assert found is not None
    assert found.speed_only
    assert "another engine: llama.cpp (xllamacpp 1.2)" in found.flags({"xllamacpp": "1.2"})[0]
    with pytest.raises(PolicyError, match="q9"):
        parse_choice("llama.cpp(cache=q9)")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "speed,fidelity"], "the task 'fidelity' can't use llama.cpp"),
        (["--task", "speed", "--model", "shape:tiny"], "is no GGUF file"),
        (["--task", "speed", "--engine", "ray"], "--engine ray can't run llama.cpp"),
    ],
)
def test_what_it_can_not_do_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr("d2obench.policies.yardsticks._found", lambda module: True)
    monkeypatch.setattr("d2obench.external._versions", lambda asked: {})
    with pytest.raises(SystemExit) as done:
        main(["run", "quick", "--policy", "llama.cpp", *words])
    assert done.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("policy", "extra"), [("llama.cpp", "llama-cpp"), ("hf-quantized", "hf-quantized")])
def test_without_the_extra_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], policy: str, extra: str
) -> None:
    monkeypatch.setattr("d2obench.policies.yardsticks._found", lambda module: False)
    with pytest.raises(SystemExit) as done:
        main(["run", "quick", "--task", "speed", "--policy", policy])
    assert done.value.code == 2
    err = capsys.readouterr().err
    assert f"pip install 'd2obench[{extra}]'" in err
    assert err.count("\n") == 1
