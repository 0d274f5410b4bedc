"""A model whose weights hold NaN, or whose numbers overflow, gets no figures, and the error names the layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_tasks_loop import Bytes

from d2obench.errors import ModelError
from d2obench.external import open_session
from d2obench.measure.clock import clock_for
from d2obench.measure.finite import require_finite
from d2obench.measure.memory import probe_for
from d2obench.measure.phases import measure_request
from d2obench.measure.side_by_side import HeldCache, hold
from d2obench.models import LoadedModel
from d2obench.record import Axes
from d2obench.suite.definition import Quality
from d2obench.tasks import evaluate, read_cell

PROMPTS = [list(range(1, 25)), list(range(30, 40))]


@contextmanager
def broken(model: torch.nn.Module, weight: str, value: float) -> Iterator[None]:
    """One number of a weight is ``value``."""
    found = model.get_parameter(weight)
    before = found.detach().clone()
    with torch.no_grad():
        found.view(-1)[3] = value
    try:
        yield
    finally:
        with torch.no_grad():
            found.copy_(before)


def speed(model: LoadedModel, policy: str, budget: str | None) -> None:
    measure_request(
        lambda mark: open_session(model, policy, budget, max_new=6, mark=mark),
        PROMPTS,
        6,
        clock=clock_for(model.device),
        memory=probe_for(model.device),
    )


def quality(model: LoadedModel, task: str, policy: str, budget: str | None) -> None:
    shape = "320+4" if task in ("fidelity", "recall", "kernels(steps=1)") else None
    cell = read_cell({"axes": Axes(task, "tiny", "float32", "cpu", policy, budget, shape, None, 0)})
    evaluate(model, cell, Quality(limit=1, batch=1), lambda done, total: None)


CASES = [
    ("model.layers.1.self_attn.k_proj", math.nan),
    ("model.layers.2.mlp.down_proj", math.inf),
    ("lm_head", -math.inf),
]


@pytest.mark.parametrize(("layer", "value"), CASES)
@pytest.mark.parametrize(("policy", "budget"), [("full", None), ("h2o", "0.5"), ("d2o", "0.5"), ("hf-dynamic", None)])
@pytest.mark.parametrize("task", ["speed", "fidelity", "recall", "kernels(steps=1)"])
def test_a_broken_weight_fails_the_cell_and_is_named(
    tiny: LoadedModel, task: str, policy: str, budget: str | None, layer: str, value: float
) -> None:
    if policy == "hf-dynamic" and task in ("recall", "kernels(steps=1)"):
        pytest.skip("the task does not run this policy")
    model = dataclasses.replace(tiny, tokenizer=Bytes(), has_sense=True, context=4096)
    with broken(model.model, f"{layer}.weight", value), pytest.raises(ModelError, match="are not finite") as caught:
        speed(model, policy, budget) if task == "speed" else quality(model, task, policy, budget)
    assert f"the first layer with such an output is {layer};" in str(caught.value)
    assert "\n" not in str(caught.value)
    speed(model, policy, budget)  # the model is as it was, and no hook is left on it


def test_a_step_that_breaks_late_is_found_too(tiny: LoadedModel) -> None:
    """The prompt is sound; from the third step on a weight is not."""
    session = open_session(tiny, "full", None, max_new=8)
    tokens = session.prefill(PROMPTS).argmax(-1)
    session.compress()
    for _ in range(2):
        logits = session.step(tokens)
        require_finite(logits, "while decoding", session, PROMPTS)
    with broken(tiny.model, "model.layers.3.self_attn.q_proj.weight", math.nan):
        logits = session.step(tokens)
        with pytest.raises(ModelError, match=r"while decoding are not finite.*model\.layers\.3\.self_attn\.q_proj"):
            require_finite(logits, "while decoding", session, PROMPTS)


def test_caches_that_decode_in_turn_are_held_to_it_too(tiny: LoadedModel) -> None:
    def held() -> HeldCache:
        clock = clock_for(tiny.device)
        return hold(lambda: open_session(tiny, "h2o", "0.5", max_new=40), PROMPTS, 39, clock=clock, within=10.0)[0]

    found = pytest.raises(ModelError, match=r"after the prompt are not finite.*model\.layers\.1\.self_attn\.v_proj")
    with broken(tiny.model, "model.layers.1.self_attn.v_proj.weight", math.nan), found:
        held()
    cache = held()
    cache.decode(2, clock_for(tiny.device))
    found = pytest.raises(ModelError, match=r"of a decode step are not finite.*model\.layers\.2\.self_attn\.o_proj")
    with broken(tiny.model, "model.layers.2.self_attn.o_proj.weight", math.nan), found:
        cache.decode(2, clock_for(tiny.device))
    cache.close()


def test_without_a_model_the_layer_stays_unknown() -> None:
    require_finite(torch.zeros(2, 3), "after the prompt")
    with pytest.raises(ModelError) as caught:
        require_finite(torch.tensor([[0.0, math.nan]]), "after the prompt")
    expected = "the logits after the prompt are not finite; check the model's weights, or use --dtype float32"
    assert str(caught.value) == expected
