"""A policy from another package: found by its entry point, listed, and run like the built-in ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_families import prompts, tiny_model

from d2obench.cache import Session
from d2obench.errors import PolicyError
from d2obench.policies import REGISTRY, own_policies, parse_choice, parse_policy

SOURCE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from d2obench.policies.base import Entries, Policy, window_rank


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Keeps the keys of the smallest norm (arXiv 2406.11430) and a recent window."""

    recent: int = 4
    name: ClassVar[str] = "keynorm"
    about: ClassVar[str] = "small keys"
    paper: ClassVar[str] = "arXiv 2406.11430"

    def rank(self, entries: Entries, keep: torch.Tensor) -> torch.Tensor:
        return window_rank(-entries.keys.float().norm(dim=-1), entries, 0, keep.clamp_max(self.recent))
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "throwaway_policy.py").write_text(SOURCE)
    info = tmp_path / "throwaway-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: throwaway\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[d2obench.policies]\nkeynorm = throwaway_policy:KeyNorm\nd2o = throwaway_policy:KeyNorm\n"
        "broken = throwaway_policy:Missing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    parse_choice.cache_clear()
    yield
    parse_choice.cache_clear()
    sys.modules.pop("throwaway_policy", None)


@pytest.mark.usefixtures("installed")
def test_a_plugin_is_listed_and_runs() -> None:
    assert "keynorm" in REGISTRY.names()
    assert REGISTRY.plugins()["keynorm"] == "throwaway: throwaway_policy:KeyNorm"
    assert parse_choice("keynorm(recent=2)").takes_budget
    for policy in ("keynorm(recent=2)", "keynorm+quant(bits=8)"):
        session = Session(tiny_model("llama-gqa2"), policy, "0.3", max_new=5)
        logits = session.prefill(prompts(30, 20))
        session.compress()
        for _ in range(5):
            logits = session.step(logits.argmax(-1))
        assert logits.isfinite().all()
        assert session.footprint().kept == [[9, 6], [9, 6]]


@pytest.mark.usefixtures("installed")
def test_a_plugin_never_replaces_a_built_in_one_and_its_faults_are_its_own() -> None:
    assert type(parse_policy("d2o")).__module__ == "d2obench.policies.d2o"
    with pytest.raises(PolicyError, match="the policy plugin 'broken' can't be imported"):
        parse_policy("broken")
    with pytest.raises(PolicyError, match="no parameter 'recents'; it has: recent"):
        parse_policy("keynorm(recents=2)")


def test_without_the_package_it_is_unknown() -> None:
    assert "keynorm" not in REGISTRY.names()
    with pytest.raises(PolicyError, match="unknown policy 'keynorm'"):
        parse_policy("keynorm")


@pytest.mark.parametrize("name", own_policies())
def test_a_plan_knows_without_an_import_which_policies_take_a_budget(name: str) -> None:
    assert parse_choice(name).takes_budget == REGISTRY.get(name).takes_budget
