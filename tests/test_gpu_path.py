"""The GPU path on a pretended GPU: no operator mixes devices, no decode step waits for the host, every kernel is loaded
before the first step, and the numbers are those of the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_nvml import FakeNvml
from pretended_gpu import Pretence, Pretended, inner, model_on_gpu, pretended
from tiny_families import CONFIGS, prompts, tiny_model
from torch.utils._python_dispatch import _disable_current_modes

from d2obench import compiler
from d2obench.attention import prompt
from d2obench.cache import Session, cuda_graph, session
from d2obench.cache.policy_cache import PolicyCache
from d2obench.cli import main
from d2obench.decode.triton import backend
from d2obench.measure import gpu_checkup
from d2obench.measure.checkup import Finding
from d2obench.measure.clock import HostClock
from d2obench.measure.nvml import Nvml
from d2obench.measure.roofline import Bandwidth
from d2obench.models import LoadedModel, joined

pytestmark = [
    pytest.mark.needs("triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real one: pytest -m cuda"),
    # rows that pad a group to 16 and lanes that are masked compute with −inf; nothing of them is kept
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
POLICIES = [
    "full", "streaming", "local", "h2o", "h2o(normalised=true)", "d2o", "d2o(merge=values)", "d2o(inherit=true)",
    "d2o(threshold=layer)", "d2o(preset=mass)", "tova", "roco", "random", "cam", "snapkv(window=4)",
    "snapkv(window=4,decode=slide)", "pyramidkv(window=4)", "streaming(positions=cache)",
    "adakv", "d2o(preset=mass,heads=true)",
]  # fmt: skip
QUICK = ["full", "h2o", "d2o", "d2o(preset=mass)"]
UNEVEN = {"adakv", "d2o(preset=mass,heads=true)"}
"""Policies whose KV heads hold different numbers of entries, which the host asks for in every layer."""
BRIDGED = {"falcon", "falcon-new"}
"""Families whose keys are a tensor class of ours, which can't be pretended as well."""


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs can't be pretended; tests that need one put something in its place."""
    monkeypatch.setenv("D2OBENCH_GRAPH", "0")
    monkeypatch.setattr(compiler, "_ending", [])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretence]:
    """A pretended GPU."""
    with pretended(monkeypatch) as noted:
        yield noted


def talk(loaded: LoadedModel, policy: str, steps: int, noted: Pretence | None = None) -> tuple[torch.Tensor, Session]:
    """A prompt, decode steps, a second turn and two more steps; all logits."""
    budget = None if policy in ("full", "quant(bits=8)") else "0.4"
    session = Session(loaded, policy, budget, max_new=2 * steps + 8, seed=3)
    found = []

    def phase(name: str) -> None:
        if noted is not None:
            noted.phase = name

    def decode(count: int) -> None:
        phase("decode")
        for _ in range(count):
            tokens = inner(found[-1]).argmax(-1)
            found.append(session.step(to(tokens)))

    def to(tokens: torch.Tensor) -> torch.Tensor:
        return tokens if noted is None else Pretended(tokens, loaded.device)

    phase("prefill")
    found.append(session.prefill(prompts(26, 17)))
    phase("compress")
    session.compress()
    decode(steps)
    phase("turn")
    tokens = torch.tensor(prompts(5, 5, seed=1))
    positions = session._positions + to(torch.arange(5))
    out = session._forward(to(tokens), positions, None)
    session._positions = positions[:, -1:] + to(torch.ones(1, dtype=torch.long))
    found.append(out.float())
    session.compress()
    decode(2)
    with _disable_current_modes():
        return torch.stack([inner(one).clone() for one in found]), session


def check(noted: Pretence, family: str, policy: str, steps: int) -> Session:
    """One conversation on the pretended GPU and on the CPU."""
    found, session = talk(model_on_gpu(family), policy, steps, noted)
    # 1. no operator has tensors of different devices, and no step waits for the host
    assert [event for event in noted.events if event[1] == "mixed"] == []
    assert noted.of("decode") == []
    # 2. what decoding launched had been loaded before; rotary positions are those of the prompt
    ran = noted.variants.get("decode", set())
    loaded = noted.variants.get("loaded", set()) | noted.variants.get("prefill", set())
    assert ran <= loaded, ran - loaded
    # 3. the numbers are the CPU's
    with _disable_current_modes():
        expected, _ = talk(tiny_model(family), policy, steps)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    return session


@pytest.mark.parametrize("policy", QUICK)
def test_a_conversation_on_a_gpu(gpu: Pretence, policy: str) -> None:
    session = check(gpu, "llama-gqa2", policy, 2)
    assert session.decode_path.startswith("Triton kernels")
    assert session.remarks == ["decode steps are not captured: D2OBENCH_GRAPH is 0"]


