"""The diagnosis of a compressed prompt, against transformers' own attention maps and keys in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import plain_model, prompts, tiny_model

from d2obench.cache import Session
from d2obench.cache.diagnosis import DiagnosingSession, LayerDiagnosis

LAST = 64


def diagnosed(policy: str, budget: str, texts: list[list[int]]) -> list[LayerDiagnosis]:
    session = DiagnosingSession(tiny_model("llama-deep"), policy, budget, max_new=4)
    session.prefill(texts)
    found = session.diagnose()
    session.compress()  # nothing was lost by looking
    assert torch.isfinite(session.step(torch.zeros(len(texts), dtype=torch.long))).all()
    return found


def positions_kept(policy: str, budget: str, length: int) -> Any:
    """Positions of the entries that a run of its own keeps, by layer and KV head."""
    session = Session(tiny_model("llama-deep"), policy, budget, max_new=4)
    session.prefill(prompts(length))
    session.compress()
    position = session.cache.state.position.tolist()
    return [[[at for at in row if 0 <= at < length] for row in layer] for layer in position]


def expected(policy: str, budget: str, length: int) -> list[dict[str, float]]:
    """The figures of each layer, from what transformers computes for the prompt."""
    model = plain_model("llama-deep", "float64", attention="eager")
    with torch.inference_mode():
        out = model(torch.tensor(prompts(length)), output_attentions=True, use_cache=True)
    equal = policy.replace("preset=mass", "preset=mass,allocate=uniform")
    kept, even = positions_kept(policy, budget, length), positions_kept(equal, budget, length)
    found = []
    for layer, block in enumerate(model.model.layers):
        full = [held[0].numpy() for held in (out.attentions[layer], *_cached(out.past_key_values, layer))]
        weight = block.self_attn.o_proj.weight.detach().numpy()
        found.append(
            _figures(*full, weight, kept[layer], "mass" in policy)
            | {"cost": _figures(*full, weight, even[layer], "mass" in policy)["squares"]}
        )
    return found


def _cached(cache: Any, layer: int) -> tuple[Any, Any]:
    return cache.layers[layer].keys, cache.layers[layer].values


def _figures(maps: Any, keys: Any, values: Any, weight: Any, kept: Any, merges: bool) -> dict[str, float]:
    heads, length, _ = keys.shape
    group, asked = len(maps) // heads, range(max(0, length - LAST), length)
    sums = dict.fromkeys(("evicted", "own", "due", "drawn", "squares"), 0.0)
    moved, whole, columns = np.zeros((len(asked), len(weight))), np.zeros((len(asked), len(weight))), 0.0
    for h in range(heads):
        own = maps[h * group : (h + 1) * group]
        mass, seen = own.mean(0).sum(0), own.mean(0).sum(0) / (length - np.arange(length))
        columns = columns + mass / heads
        paid = own.mean(0)[asked].mean(0)
        gone = [j for j in range(length) if j not in kept[h]]
        # 1. who stands for whom
        unit = keys[h] / np.linalg.norm(keys[h], axis=1, keepdims=True)
        gain, value = np.zeros(length), values[h].copy()
        target = {e: max(kept[h], key=lambda c: unit[e] @ unit[c]) for e in gone} if merges else {}
        for e, c in target.items():
            ratio = 0.5 * min(1.0, seen[e] / seen[c])
            gain[c] += ratio
            value[c] += ratio * values[h][e]
        value /= 1 + gain[:, None]
        # 2. what every query gets from the kept entries
        there = np.isin(np.arange(length), kept[h])
        share = own[:, asked] * there * (1 + gain)
        share /= share.sum(2, keepdims=True)
        taken = sorted(set(target.values()))
        sums["evicted"] += paid[gone].sum() / heads
        sums["own"] += paid[taken].sum() / heads
        sums["due"] += (paid[taken].sum() + paid[list(target)].sum()) / heads
        sums["drawn"] += share.mean((0, 1))[taken].sum() / heads
        width = group * values.shape[2]
        behind = weight[:, h * width : (h + 1) * width]
        after, before = share @ value, own[:, asked] @ values[h]
        here = np.concatenate(list(after - before), 1) @ behind.T
        moved, whole = moved + here, whole + np.concatenate(list(before), 1) @ behind.T
        sums["squares"] += np.square(here).sum(1).mean()
    return sums | {"error": np.square(moved).sum() / np.square(whole).sum(), "density": float(np.var(columns, ddof=1))}


@pytest.mark.parametrize("policy", ["h2o", "d2o(preset=mass)"])
@pytest.mark.parametrize(("length", "budget"), [(96, "0.2"), (50, "0.4")])
def test_figures_are_those_of_the_full_attention_map(policy: str, length: int, budget: str) -> None:
    found, known = diagnosed(policy, budget, prompts(length)), expected(policy, budget, length)
    for layer, figures in zip(found, known, strict=True):
        for name in ("evicted", "own", "due", "drawn", "error", "cost", "density"):
            assert float(getattr(layer, name)) == pytest.approx(figures[name], rel=2e-3, abs=1e-7), name
    if policy == "h2o":
        assert not any(float(layer.due) for layer in found)


def test_a_threshold_leaves_part_of_what_was_evicted_to_nobody() -> None:
    for layer in diagnosed("d2o", "0.2", prompts(96)):
        assert float(layer.own) < float(layer.due) < float(layer.own + layer.evicted)


def test_a_sequence_of_a_padded_batch_is_that_sequence_alone() -> None:
    texts = prompts(90, 41)
    together = diagnosed("d2o(preset=mass)", "0.3", texts)
    for row, text in enumerate(texts):
        for one, alone in zip(together, diagnosed("d2o(preset=mass)", "0.3", [text]), strict=True):
            for name in ("evicted", "due", "drawn", "error", "cost", "density"):
                assert float(getattr(one, name)[row]) == pytest.approx(float(getattr(alone, name)), rel=1e-3, abs=1e-7)


def test_the_full_cache_loses_nothing() -> None:
    for layer in diagnosed("full", "1.0", prompts(40)):
        assert float(layer.evicted) == 0 and float(layer.error) < 1e-9 and float(layer.cost) < 1e-9
