"""Diagnosis: where a policy loses, layer by layer.

The prompts are those of the task ``fidelity``. Nothing is generated: each layer is compressed on trial, and the
prompt's last queries show what it lost (``d2obench.cache.diagnosis`` defines the figures).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2obench.errors import UsageError
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell, Evaluation, Item, Quality, Report, Work, at_most, shape_of
from d2obench.tasks.fidelity import Fidelity
from d2obench.tasks.prompts import prompt_digest

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

PER_LAYER = ("evicted", "own", "due", "drawn", "error", "cost", "density")
"""The fields of :class:`d2obench.cache.diagnosis.LayerDiagnosis`."""


class Diagnosis(Fidelity, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What each layer loses by compressing a prompt: attention evicted, what merge targets draw, and output error.

    The text is that of the task ``fidelity``, or a file of yours (``--data diagnosis=FILE``).
    """

    def evaluate(self, loaded: LoadedModel, cell: Cell, quality: Quality, report: Report) -> Evaluation:
        """See :meth:`d2obench.tasks.base.Task.evaluate`."""
        from d2obench.cache.devices import shard_of
        from d2obench.policies.base import Policy

        policy, shape = cell.policy.built, shape_of(cell)
        if not isinstance(policy, Policy):
            raise UsageError(
                f"the task diagnosis can't look into {cell.axes.policy}",
                why="it is another library's cache",
                remedy="leave it out with --policy",
            )
        if shard_of(loaded.model) is not None:
            raise UsageError("the task diagnosis runs in one process", remedy="use one device instead of ranks")
        texts = self.texts(loaded, cell, quality)
        items: list[Item] = []
        for start in range(0, len(texts), quality.batch):
            part = [text[: shape.prompt] for text in texts[start : start + quality.batch]]
            items += _diagnose(loaded, cell, policy, part, start)
            report(len(items), len(texts))
        return Evaluation(self.rescore(items), items, {"documents": len(items), "diagnosis": _means(items)})

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`d2obench.tasks.base.Task.work`."""
        return None if shape is None else Work(at_most(self.documents, quality), shape.prompt, 0)


def _diagnose(loaded: LoadedModel, cell: Cell, policy: Any, prompts: list[list[int]], first: int) -> list[Item]:
    """One batch of equally long prompts."""
    from d2obench.cache.diagnosis import DiagnosingSession

    session = DiagnosingSession(loaded, policy, cell.budget, max_new=1, seed=cell.axes.seed)
    try:
        session.prefill(prompts)
        layers = session.diagnose()
    finally:
        session.close()
    items = []
    for i, prompt in enumerate(prompts):
        found = {name: [float(held[i]) for layer in layers if (held := getattr(layer, name)) is not None]
                 for name in PER_LAYER}  # fmt: skip
        mean = {name: sum(values) / len(values) for name, values in found.items() if values}
        item = {"id": f"{first + i}", "document": f"{first + i}", "prompt_digest": prompt_digest(prompt),
                "prompt_tokens": len(prompt), "evicted_attention": mean["evicted"], "output_error": mean["error"],
                "layers": found}  # fmt: skip
        if policy.merge_spec is not None:
            item |= {"target_due": mean["due"], "target_drawn": mean["drawn"]}
        items.append(item)
    return items


def _means(items: list[Item]) -> dict[str, list[float]]:
    """Each figure of each layer, as a mean over documents."""
    found = {}
    for name in PER_LAYER:
        columns = zip(*(item["layers"][name] for item in items), strict=True)
        found[name] = [round(sum(column) / len(items), 9) for column in columns]
    return found
