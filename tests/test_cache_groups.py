"""A batch whose prompts are read in groups of sequences holds what it holds if they are read together."""

from __future__ import annotations

import pytest
import torch
from tiny_families import prompts, tiny_model

from d2obench.cache import Session, session
from d2obench.cache.policy_cache import PolicyCache

LENGTHS = (26, 17, 40, 33, 12)
POLICIES = [
    "d2o", "d2o(threshold=layer)", "d2o(preset=mass)", "d2o(preset=mass,heads=true)", "d2o(interval=2)",
    "d2o+quant(bits=8)",
]  # fmt: skip


def run(policy: str, budget: str, monkeypatch: pytest.MonkeyPatch, tokens: int, marks: list[str]) -> Session:
    """A session that has read prompts, ``tokens`` at once."""
    with monkeypatch.context() as patch:
        patch.setattr(session, "together", lambda device: tokens)
        made = Session(tiny_model("llama-gqa2"), policy, budget, max_new=24, mark=marks.append)
        made.logits = [made.prefill(prompts(*LENGTHS))]  # type: ignore[attr-defined]
    made.compress()
    return made


@pytest.mark.parametrize(("policy", "budget"), [("d2o", "0.4"), *((policy, "20") for policy in POLICIES)])
def test_a_batch_read_in_groups_is_the_batch(policy: str, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[list[str]] = [[], []]
    both = [run(policy, budget, monkeypatch, tokens, marks[n]) for n, tokens in enumerate((10**9, 85))]
    assert marks[0] == ["prefill", "compress", "decode"]
    assert marks[1] == [*["prefill", "compress"] * 3, "decode"]
    # 1. the same entries in the same slots, as many of them as budgets allow
    states = [one.cache.state for one in both]
    assert torch.equal(states[0].position, states[1].position)
    for name in ("threshold", "score", "usable", "bias"):
        whole, parts = (getattr(state, name) for state in states)
        assert (whole is None) is (parts is None)
        if whole is not None:
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    sizes = [one.footprint() for one in both]
    assert sizes[0] == sizes[1]
    # 2. the same text, and a second turn
    for _ in range(5):
        tokens = both[0].logits[-1].argmax(-1)  # type: ignore[attr-defined]
        for one in both:
            one.logits.append(one.step(tokens))  # type: ignore[attr-defined]
    for one in both:
        one.logits.append(one.turn(prompts(*[6] * 5, seed=1)))  # type: ignore[attr-defined]
        one.logits.append(one.step(torch.arange(5)))  # type: ignore[attr-defined]
    whole, parts = (torch.stack(one.logits) for one in both)  # type: ignore[attr-defined]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert both[0].footprint() == both[1].footprint()


def test_full_entries_of_one_group_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    real = PolicyCache.pack

    def pack(self: PolicyCache) -> None:
        held.append([layer.keys.shape[0] for layer in self.own if layer.keys is not None])
        real(self)
        held.append([layer.keys is None for layer in self.own])

    monkeypatch.setattr(PolicyCache, "pack", pack)
    run("d2o", "0.4", monkeypatch, 85, [])
    assert held == [[2, 2], [True, True], [2, 2], [True, True], [1, 1], [True, True]]


@pytest.mark.parametrize(
    "policy", ["full", "h2o", "streaming", "kvzip", "cake", "d2o(preset=released)", "snapkv(window=4)"]
)
def test_others_read_a_batch_together(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer at a time holds its full entries, or the whole batch is needed later."""
    monkeypatch.setattr(PolicyCache, "pack", lambda self: 1 / 0)
    made = Session(tiny_model("llama-gqa2"), policy, None if policy == "full" else "0.4", max_new=8)
    monkeypatch.setattr(session, "together", lambda device: 1)
    made.prefill(prompts(26, 17))


def test_prompts_that_other_sessions_go_on_from_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "together", lambda device: 1)
    made = Session(tiny_model("llama-gqa2"), "d2o", "0.4", max_new=8)
    reading = made.read(prompts(26, 17))
    assert reading.cache.own[0].keys is not None


def test_a_cpu_reads_a_batch_together() -> None:
    assert session.together(torch.device("cpu")) > 10**15
    assert session.together(torch.device("cuda")) == 65536
