"""Kernels: the time of each part of the engine, as a share of prefill and of a decode step.

The parts are attention, scores, allocation, similarity, eviction, merging, the model's projections, MLP and head, the
rest of the model, and the loop around it. :mod:`d2obench.measure.parts` measures them, and also how much longer a step
takes because it is measured. The shares of a cell add up to 1. ``quality.batch`` sequences are decoded together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import msgspec

from d2obench.errors import UsageError
from d2obench.record import Value
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, Count, Evaluation, Item, Quality, Report, Task, Work, shape_of

if TYPE_CHECKING:
    from d2obench.measure.parts import Block, RequestCost
    from d2obench.models import LoadedModel


class Kernels(Task, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The share of each part (attention, scores, eviction, merge, …) in prefill and in a decode step."""

    shaped: ClassVar[bool] = True
    sense: ClassVar[bool] = False

    requests: Count = 3
    steps: Count = 8

    def evaluate(self, loaded: LoadedModel, cell: Cell, quality: Quality, report: Report) -> Evaluation:
        """See :meth:`Task.evaluate`. Each request is an item; one more request before them warms up."""
        from d2obench.external import open_session
        from d2obench.measure.clock import clock_for
        from d2obench.measure.parts import WARM_STEPS, cost_of_parts
        from d2obench.tasks.prompts import timing_prompts

        axes = cell.axes
        if cell.policy.yardstick is not None:
            raise UsageError(
                f"the task kernels can't measure the parts of {axes.policy}",
                why="another library runs it, and its parts have no names here",
                remedy="use a policy of this engine: d2obench list policies",
            )
        shape = shape_of(cell)
        blocks = 2 * ((shape.gen - WARM_STEPS) // (2 * self.steps))
        if blocks < 2:
            raise UsageError(
                f"the shape {shape} is too short for kernels",
                why=f"the task needs {WARM_STEPS + 2 * self.steps} generated tokens",
                remedy="use a longer shape, or kernels(steps=2)",
            )
        texts = timing_prompts(loaded, shape.prompt, quality.batch, axes.seed)
        items: list[Item] = []
        for number in range(self.requests + 1):
            costs = cost_of_parts(
                lambda mark: open_session(
                    loaded, cell.policy.built, cell.budget, max_new=shape.gen, seed=axes.seed, mark=mark, beyond=True
                ),
                loaded.model,
                texts,
                steps=self.steps,
                blocks=blocks,
                clock=clock_for(loaded.device),
            )
            if number:
                items.append(_item(number, costs))
            report(number + 1, self.requests + 1)
        return Evaluation(self.rescore(items), items, {"batch": quality.batch, "steps": self.steps, "blocks": blocks})

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`Task.work`; one more request warms up."""
        return None if shape is None else Work((self.requests + 1) * quality.batch, shape.prompt, shape.gen)

    def rescore(self, items: list[Item]) -> dict[str, Value]:
        """Shares and times with their intervals. Requests are the clusters, and decode blocks are nested in them."""
        prompts = [[item["prefill"]] for item in items]
        with_ranges, without = ([item[key] for item in items] for key in ("marked", "bare"))
        figures = {
            **_shares("prefill_share", prompts),
            **_shares("step_share", with_ranges),
            "ttft_s": _over(prompts, lambda block: float(block["seconds"])),
            "tpot_s": _over(without, lambda block: block["seconds"] / block["steps"]),
        }
        if loop := figures.get("step_share:loop"):
            figures["loop_overhead"] = loop
        from d2obench.stats.intervals import paired_ratio

        on, off = ([block["seconds"] for request in several for block in request] for several in (with_ranges, without))
        ratio = paired_ratio(off, on)
        value, lo, hi = (None if end is None else end - 1 for end in (ratio.value, ratio.lo, ratio.hi))
        return {**figures, "ranges_overhead": msgspec.structs.replace(ratio, value=value, lo=lo, hi=hi)}


Blocks = Sequence[Sequence[Item]]


def _item(number: int, costs: RequestCost) -> Item:
    """What is recorded of a request: seconds of prefill and of each block of steps, in all and by part."""

    def record(block: Block, steps: int) -> Item:
        return {"seconds": block.whole, "steps": steps, "parts": block.parts}

    name = f"request {number}"
    blocks = [record(block, costs.steps) for block in costs.decode]
    return {
        "id": name,
        "document": name,
        "prefill": record(costs.prompt, 1),
        "marked": [block for block in blocks if block["parts"]],
        "bare": [block for block in blocks if not block["parts"]],
    }


def _shares(metric: str, requests: Blocks) -> dict[str, Value]:
    """``step_share:attention`` and the others, the largest first."""
    every = [block for request in requests for block in request]
    whole = {name: sum(block["parts"].get(name, 0.0) for block in every) for block in every for name in block["parts"]}

    def share(name: str) -> Callable[[Item], float]:
        return lambda block: block["parts"].get(name, 0.0) / block["seconds"]

    return {f"{metric}:{name}": _over(requests, share(name)) for name in sorted(whole, key=lambda name: -whole[name])}


def _over(requests: Blocks, figure: Callable[[Item], float]) -> Value:
    from d2obench.stats.intervals import median

    return median([[figure(block) for block in request] for request in requests])