def test_a_step_launches_fewer_products_than_the_model_has(gpu: Pretence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values in one product, gate and up in one, and what is between those and the last in one."""
    counts = []
    for change in (lambda: None, lambda: monkeypatch.setattr(joined, "join", lambda model: None)):
        change()
        loaded = model_on_gpu("llama-gqa2")
        session = Session(loaded, "streaming", "0.4", max_new=4)
        session.prefill(prompts(9, 7))
        session.compress()
        gpu.launches.clear()
        session.step(Pretended(torch.tensor([3, 4])))
        counts.append(Counter({name: count for (_, name), count in gpu.launches.items()}))
    ours, theirs = counts
    layers = 2
    assert theirs["linear"] - ours["linear"] == 3 * layers
    assert ours["gate"] == theirs["silu"] == layers and "gate" not in theirs and "silu" not in ours
    assert sum(theirs.values()) - sum(ours.values()) == 4 * layers


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["d2o", "d2o(preset=mass,heads=true)"])
def test_a_batch_read_in_groups_on_a_gpu(gpu: Pretence, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = PolicyCache.pack
    monkeypatch.setattr(PolicyCache, "pack", lambda self: read.append(self) or real(self))
    monkeypatch.setattr(session, "TOGETHER", 30)
    check(gpu, "llama-gqa2", policy, 2)
    assert len(read) == 2


def waits_of(policy: str, layers: int, noted: Pretence) -> Counter[tuple[str, str, str]]:
    """Where the host waits while a prompt is read and compressed: copies, and what is read."""
    loaded = model_on_gpu("llama-gqa2", num_hidden_layers=layers)
    session = Session(loaded, policy, None if policy == "full" else "0.4", max_new=8)
    noted.events.clear()
    session.prefill(prompts(26, 17))
    session.compress()
    return Counter(event[1:] for event in noted.events)


@pytest.mark.parametrize("policy", ["d2o", "snapkv(window=4)"])
def test_no_layer_of_a_prompt_waits_for_the_host(gpu: Pretence, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "offer", lambda state: "this is about the prompt")
    assert waits_of(policy, 2, gpu) == waits_of(policy, 3, gpu)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [one for one in POLICIES if one not in UNEVEN])
def test_no_layer_of_a_prompt_waits_under_any_policy(
    gpu: Pretence, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "offer", lambda state: "this is about the prompt")
    assert waits_of(policy, 2, gpu) == waits_of(policy, 3, gpu)


def test_another_family_on_a_gpu(gpu: Pretence) -> None:
    """Phi-3's queries, keys and values are parts of one tensor."""
    check(gpu, "phi3", "streaming", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *(("llama-gqa2", policy) for policy in POLICIES),
        *((family, "d2o") for family in sorted(CONFIGS.keys() - BRIDGED)),
    ],
)
def test_every_policy_and_family_on_a_gpu(gpu: Pretence, family: str, policy: str) -> None:
    check(gpu, family, policy, 10)


