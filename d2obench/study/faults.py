"""Faults that are put into a worker on purpose, to test a gate: ``python -m d2obench.study.faults NAME=AMOUNT …``.

Each fault replaces one function of the engine in that worker's process, before the worker answers its first request.
Its docstring begins with the figure in which the gate has to notice it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def slow(share: float) -> None:
    """``tpot_s``: a decode step takes longer by ``share``, during which the CPU is busy."""
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
    """``kept_layers``: every layer keeps ``count`` more tokens than it should."""
    from d2obench.cache.policy_cache import PolicyCache

    budgets = PolicyCache._budgets

    def more(self: PolicyCache) -> Any:
        found = budgets(self)
        return found if self.keeps_all else found + int(count)

    PolicyCache._budgets = more  # type: ignore[method-assign]


def extra_cat(count: float) -> None:
    """``cats_step``: every decode step has ``count`` superfluous concatenations."""
    import torch

    from d2obench.cache.session import Session

    step = Session.step

    def joined(self: Session, tokens: Any) -> Any:
        for _ in range(int(count)):
            tokens = torch.cat([tokens, tokens])[: len(tokens)]
        return step(self, tokens)

    Session.step = joined  # type: ignore[method-assign]


def kept_reference(share: float) -> None:
    """``live_bytes``: a reference keeps all keys and values of the prompt in memory."""
    from d2obench.cache.compress import Packing

    add = Packing.add

    def leaking(self: Packing, layer: Any) -> None:
        layer.leak = layer.keys, layer.values
        add(self, layer)

    Packing.add = leaking  # type: ignore[method-assign]


def merge_weight(factor: float) -> None:
    """``kl``: evicted entries are merged with their weight multiplied by ``factor``."""
    from d2obench.policies import merging

    merge = merging.merge_into

    def heavy(target: Tensor, weight: Tensor, *pairs: tuple[Tensor, Tensor], prompt: bool = False) -> list[Tensor]:
        return merge(target, weight * factor, *pairs, prompt=prompt)

    merging.merge_into = heavy


def zero_scores(layer: float) -> None:
    """``kl``: all scores of one layer are 0 when the prompt is compressed."""
    from d2obench.policies.h2o import HeavyHitters

    score = HeavyHitters.score

    def blind(self: HeavyHitters, entries: Any) -> Any:
        return score(self, entries) * (entries.layer != int(layer))

    HeavyHitters.score = blind  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[float], None]] = {
    "slow": slow,
    "extra-slot": extra_slot,
    "extra-cat": extra_cat,
    "kept-reference": kept_reference,
    "merge-weight": merge_weight,
    "zero-scores": zero_scores,
}


def command(name: str, amount: float) -> Sequence[str]:
    """The arguments of ``python`` that start a worker with a fault."""
    return ("-P", "-m", "d2obench.study.faults", f"{name}={amount:g}")


if __name__ == "__main__":
    from d2obench.run.worker import main

    _, fault, *pipes = sys.argv
    named, _, amount_ = fault.partition("=")
    FAULTS[named](float(amount_))
    sys.argv = ["worker", *pipes]
    main()
