"""``protect=prompt``: the whole prompt stays, and the budget is over generated tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference import rules
from test_policies_rules import compare, recorded
from tiny_families import VOCAB, prompts, tiny_model

from d2obench.cache import Session
from d2obench.cache.policy_cache import cache
from d2obench.errors import PolicyError
from d2obench.policies import parse_choice, parse_policy

LENGTH, NEW, STEPS = 70, 9, 40


def beside_the_prompt(rule: Any) -> Any:
    """A rule of the reference, over generated tokens only: nothing of the prompt is ever a candidate."""

    class Beside(rule):
        sinks = LENGTH

        @property
        def first(self) -> int:
            return LENGTH

        @property
        def recent(self) -> int:
            return max(1, round((self.budget - LENGTH) * self.share))

        def importance(self) -> dict[int, float]:
            return dict.fromkeys(self.held, 0.0)

        def candidates(self) -> dict[int, float]:
            return {j: score for j, score in super().candidates().items() if j >= LENGTH}

    return Beside


RULES = {
    "h2o(protect=prompt)": rules.H2O,
    "h2o(protect=prompt,normalised=true)": rules.NormalisedH2O,
    "streaming(protect=prompt)": rules.Streaming,
    "local(protect=prompt)": rules.Local,
    "tova(protect=prompt)": rules.TOVA,
    "random(protect=prompt)": rules.Random,
    "d2o(protect=prompt,allocate=uniform,merge=none)": rules.D2O,
    "d2o(protect=prompt,allocate=uniform)": rules.D2O,
}


OFTEN = ["h2o(protect=prompt)", "streaming(protect=prompt)", "tova(protect=prompt)", "random(protect=prompt)"]


@pytest.mark.parametrize(
    ("policy", "compiled"), [*((policy, True) for policy in RULES), *((policy, False) for policy in OFTEN)]
)
def test_protection_is_its_reference(policy: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output of 40 steps, and what is held after them, against the rule in float64 over generated tokens."""
    if not compiled:
        monkeypatch.setattr("d2obench.decode.cpu.backend.cpu.available", lambda: False)
    session, logs = recorded(policy, str(NEW), monkeypatch)
    assert session.decode_path.startswith("compiled CPU loops" if compiled else "PyTorch operators")
    kind = beside_the_prompt(RULES[policy])
    kind.seed, kind.merge = 5, "none" if "merge=none" in policy else "kv"
    layers = [rules.Layer(kind, LENGTH + NEW, index, 2) for index in range(5)]
    compare(session, logs, layers, lambda layer: [head.held for head in layer.heads])
    assert all(head.held[:LENGTH] == list(range(LENGTH)) for layer in layers for head in layer.heads)


def test_layer_budgets_divide_generated_tokens() -> None:
    session = Session(tiny_model("llama-deep"), "d2o(protect=prompt)", str(NEW), max_new=STEPS)
    session.prefill(prompts(LENGTH))
    session.compress()
    budgets = session.cache.budgets[:, 0] - LENGTH
    assert int(budgets.sum()) == 5 * NEW and int(budgets.min()) >= 1
    assert len(set(budgets.tolist())) > 1


def decoded(policy: str, budget: str, texts: list[list[int]], steps: int = STEPS) -> tuple[torch.Tensor, Session]:
    session = Session(tiny_model("llama-gqa2"), policy, budget, max_new=steps, seed=3)
    logits = [session.prefill(texts)]
    session.compress()
    for step in range(steps):
        logits.append(session.step(torch.tensor([(text[step % len(text)] + step) % VOCAB for text in texts])))
    return torch.stack(logits, 1), session


@pytest.mark.parametrize("policy", ["h2o", "streaming", "d2o", "d2o(preset=mass)", "tova", "random", "d2o(interval=3)"])
def test_a_batch_keeps_every_prompt_and_the_budget_of_generated_tokens(policy: str) -> None:
    """Sequences of a batch are as they are alone; a ratio is one of the tokens to generate."""
    name, texts = parse_choice(policy).spec.parts[0], prompts(30, 19)
    asked = str(name)[:-1] + ",protect=prompt)" if name.params else f"{name}(protect=prompt)"
    together, session = decoded(asked, "0.2", texts)
    assert together.isfinite().all()
    for text, row in zip(texts, together, strict=True):
        alone, _ = decoded(asked, "0.2", [text])
        assert (alone[0] - row).abs().max() < 1e-4
    footprint = session.footprint()
    assert footprint.requested == (30 + 19) / 2 + 0.2 * STEPS
    assert not footprint.over
    assert [sum(column) / 2 for column in zip(*footprint.kept, strict=True)] == [30, 19]
    positions = session.cache.state.where().view(2, 2, 2, -1)
    for sequence, text in enumerate(texts):
        for row in positions[:, sequence].flatten(0, 1):
            assert set(range(len(text))) <= set(row.tolist())


def test_within_its_budget_protection_changes_nothing() -> None:
    full, _ = decoded("full", None, prompts(30), 8)  # type: ignore[arg-type]
    protected, _ = decoded("h2o(protect=prompt)", "8", prompts(30), 8)
    assert (full - protected).abs().max() < 1e-4


def test_a_later_turn_joins_the_prompt() -> None:
    """After a second turn, everything that was held, and the turn, stays."""
    model = tiny_model("llama-gqa2")
    held = cache("h2o(protect=prompt)", 6, model=model.model)
    text = prompts(60)[0]

    def feed(ids: list[int]) -> None:
        from d2obench.attention.interface import keyword

        model.model(input_ids=torch.tensor([ids]), **{keyword(model.model): held})

    with torch.inference_mode():
        feed(text[:20])
        for token in text[20:40]:
            feed([token])
        before = [set(row.tolist()) - {-1} for row in held.state.where().flatten(0, 1)]
        feed(text[40:50])
        for token in text[50:60]:
            feed([token])
    for old, row in zip(before, held.state.where().flatten(0, 1), strict=True):
        now = {position for position in row.tolist() if position >= 0}
        assert old | set(range(40, 50)) <= now
        assert len(now) == 20 + 6 + 10 + 6


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ("roco(protect=prompt)", "has no parameter 'protect'"),
        ("snapkv(protect=prompt)", "has no parameter 'protect'"),
        ("tova(merge=mass,protect=prompt)", "merge=mass"),
        ("streaming(positions=cache,protect=prompt)", "positions=cache"),
        ("d2o(exempt=[0],protect=prompt)", "exempt"),
        ("d2o(preset=released,protect=prompt)", "no other parameters"),
        ("d2o(preset=mass,heads=true,protect=prompt)", "heads=true"),
        ("adakv(score=h2o(protect=prompt))", "adakv can't wrap"),
        ("h2o(protect=answer)", "protect"),
    ],
)
def test_what_does_not_go_together_is_refused(policy: str, named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        parse_policy(policy)


def test_a_ratio_needs_the_length_of_the_generation() -> None:
    with pytest.raises(PolicyError, match="needs max_new"):
        cache("h2o(protect=prompt)", 0.2, model=tiny_model("llama-gqa2").model)


def test_a_rule_that_cannot_be_restricted_says_so() -> None:
    from dataclasses import dataclass

    from d2obench.policies.protect import Protecting, decode_rule
    from d2obench.policies.rules import RowSizes

    @dataclass(frozen=True)
    class Own(Protecting):
        name = "own"

    rows = np.ones((1, 1))
    sizes = RowSizes(torch.tensor(rows).long() * 8, torch.arange(4).view(1, 1, 4), torch.tensor([4]))
    with pytest.raises(PolicyError, match="Custom"):
        decode_rule(Own(protect="prompt"), sizes)
