"""Faults put into a worker on purpose, to try a gate on them: ``python -m d2obench.study.faults NAME=AMOUNT …``.

Each is one small change at a seam of the engine, made in that process only and before it answers. Each names the
figure that must catch it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def slow(share: float) -> None:
    """``tpot_s``: a decode step takes ``share`` longer, busy on the host."""
    from d2obench.cache.session import Session

    step = Session.step

    def slower(self: Session, tokens: Any) -> Any:
        since = time.perf_counter()
        out = step(self, tokens)
        end = time.perf_counter()
        end += (end - since) * share
        while time.perf_counter() < end:
            pass
        return out

    Session.step = slower  # type: ignore[method-assign]


def extra_slot(count: float) -> None:
    """``kept_layers``: every layer keeps ``count`` tokens more than asked."""
    from d2obench.cache.policy_cache import PolicyCache

    budgets = PolicyCache._budgets

    def more(self: PolicyCache) -> Any:
        found = budgets(self)
        return found if self.keeps_all else found + int(count)

    PolicyCache._budgets = more  # type: ignore[method-assign]


def extra_cat(count: float) -> None:
    """``cats_step``: ``count`` needless concatenations in a decode step."""
    import torch

    from d2obench.cache.session import Session

    step = Session.step

    def joined(self: Session, tokens: Any) -> Any:
        for _ in range(int(count)):
            tokens = torch.cat([tokens, tokens])[: len(tokens)]
        return step(self, tokens)

    Session.step = joined  # type: ignore[method-assign]


def kept_reference(share: float) -> None:
    """``live_bytes``: something holds on to the full keys and values of the prompt."""
    from d2obench.cache.compress import Packing

    add = Packing.add

    def leaking(self: Packing, layer: Any) -> None:
        layer.leak = layer.keys, layer.values
        add(self, layer)

    Packing.add = leaking  # type: ignore[method-assign]


def merge_weight(factor: float) -> None:
    """``kl``: evicted entries are merged with ``factor`` times their weight."""
    from d2obench.policies import merging

    merge = merging.merge_into

    def heavy(target: Tensor, weight: Tensor, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        return merge(target, weight * factor, *pairs)

    merging.merge_into = heavy


def zero_scores(layer: float) -> None:
    """``kl``: one layer's scores are all alike when the prompt is compressed."""
    from d2obench.policies.h2o import H2O

    rank = H2O.rank

    def blind(self: H2O, entries: Any, keep: Any) -> Any:
        if entries.layer == int(layer):
            entries.stats["sum"] = entries.stats["sum"] * 0
        return rank(self, entries, keep)

    H2O.rank = blind  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[float], None]] = {
    "slow": slow,
    "extra-slot": extra_slot,
    "extra-cat": extra_cat,
    "kept-reference": kept_reference,
    "merge-weight": merge_weight,
    "zero-scores": zero_scores,
}


def command(name: str, amount: float) -> Sequence[str]:
    """The words after ``python`` that start a worker with this fault."""
    return ("-P", "-m", "d2obench.study.faults", f"{name}={amount:g}")


if __name__ == "__main__":
    from d2obench.run.worker import main

    _, fault, *pipes = sys.argv
    named, _, amount_ = fault.partition("=")
    FAULTS[named](float(amount_))
    sys.argv = ["worker", *pipes]
    main()