def test_without_kernels_the_path_is_pytorch_and_says_so(gpu: Pretence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2OBENCH_KERNELS", "0")
    session = check(gpu, "llama-gqa2", "d2o", 2)
    assert session.decode_path == "PyTorch operators: D2OBENCH_KERNELS is 0"
    assert session.remarks == [
        "sums a prompt's columns without our kernel: D2OBENCH_KERNELS is 0",
        "decodes by PyTorch's operators: D2OBENCH_KERNELS is 0",
        "merges what a prompt evicts by PyTorch's operators: D2OBENCH_KERNELS is 0",
        "rotary positions by PyTorch's operators: D2OBENCH_KERNELS is 0",
        "gated layers by PyTorch's operators: D2OBENCH_KERNELS is 0",
        "decode steps are not captured: D2OBENCH_GRAPH is 0",
    ]
    assert gpu.variants == {}


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


class FakeGraph:
    """In place of a CUDA graph: capturing runs the step and takes it back."""

    captured = 0


@pytest.fixture
def captures(gpu: Pretence, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Steps are captured; a kernel that is not loaded when a capture begins ends it."""
    monkeypatch.delenv("D2OBENCH_GRAPH")
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # the mode that pretends
    monkeypatch.setattr(backend, "difference", lambda fast, plain: "")
    gpu.runs = False
    monkeypatch.setattr(FakeGraph, "captured", 0)
    known: set[Any] = set()
    capturing: list[Session] = []
    sessions: list[Session] = []

    def before_launch(variant: Any, empty: bool) -> None:
        if capturing and variant not in known:
            raise TypeError("operation not permitted when stream is capturing: a module is loaded")
        known.add(variant)

    @contextmanager
    def capture(graph: FakeGraph, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "relaxed"
        state, session = sessions[-1].cache.state, sessions[-1]
        living = [*state._living(), state.store.key_rows, state.store.value_rows, session._positions]
        before = [tensor.clone() for tensor in living]
        capturing.append(session)
        try:
            yield
        finally:
            capturing.pop()
        for tensor, old in zip(living, before, strict=True):
            tensor.copy_(old)
        FakeGraph.captured += 1

    gpu.before_launch = before_launch
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(cuda_graph.Steps, "_replay", lambda self, session, tokens: session.run(tokens[:, None]).float())
    yield sessions
    del gpu.before_launch


def decode(
    sessions: list[Session], loaded: LoadedModel, policy: str, budget: str | None, lengths: tuple[int, ...]
) -> Session:
    session = Session(loaded, policy, budget, max_new=8)
    sessions.append(session)
    logits = session.prefill(prompts(*lengths))
    session.compress()
    session.prepare()
    for _ in range(4):
        logits = session.step(logits.argmax(-1))
    return session


@pytest.mark.parametrize(
    ("policy", "first", "second"),
    [
        ("h2o", ("0.2", (60, 60)), ("0.4", (60, 60))),  # another block of the kernel between steps
        ("full", (None, (200,)), (None, (90,))),  # another number of splits
        ("d2o", ("0.3", (60, 41)), ("0.9", (60, 41))),
    ],
)
def test_a_shape_with_other_kernels_is_warmed_up_before_it_is_captured(
    captures: list[Session], policy: str, first: Any, second: Any
) -> None:
    loaded = model_on_gpu("llama-gqa2")
    for budget, lengths in (first, second, first, second):
        session = decode(captures, loaded, policy, budget, lengths)
        assert not session._steps.reason, session._steps.reason
    assert FakeGraph.captured == 4 and not compiler.ending()


def test_a_model_that_is_gone_leaves_no_warm_shapes(captures: list[Session]) -> None:
    decode(captures, model_on_gpu("llama-gqa2"), "h2o", "0.4", (60, 60))
    loaded = model_on_gpu("llama-gqa2")
    session = Session(loaded, "h2o", "0.4", max_new=8)
    captures.append(session)
    session.prefill(prompts(60, 60))
    session.compress()
    session.prepare()
    assert not session._steps.captured, "another model's kernels are not this one's"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_angles_that_the_host_computes_are_an_obstacle(gpu: Pretence, kind: str, monkeypatch: Any) -> None:
    """Dynamic angles wait for the host in every step, long ones in older versions of transformers."""
    monkeypatch.delenv("D2OBENCH_GRAPH")
    half = CONFIGS["llama-gqa2"]["hidden_size"] // CONFIGS["llama-gqa2"]["num_attention_heads"] // 2
    more = {"factor": 2.0} if kind == "dynamic" else {"long_factor": [1.0] * half, "short_factor": [1.0] * half}
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 512, **more}
    session = Session(model_on_gpu("llama-gqa2", rope_parameters=rope), "h2o", "0.4", max_new=4)
    logits = session.prefill(prompts(26, 17))
    session.compress()
    gpu.phase = "decode"
    session.run(logits.argmax(-1)[:, None])
    reason = cuda_graph.obstacle(session)
    assert bool(gpu.of("decode", "wait")) == (f"rotary angles of the kind {kind}" in reason)
    assert (kind == "dynamic") <= bool(reason)


# --- several GPUs -----------------------------------------------------------------------------------------------------


def test_the_second_gpu_is_used_while_the_first_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch, devices=2) as noted:
        loaded = model_on_gpu("llama-gqa2", "cuda:1")
        for policy in ("d2o", "h2o"):
            session = Session(loaded, policy, "0.4", max_new=4)
            logits = session.prefill(prompts(26, 17))
            session.compress()
            session.step(logits.argmax(-1))
            assert session.decode_path == "Triton kernels"
            assert session.remarks == ["decode steps are not captured: D2OBENCH_GRAPH is 0"]
        assert noted.current == 0


# --- attention over a prompt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [24, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_prompt_needs_the_whole_map(
    gpu: Pretence, dtype: torch.dtype, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of flash, PyTorch's fast kernels take neither keys of fewer heads nor both a mask and such keys."""
    with _disable_current_modes():
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, heads, n, 16, generator=generator).to(dtype) for heads, n in ((4, new), (2, 24), (2, 24))
        )
        expected = prompt._flash(q, k, v, 0.25)
    asked = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noting(q: Any, k: Any, v: Any, **given: Any) -> Any:
        asked.append((k.shape[1], given.get("enable_gqa", False), isinstance(given.get("attn_mask"), torch.Tensor)))
        return real(q, k, v, **{**given, "attn_mask": None} if new == 24 else given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    found = prompt._flash(*(Pretended(one) for one in (q, k, v)), 0.25)
    with _disable_current_modes():
        torch.testing.assert_close(inner(found), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    if dtype == torch.float32:
        assert [one[:2] for one in asked][:1] == [(4, False)]
    else:
        assert [one[:2] for one in asked] == ([(2, True)] if new == 24 else [])


# --- kernels that compute something else -----------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[Any], None]) -> None:
    """Changes what a kernel has written, as a wrong compiler would."""
    real = backend.launch

    def launch(made: Any, grid: Any, *given: Any, **meta: Any) -> None:
        real(made, grid, *given, **meta)
        if made.fn.__name__ == kernel and 0 not in grid:
            with _disable_current_modes():
                change(list(map(inner, given)))

    monkeypatch.setattr(backend, "launch", launch)


@pytest.mark.parametrize(
    ("policy", "kernel", "change", "what"),
    [
        ("full", "attend", lambda given: given[0].mul_(1.2), "attention differs"),
        ("h2o", "update", lambda given: given[2].copy_((given[2] + 1) % 4), "what is evicted or merged differs"),
    ],
)
def test_kernels_that_are_wrong_are_not_used(
    gpu: Pretence, policy: str, kernel: str, change: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, kernel, change)
    session = check(gpu, "llama-gqa2", policy, 1)
    assert session.decode_path == f"PyTorch operators: the kernels don't compute what PyTorch does: {what}"


def test_kernels_are_compared_once_for_each_of_their_variants(gpu: Pretence, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(backend, "difference", lambda fast, plain: compared.append(plain.store.rows) or "")
    gpu.runs = False
    loaded = model_on_gpu("llama-gqa2")
    for budget, batch in (("0.2", 2), ("0.2", 3), ("0.6", 2)):
        session = Session(loaded, "h2o", budget, max_new=8)
        session.prefill(prompts(*[60] * batch))
        session.compress()
    assert compared == [2, 2], "one sequence of two heads, for two blocks of the kernel between steps"


# --- d2obench doctor --gpu --------------------------------------------------------------------------------------------


@pytest.fixture
def checkup(gpu: Pretence, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Finding]]:
    """The findings about the pretended GPU, by topic, on a tiny model."""
    used = [10 * 2**30]
    nvml = FakeNvml({"MemoryInfo": lambda n: SimpleNamespace(total=80 * 2**30, used=used[0] + n * 2**20)})
    monkeypatch.setattr(gpu_checkup, "open_gpu", lambda device: Nvml("gpu0", nvml))
    monkeypatch.setattr(gpu_checkup, "BLOCK", 2**20)
    monkeypatch.setattr(gpu_checkup, "copy_bandwidth", lambda device, seconds: Bandwidth(1e12, 1e12, 5))
    monkeypatch.setattr(gpu_checkup, "clock_for", lambda device: HostClock())
    monkeypatch.setattr(gpu_checkup, "_model", lambda device, dtype, **changes: model_on_gpu("llama-gqa2"))
    few = {"POLICIES": {"float32": ("h2o",)}, "GRAPHS": (("h2o", "0.2"),), "TIMED": (("h2o", "0.2"),)}
    small = {"STEPS": 2, "BATCH": 1, "PROMPT": 20, "SPEED_BATCH": 1, "SPEED_PROMPT": 20, "SPEED_STEPS": 1}
    for name, value in {**few, **small}.items():
        monkeypatch.setattr(gpu_checkup, name, value)
    return lambda: {one.topic: one for one in gpu_checkup.gpu_checkup(torch.device("cuda:0"))}


def test_doctor_finds_nothing_wrong_with_a_gpu_that_is_right(checkup: Any) -> None:
    found = checkup()
    assert found["NVML"].state == found["kernels float32 h2o"].state == "ok"
    assert found["bandwidth"].text == "1,000 GB/s, read and written"
    assert "of what the bandwidth allows; Triton kernels" in found["step h2o@0.2"].text
    assert found["graph h2o@0.2"].text == "not captured: D2OBENCH_GRAPH is 0"
    assert all(one.remedy for one in found.values() if one.state != "ok")


def test_doctor_says_which_kernels_are_wrong_and_what_to_do(checkup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "attend", lambda given: given[0].mul_(1.2))
    monkeypatch.setattr(gpu_checkup, "_graphs", lambda device, gpu: iter(()))
    monkeypatch.setattr(gpu_checkup, "_speed", lambda device, gpu: 1 / 0)
    found = checkup()
    assert found["kernels float32 h2o"].state == "bad"
    assert "don't compute what PyTorch does: attention differs" in found["kernels float32 h2o"].text
    assert all("report it" in one.remedy for one in found.values() if one.state == "bad")
    assert any("ZeroDivisionError" in one.text for one in found.values())


def test_doctor_on_a_machine_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--gpu", "--device", "cpu"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("d2obench: doctor --gpu needs a GPU: the device is cpu; ") and "CUDA build of torch" in said
