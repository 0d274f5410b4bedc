"""Decode steps as CUDA graphs: what a replay must not depend on, told on a CPU, and the graphs themselves on a GPU.

A tape does on a CPU what a CUDA graph does: it notes the operators (and kernel launches) of one step with the tensors
they were given, and plays them again on these very tensors. What Python does between steps is then left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from kernels import interpreted  # noqa: F401
from tiny_families import CONFIGS, prompts, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from d2obench import compiler, cpu
from d2obench.cache import Session
from d2obench.cache import cuda_graph as graph
from d2obench.decode import backend
from d2obench.external import open_session
from d2obench.models import load
from d2obench.models.kernels import QuickNorm, ThinLinear

WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive",
         "lift_fresh")  # fmt: skip
"""What waits for the device or copies from the host's memory (``lift_fresh`` is what ``torch.tensor`` does)."""
NO_DEVICE = "there is no CUDA device"
BOUNDED = ["streaming", "local", "h2o", "h2o(normalised=true)", "d2o", "d2o(merge=values)", "d2o(inherit=true)",
           "d2o(threshold=layer)", "d2o(hosts=important)", "tova", "roco", "random", "cam", "snapkv(decode=slide)",
           "streaming(positions=cache)"]  # fmt: skip
STEPS = 6


class Tape(TorchDispatchMode):
    """Notes operators; :meth:`play` runs them again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((func, args, kwargs or {}, out))
        return out

    @property
    def names(self) -> set[str]:
        return {func.overloadpacket.__name__ for func, *_ in self.seen if hasattr(func, "overloadpacket")}

    def play(self) -> None:
        for func, args, kwargs, out in self.seen:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def launches_on(tape: Tape) -> Iterator[None]:
    """Notes the launches of the fused path, too."""
    path = sys.modules.get("d2obench.decode.triton.backend")
    if path is None:
        yield
        return
    real = path.launch

    def noting(*args: Any, **meta: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            real(*args, **meta)
        tape.seen.append((real, args, meta, None))

    path.launch = noting
    try:
        yield
    finally:
        path.launch = real


def opened(policy: str, family: str = "llama-gqa2", steps: int = STEPS) -> tuple[Session, torch.Tensor]:
    budget = None if policy in ("full", "quant", "hf-static") else "0.4"
    session = open_session(tiny_model(family), policy, budget, max_new=steps)
    logits = session.prefill(prompts(26, 17))
    session.compress()
    return session, logits


def eagerly(policy: str) -> tuple[list[torch.Tensor], Session]:
    session, logits = opened(policy)
    tokens = []
    for _ in range(STEPS):
        tokens.append(logits.argmax(-1))
        logits = session.step(tokens[-1])
    return tokens, session


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps by PyTorch's operators alone, as on a GPU without kernels."""
    plainly(monkeypatch)


def plainly(patch: pytest.MonkeyPatch) -> None:
    """A step's loops for CPUs, which are no operators, by PyTorch's."""
    for family in CONFIGS:  # made once for all tests: with their loops
        tiny_model(family)
    patch.setattr(cpu, "available", lambda: False)
    patch.setattr(ThinLinear, "forward", torch.nn.Linear.forward)
    patch.setattr(QuickNorm, "forward", LlamaRMSNorm.forward)


