"""Our policies keep the entries that kvpress keeps: same weights, same prompt, same budget.

What kvpress keeps is in tests/golden/kvpress.json; where kvpress can be imported, it is computed anew. Where the two
differ, it is by rule:

* ``lagkv``: an entry is ranked by its place in its chunk, so entries of several chunks have equal ranks. We keep the
  earlier one, kvpress any of them.
* ``knorm``: two norms that are equal up to rounding.
* ``kvzip``: the sinks of the first chunk are always kept here. kvpress scores them like the rest where nothing, such as
  a chat template, stands before the text; so the comparison is without sinks. It evicts a whole number of all heads'
  entries, rounded down from its ratio: a ratio that is 0.05 entries of a head too high makes it keep 13,496 of
  SmolLM2-135M's 45,000 entries in place of 13,500. The 4 that only we keep are those of the next highest scores of
  both; scores differ by 4e-6 at most. With the ratio of the right number, the same entries are kept.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from kvpress_kept import FAMILY, GOLDEN, KEEP, LENGTH, PRESSES, Kept, kept
from tiny_families import plain_model, prompts, tiny_model

from d2obench.cache import Session

APART = {"knorm": 2, "lagkv(lag=30,sinks=2)": 80}
"""How many entries of 1,260 only one of both keeps, for the reasons above; none for the other policies."""


def ours(policy: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Kept, list[Any]]:
    """The positions of what we keep, and the ranks of all entries of each layer, ``[H, N]``."""
    session, ranks = Session(tiny_model(FAMILY), policy, str(KEEP), max_new=1), []
    rank = type(session.policy).rank

    def spy(self: Any, entries: Any, keep: Any) -> Any:
        ranks.append(rank(self, entries, keep))
        return ranks[-1]

    monkeypatch.setattr(type(session.policy), "rank", spy)
    session.prefill(prompts(LENGTH))
    session.compress()
    where = session.cache.state.where().tolist()
    return [[sorted(j for j in row if j >= 0) for row in layer] for layer in where], [one[0] for one in ranks]


@pytest.mark.parametrize("policy", PRESSES)
def test_the_entries_are_those_of_kvpress(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_here, ranks = ours(policy, monkeypatch)
    apart = 0
    for layer, theirs in enumerate(json.loads(GOLDEN.read_text())[policy]):
        for head, given in enumerate(theirs):
            mine, rank = kept_here[layer][head], ranks[layer][head]
            apart += len(set(mine) ^ set(given))
            torch.testing.assert_close(rank[given].sort().values, rank[mine].sort().values, rtol=1e-5, atol=0)
    assert sum(len(head) for layer in kept_here for head in layer) == 10 * KEEP
    assert apart <= APART.get(policy, 0)


@pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress needs an environment of its own")
@pytest.mark.parametrize("policy", PRESSES)
def test_the_golden_file_is_what_kvpress_keeps(policy: str) -> None:
    model: Any = plain_model(FAMILY)
    assert kept(PRESSES[policy], model, prompts(LENGTH)[0], KEEP) == json.loads(GOLDEN.read_text())[policy]
