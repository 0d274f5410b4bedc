"""Two sessions on one model take turns: neither changes what the other says, whatever attention it needs."""

from __future__ import annotations

import pytest
import torch
from tiny_families import prompts, tiny_model

from d2obench.cache import Session


def alone(policy: str) -> list[torch.Tensor]:
    session = Session(tiny_model("llama-gqa2"), policy, None, max_new=4)
    session.prefill(prompts(20, 12))
    session.compress()
    return [session.step(torch.tensor([3, 4])) for _ in range(4)]


@pytest.mark.parametrize("other", ["hf-dynamic", "hf-static", "sdpa-static"])
def test_sessions_take_turns(other: str) -> None:
    expected = alone("full")
    model = tiny_model("llama-gqa2")
    ours, theirs = (Session(model, policy, None, max_new=4) for policy in ("full", other))
    for session in (ours, theirs):
        session.prefill(prompts(20, 12))
        session.compress()
    for want in expected:
        mine = ours.step(torch.tensor([3, 4]))
        assert torch.equal(mine, want)
        torch.testing.assert_close(theirs.step(torch.tensor([3, 4])), want, atol=1e-4, rtol=1e-4)
