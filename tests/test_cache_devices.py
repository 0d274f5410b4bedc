"""Layers on several devices: a cache in runs of layers gives what one run gives, for every policy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import prompts, tiny_model

from d2obench.attention.interface import keyword
from d2obench.cache import Session
from d2obench.cache import devices as split
from d2obench.cache.devices import Run, SplitState, runs_of
from d2obench.errors import ModelError, OutOfMemory
from d2obench.models import LoadedModel, load, shapes
from d2obench.models.devices import beside, check_whole
from d2obench.suite.definition import Placement

POLICIES = [
    ("full", None), ("streaming", "0.3"), ("streaming(positions=cache)", "0.3"), ("h2o", "0.3"), ("d2o", "0.3"),
    ("d2o(threshold=layer,hosts=important,inherit=true)", "0.3"), ("d2o(interval=3)", "0.3"),
    ("d2o(preset=mass)", "0.3"), ("d2o(preset=mass,heads=true)", "0.3"), ("adakv(score=snapkv(window=8))", "0.5"),
    ("d2o(preset=released)", "0.4"), ("d2o+quant(bits=4)", "0.3"), ("roco", "0.3"),
    ("snapkv(window=8)", "0.5"), ("snapkv(window=8,decode=slide)", "0.5"), ("pyramidkv(window=4)", "0.3"),
    ("tova", "0.3"), ("cam", "0.3"), ("random", "0.3"), ("local", "16"), ("quant(bits=8)", None),
]  # fmt: skip


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the engine take the layers from an index on for layers of another device."""

    def at(first: int) -> None:
        def place_of(layer: torch.nn.Module) -> tuple[Any, torch.device]:
            attention: Any = layer.get_submodule("self_attn" if hasattr(layer, "self_attn") else "attention")
            return attention.layer_idx >= first, torch.device("cpu")

        monkeypatch.setattr(split, "place_of", place_of)

    return at


def run(model: LoadedModel, policy: str, budget: str | None, gen: int = 14) -> tuple[Any, ...]:
    """Tokens, all logits, and what the cache says of itself; half of it goes through a snapshot."""
    session = Session(model, policy, budget, max_new=2 * gen, seed=4)
    logits = [session.prefill(prompts(41, 37, 41))]
    session.compress()
    saved = session.snapshot()
    for _ in range(3):
        session.step(logits[-1].argmax(-1))
    session.restore(saved)
    for _ in range(gen):
        logits.append(session.step(logits[-1].argmax(-1)))
    state = session.cache.state
    found = session.footprint()
    session.skip_to(4)
    return torch.stack(logits), found, session.footprint().kv_bytes, state


@pytest.mark.parametrize(("policy", "budget"), POLICIES)
def test_two_runs_of_layers_give_what_one_gives(apart: Callable[[int], None], policy: str, budget: str | None) -> None:
    model = tiny_model("llama-deep")
    logits, footprint, after, _ = run(model, policy, budget)
    apart(2)
    ours, found, later, state = run(model, policy, budget)
    assert isinstance(state, SplitState)
    assert [len(part.prompts) for part in state.parts] == [2, 3]
    assert torch.equal(ours, logits)
    same = ("kv_bytes", "prompt_kv_bytes", "requested", "kept", "held", "effective", "merged_layers", "evicted_layers")
    for name in same:
        assert getattr(found, name) == getattr(footprint, name), name
    assert later == after


@pytest.mark.parametrize("family", ["gemma3", "gpt-neox", "falcon", "qwen3"])
def test_other_families_can_be_split(apart: Callable[[int], None], family: str) -> None:
    model = tiny_model(family)
    logits, footprint, _, _ = run(model, "d2o", "0.4")
    if family == "falcon":
        assert runs_of(model.model, [None, None]) == [Run(0, 2, torch.device("cpu"))]
        return
    apart(2 if family == "gemma3" else 1)
    ours, found, _, state = run(model, "d2o", "0.4")
    assert isinstance(state, SplitState)
    assert torch.equal(ours, logits)
    assert found.kept == footprint.kept


@pytest.mark.parametrize("policy", ["h2o", "d2o", "snapkv(window=8)"])
def test_a_conversation_goes_on_over_several_runs(apart: Callable[[int], None], policy: str) -> None:
    """Blocks after decoding reopen the slots of every run; an unknown length makes room in all of them."""
    from d2obench.cache import policy_cache

    model = tiny_model("llama-deep").model

    def talk() -> torch.Tensor:
        cache = policy_cache.cache(policy, 0.4, model=model)
        ids = torch.tensor(prompts(30))
        for turn in ([5, 6, 7, 8, 9], [11, 12, 13]):
            ids = model.generate(ids, **{keyword(model): cache}, max_new_tokens=9, do_sample=False, pad_token_id=0)
            ids = torch.cat((ids, torch.tensor([turn])), 1)
        return ids

    whole = talk()
    apart(3)
    assert torch.equal(talk(), whole)


def test_layers_of_one_device_are_one_run() -> None:
    model = tiny_model("gemma3").model
    assert runs_of(model, [8, None, 8, None]) == [Run(0, 2, torch.device("cpu"))]


def test_the_cache_goes_through_accelerates_hooks(apart: Callable[[int], None]) -> None:
    """As a model comes from ``--device-map``: inputs are moved for each layer, the cache is not touched."""
    from accelerate import dispatch_model

    model = tiny_model.__wrapped__("llama-deep")
    logits, footprint, _, _ = run(model, "d2o", "0.3")
    parts = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(5)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    skipped = model.model._skip_keys_device_placement
    dispatch_model(model.model, dict.fromkeys(parts, "cpu"), "cpu", skip_keys=skipped, force_hooks=True)
    assert hasattr(model.model.model.layers[3], "_hf_hook")
    apart(3)
    ours, found, _, state = run(model, "d2o", "0.3")
    assert isinstance(state, SplitState)
    assert torch.equal(ours, logits)
    assert found.kept == footprint.kept


def test_layers_left_on_the_cpu_are_out_of_memory_and_other_devices_are_told() -> None:
    model = SimpleNamespace(hf_device_map={"a": 0, "b": 1, "c": "cuda:1"}, device=torch.device("cuda", 0))
    assert beside(model) == [torch.device("cuda", 1)]
    check_whole("x", model)
    model.hf_device_map["d"] = "disk"
    with pytest.raises(OutOfMemory, match="x doesn't fit the GPUs: some of its layers were left on disk"):
        check_whole("x", model)


def test_random_weights_can_be_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as on one device, placed by accelerate's plan."""
    asked: list[str] = []
    monkeypatch.setattr(shapes, "dispatch_layers", lambda model, how: asked.append(how) or model)
    whole = load("shape:tiny", "float32", "cpu").model
    spread = load("shape:tiny", "float32", "cpu", placement=Placement(device_map="balanced")).model
    assert asked == ["balanced"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), spread.parameters(), strict=True))
    with pytest.raises(ModelError, match=r"can't split shape:tiny: .*--device-map"):
        load("shape:tiny", "float32", "cpu", placement=Placement(tensor_parallel=2))