def check_replays(policy: str) -> Session:
    """One step on tape, played for all further ones: tokens and state are those of steps."""
    expected, plain = eagerly(policy)
    session, logits = opened(policy)
    assert graph.obstacle(session) == NO_DEVICE
    tape, produced = Tape(), [logits.argmax(-1)]
    with torch.inference_mode():
        produced.append(session.step(produced[-1]).argmax(-1))
        tokens = produced[-1][:, None].clone()
        with launches_on(tape), tape:
            logits = session.run(tokens)
        assert not tape.names.intersection(WAITS)
        while len(produced) < STEPS:
            produced.append(logits.argmax(-1))
            tokens.copy_(produced[-1][:, None])
            tape.play()
            session.cache.state.count()
            session.cache.seen += 1
    assert [one.tolist() for one in produced] == [one.tolist() for one in expected]
    assert torch.equal(session._positions, plain._positions)
    ours, theirs = session.cache.state, plain.cache.state
    for mine, other in zip(ours._living(), theirs._living(), strict=True):
        if ours.merge is not None and mine is ours.merge._cosine:
            continue  # work space
        assert torch.allclose(mine.float(), other.float(), atol=1e-5, equal_nan=True)
    assert session.footprint().evicted == plain.footprint().evicted
    return session


@pytest.mark.parametrize("policy", BOUNDED)
def test_a_step_of_operators_can_be_replayed(policy: str, operators: None) -> None:
    check_replays(policy)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gpt-neox"])
def test_every_family_can_be_replayed(family: str, operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = opened
    monkeypatch.setitem(globals(), "opened", lambda policy: real(policy, family))
    check_replays("d2o")


@pytest.mark.needs("triton")
@pytest.mark.parametrize("policy", ["full", "d2o", "h2o", "streaming"])
@pytest.mark.usefixtures("interpreted")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run on the GPU: pytest -m cuda")
def test_a_fused_step_can_be_replayed(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly(monkeypatch)
    assert check_replays(policy).cache.state.decode_path.startswith("Triton kernels")


@pytest.mark.parametrize(
    ("policy", "family", "reason"),
    [
        ("hf-static", "llama-gqa2", "library's own"),
        ("d2o(interval=4)", "llama-gqa2", "several tokens"),
        ("h2o+quant(bits=8)", "llama-gqa2", "quantised"),
        ("h2o", "gemma3", "sliding"),
        ("full", "llama-gqa2", "known to the host"),
        ("h2o", "falcon", "copies from the host"),
    ],
)
def test_what_cannot_be_captured_says_why(policy: str, family: str, reason: str, operators: None) -> None:
    session, logits = opened(policy, family)
    assert reason in graph.obstacle(session)
    assert torch.isfinite(session.step(logits.argmax(-1))).all()
    assert session.remarks == []  # nothing else was to be expected of a CPU


def test_remarks_are_for_gpus(monkeypatch: pytest.MonkeyPatch, operators: None) -> None:
    monkeypatch.setattr(backend, "OFFERS", (lambda state: "heads have 288 channels, more than 256",))
    session, logits = opened("full")
    session.step(logits.argmax(-1))
    session._device = torch.device("cuda")
    assert session.remarks[0] == "decodes by PyTorch's operators: heads have 288 channels, more than 256"
    assert session.remarks[-1] == (
        "decode steps are not captured: the length of a growing cache is known to the host only"
    )


# --- the life of a graph, with a tape in its place ------------------------------------------------------------------


class FakeGraph:
    """A CUDA graph of tape: capturing leaves no trace but what it noted."""

    captured = 0

    def __init__(self) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        self.tape.play()


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, operators: None) -> Any:
    """Graphs of tape for the session it is given."""

    @contextmanager
    def capture(held: FakeGraph, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        control.stream = stream
        session = control.session
        state = session.cache.state
        living = [*state._living(), state.store.key_rows, state.store.value_rows, session._positions]
        before = [tensor.clone() for tensor in living]
        with held.tape:
            yield
        if control.fails:  # as PyTorch does where a capture can't be ended: its stream stays the current one
            raise control.fails
        control.stream = "main"
        for tensor, old in zip(living, before, strict=True):
            tensor.copy_(old)
        FakeGraph.captured += 1

    control = SimpleNamespace(session=None, fails=None, stream="main")
    monkeypatch.setattr(FakeGraph, "captured", 0)
    monkeypatch.setattr(graph, "_warmed", WeakKeyDictionary())
    monkeypatch.setattr(compiler, "_ending", [])
    real = graph.obstacle
    monkeypatch.setattr(graph, "obstacle", lambda session: real(session).replace(NO_DEVICE, ""))
    monkeypatch.setattr(graph, "_stream_of", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: control.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(control, "stream", stream))
    monkeypatch.setattr(graph.Steps, "_warm_up_step", lambda self, session, tokens: session.run(tokens[:, None]))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return control


def walk(control: Any, policy: str, prepares: bool = False) -> tuple[list[list[int]], Session]:
    session, logits = opened(policy)
    control.session = session
    if prepares:
        session.prepare()
    out = []
    for _ in range(STEPS):
        tokens = logits.argmax(-1)
        out.append(tokens.tolist())
        logits = session.step(tokens)
    return out, session


@pytest.mark.parametrize("policy", ["streaming", "d2o", "random"])
def test_a_graph_is_captured_once_and_counts(policy: str, faked: Any) -> None:
    expected, plain = eagerly_without(policy)
    for prepares in (False, True):
        found, session = walk(faked, policy, prepares)
        assert found == expected
        assert FakeGraph.captured == 1 + prepares
        state = session.cache.state
        assert (state.steps, session.cache.seen) == (plain.cache.state.steps, plain.cache.seen)
        assert session.footprint() == plain.footprint()


def eagerly_without(policy: str) -> tuple[list[list[int]], Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "obstacle", lambda session: "asked for")
        tokens, session = eagerly(policy)
    return [one.tolist() for one in tokens], session


def test_logits_belong_to_the_caller(faked: Any) -> None:
    session, logits = opened("h2o")
    faked.session = session
    for _ in range(3):
        logits = session.step(logits.argmax(-1))
    held = logits.clone()
    session.step(logits.argmax(-1))
    assert FakeGraph.captured == 1 and torch.equal(logits, held)


def test_a_fork_comes_back_to_its_graph(faked: Any) -> None:
    _, session = walk(faked, "d2o")
    saved, tokens = session.snapshot(), torch.tensor([7, 8])
    first = session.step(tokens)
    session.step(tokens)
    session.restore(saved)
    assert torch.equal(session.step(tokens), first)
    assert FakeGraph.captured == 1


def test_a_new_prompt_gets_a_graph_of_its_own(faked: Any) -> None:
    expected, session = walk(faked, "h2o")
    logits = session.prefill(prompts(26, 17))
    session.compress()
    for tokens in expected:
        assert logits.argmax(-1).tolist() == tokens
        logits = session.step(logits.argmax(-1))
    assert FakeGraph.captured == 2


def test_operators_that_are_watched_are_not_replayed(faked: Any) -> None:
    _, session = walk(faked, "h2o")
    with Tape() as tape:
        session.step(torch.tensor([3, 4]))
    assert "baddbmm" in tape.names


def test_a_failed_capture_goes_on_step_by_step(faked: Any) -> None:
    expected, plain = eagerly_without("streaming")
    faked.fails = RuntimeError("operation not permitted when stream is capturing\nmore words")
    session, logits = opened("streaming")
    faked.session = session
    fail_third(session, faked.fails)
    found = []
    for _ in range(STEPS):
        found.append(logits.argmax(-1).tolist())
        logits = session.step(logits.argmax(-1))
    assert found == expected and session.cache.state.steps == plain.cache.state.steps
    session._device = torch.device("cuda")
    words = "capturing failed (RuntimeError: operation not permitted when stream is capturing)"
    assert session.remarks[-1].endswith(words)
    assert faked.stream == "main", "the process stays on the stream of the capture"
    assert compiler.ending() == words, "the allocator may go on as if it were capturing"


def fail_third(session: Session, problem: Exception) -> None:
    """The third run of the operators is the capture's; nothing of it is executed there."""
    real, runs = session.run, []

    def run(tokens: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        if len(runs) == 3:
            raise problem
        return real(tokens)

    session.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("words", ["CUDA out of memory.", "Triton Error [CUDA]: out of memory"])
def test_memory_that_ends_while_capturing_is_no_step_that_fits(faked: Any, words: str) -> None:
    session, logits = opened("streaming")
    faked.session, faked.fails = session, RuntimeError(words)
    fail_third(session, faked.fails)
    tokens = logits.argmax(-1)
    for _ in range(2):
        session.step(tokens)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.step(tokens)
    assert faked.stream == "main" and compiler.ending()


# --- on a GPU -------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class TestOnGPU:
    """The path as it is used against steps without a graph, and against PyTorch's operators."""

    pytestmark = on_gpu
    STEPS = 24

    def decode(self, policy: str, dtype: str, *, captured: bool, fused: bool) -> tuple[Any, Any, Session]:
        with pytest.MonkeyPatch.context() as patch:
            if not captured:
                patch.setattr(graph, "obstacle", lambda session: "asked for")
            if not fused:
                patch.setattr(backend, "OFFERS", (lambda state: "asked for",))
            loaded = load("shape:tiny", dtype, "cuda")
            budget = None if policy == "full" else "0.3"
            session = open_session(loaded, policy, budget, max_new=self.STEPS + 1)
            generator = torch.Generator().manual_seed(0)
            given = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (300, 211)]
            logits = session.prefill(given)
            session.compress()
            session.prepare()
            tokens, every = torch.randint(0, 256, (self.STEPS, 2), generator=generator).cuda(), [logits]
            every += [session.step(one) for one in tokens]
            return torch.stack(every), session.footprint(), session

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("policy", ["full", "snapkv", *BOUNDED])
    def test_three_ways_agree(self, policy: str, dtype: str) -> None:
        fast, held, session = self.decode(policy, dtype, captured=True, fused=True)
        again, _, second = self.decode(policy, dtype, captured=True, fused=True)
        single, same, _ = self.decode(policy, dtype, captured=False, fused=True)
        plain, counted, _ = self.decode(policy, dtype, captured=False, fused=False)
        expected = [session.cache.state.fallback] if session.cache.state.fallback else []
        assert len(session.remarks) == len(expected), session.remarks
        assert session._steps._graph is not None and second._steps._graph is not None
        assert torch.equal(fast, single) and torch.equal(fast, again) and held == same
        near = 1e-3 if dtype == "float32" else 0.1
        assert torch.allclose(fast, plain, atol=near)
        if dtype == "float32":
            assert (held.merged, held.evicted, held.held) == (counted.merged, counted.evicted, counted.held)

    def test_shapes_of_real_models(self) -> None:
        """Heads as in Llama 3 8B, few and many rows: one split and several."""
        for policy in ("full", "d2o"):
            for batch in (1, 64):
                found = []
                for fused in (True, False):
                    with pytest.MonkeyPatch.context() as patch:
                        if not fused:
                            patch.setattr(backend, "OFFERS", (lambda state: "asked for",))
                        found.append(self.wide(policy, batch))
                assert torch.allclose(*found, atol=0.1)

    def wide(self, policy: str, batch: int) -> torch.Tensor:
        from transformers import AutoConfig, AutoModelForCausalLM

        from d2obench.models.base import loaded as as_loaded
        from d2obench.models.shapes import fill

        config = AutoConfig.for_model(
            "llama", hidden_size=4096, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
            intermediate_size=1024, vocab_size=256, max_position_embeddings=4096, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        fill(model, 7)
        wide = as_loaded("wide", model.to(torch.bfloat16).cuda(), None, digest="wide", has_sense=False)
        session = open_session(wide, policy, None if policy == "full" else "0.2", max_new=12)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, 256, (batch, 1000), generator=generator)
        session.prefill(prompt.tolist())
        session.compress()
        tokens = torch.randint(0, 256, (12, batch), generator=generator).cuda()
        return torch.stack([session.step(one) for one in tokens])
