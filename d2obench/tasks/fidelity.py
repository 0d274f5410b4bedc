"""Fidelity: how much a policy's predictions differ from those of the full cache on the same text.

The first ``prompt`` tokens of a document are the prompt. After compression, the document's next ``gen`` tokens are fed
one by one, whatever the model would have written (teacher forcing), and each of these steps gives a distribution to
compare. The distribution after the prompt's last token is not counted, because it comes before compression. The figures
are KL(full‖policy) in nats, agreement of the likeliest token and of the five likeliest ones, and the text's negative
log-likelihood. :mod:`d2obench.tasks.tails` adds the tails, and how KL drifts over the generation.

Every policy is compared with the full cache's log-probabilities. They are kept in this process for the next policy, up
to ``MEMORY`` bytes. Where those of a text don't fit, the full cache runs again beside each policy, one step ahead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from d2obench.errors import DataError, UsageError
from d2obench.record import Value
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import (
    Cell,
    Count,
    Evaluation,
    Item,
    Prefill,
    Quality,
    Task,
    TextBatch,
    Work,
    at_most,
    kept_of,
    shape_of,
)
from d2obench.tasks.prompts import prompt_digest
from d2obench.tasks.tails import drift, tails

if TYPE_CHECKING:
    import torch

    from d2obench.models import LoadedModel

MEMORY = 2**30
"""Bytes of log-probabilities that are kept."""
TOP = 5
"""Number of likeliest tokens whose agreement is counted, beside that of the single likeliest."""
_FULL: OrderedDict[tuple[Any, ...], list[torch.Tensor]] = OrderedDict()


class Fidelity(Task, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """KL with its tails, top-1 and top-5 agreement and perplexity against the full cache, on the same text.

    The text is generated, or a file of the user (``--data fidelity=FILE``), or the ``text`` fields of a data set of the
    hub: ``fidelity(hub=Salesforce/wikitext,config=wikitext-2-raw-v1)``.
    """

    shaped: ClassVar[bool] = True

    documents: Count = 4
    hub: str = ""
    config: str | None = None
    split: str = "test"
    revision: str = "main"

    def batches(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[TextBatch]:
        """See :meth:`Task.batches`; ``quality.data["fidelity"]`` is a text to use in place of the generated ones."""
        texts = self.texts(loaded, cell, quality)
        starts = range(0, len(texts), quality.batch)
        parts = [texts[start : start + quality.batch] for start in starts]
        return [TextBatch(range(start, start + len(part)), part) for start, part in zip(starts, parts, strict=True)]

    def run(self, loaded: LoadedModel, cell: Cell, batch: TextBatch, prefill: Prefill) -> list[Item]:
        """See :meth:`Task.run`."""
        return _compare(loaded, cell, batch.texts, shape_of(cell).prompt, batch.places[0], prefill)

    def conclude(self, cell: Cell, quality: Quality, items: list[Item]) -> Evaluation:
        """See :meth:`Task.conclude`."""
        path = quality.data.get(self.name)
        source = Path(path).name if path else self.hub or "generated"
        details = {"documents": len(items), "positions": shape_of(cell).gen, "text": source, "drift": drift(items)}
        return Evaluation(self.rescore(items), items, details)

    def rescore(self, items: list[Item]) -> dict[str, Value]:
        """See :meth:`Task.rescore`; tails are computed from the positions of all items together."""
        return super().rescore(items) | tails(items)

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """See :meth:`Task.work`; the full cache is run once for all policies and not counted here."""
        return None if shape is None else Work(at_most(self.documents, quality), shape.prompt, shape.gen)

    def texts(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[list[int]]:
        """The documents' tokens: those of the shape, and one more.

        Raises:
            DataError: the text is missing or too short.
            UsageError: the shape does not fit the model's context.
        """
        from d2obench.texts.writer import document_seed, token_ids

        shape, tokenizer, seed = shape_of(cell), loaded.tokenizer, cell.axes.seed
        if shape.prompt + shape.gen > loaded.context:
            raise UsageError(
                f"the shape {shape} is longer than the context of {loaded.name}",
                why=f"it has {loaded.context} tokens",
                remedy="use a shorter shape",
            )
        documents, tokens = at_most(self.documents, quality), shape.prompt + shape.gen + 1
        path = quality.data.get(self.name)

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
            return ids

        if not path and not self.hub:
            return [token_ids(document_seed(seed, i), tokens, encode, "fidelity") for i in range(documents)]
        from d2obench.tasks.data import Source, hub_text, read_text

        hub = Source(self.hub, self.revision, self.split, self.config)
        ids = encode(read_text(path) if path else hub_text(self.name, hub))
        fit = min(documents, len(ids) // tokens)
        if not fit:
            raise DataError(
                f"{path or self.hub} is too short for this shape",
                why=f"it has {len(ids)} tokens and one document takes {tokens}",
                remedy="give a longer text or a shorter shape",
            )
        stride = len(ids) // fit
        return [ids[i * stride : i * stride + tokens] for i in range(fit)]


def _compare(
    loaded: LoadedModel, cell: Cell, texts: list[list[int]], prompt: int, first: int, prefill: Prefill
) -> list[Item]:
    """One batch of equally long documents, with the full cache and with the cell's policy."""
    import torch

    kl, top1, top5, nll, dp = [], [], [], [], []
    kept: list[Item] = [{"kept": 1.0} for _ in texts]
    full = _full(loaded, cell, texts, prompt, prefill)
    # The full cache is its own reference, so it is run once and not twice.
    policy = _steps(loaded, cell, texts, prompt, kept, prefill) if cell.axes.policy != "full" else None
    for step, logprobs_full in enumerate(full):
        reference = logprobs_full.to(loaded.device)
        logprobs = next(policy) if policy else reference
        target = torch.tensor([text[prompt + step + 1] for text in texts], device=logprobs.device)
        kl.append((reference.exp() * (reference - logprobs)).sum(-1).clamp_min(0).cpu())
        top1.append((reference.argmax(-1) == logprobs.argmax(-1)).cpu())
        top5.append(_shared(reference, logprobs, TOP).cpu())
        own, full_own = (row.gather(-1, target[:, None])[:, 0] for row in (logprobs, reference))
        nll.append(-own.cpu())
        dp.append((own.exp() - full_own.exp()).cpu())
    if policy:
        policy.close()
    columns = [torch.stack(rows, 1).tolist() for rows in (kl, [row.int() for row in top1], top5, nll, dp)]
    return [
        {"id": f"{first + i}", "document": f"{first + i}", "prompt_digest": prompt_digest(texts[i]),
         "prompt_tokens": prompt, "kl": row[0], "top1": row[1], "top5": row[2], "nll": row[3], "dp": row[4],
         **kept[i]}
        for i, row in enumerate(zip(*columns, strict=True))
    ]  # fmt: skip


def _shared(one: torch.Tensor, other: torch.Tensor, count: int) -> torch.Tensor:
    """The share of the ``count`` most likely tokens that two distributions ``[B, V]`` have in common, ``[B]``."""
    first, second = (row.topk(min(count, row.shape[-1]), -1).indices for row in (one, other))
    return (first[:, :, None] == second[:, None]).any(-1).float().mean(-1)


def _steps(
    loaded: LoadedModel,
    cell: Cell,
    texts: Sequence[Sequence[int]],
    prompt: int,
    kept: list[Item],
    prefill: Prefill,
    policy: str = "",
) -> Generator[torch.Tensor, None, None]:
    """Log-probabilities ``[B, V]`` in float32 after each teacher-forced step.

    Args:
        kept: is filled with the fields of :func:`d2obench.tasks.base.kept_of` for each prompt.
        prefill: reads the prompts.
        policy: a policy without a budget, in place of the cell's.
    """
    import torch

    from d2obench.external import open_session
    from d2obench.measure.finite import require_finite

    gen, axes = len(texts[0]) - prompt - 1, cell.axes
    asked = (policy, None) if policy else (cell.policy.built, cell.budget)
    prompts = [list(text[:prompt]) for text in texts]
    session = open_session(loaded, *asked, max_new=gen, seed=axes.seed)
    try:
        prefill(session, prompts)
        session.compress()
        kept[:] = kept_of(session)
        tokens = torch.tensor([text[prompt : prompt + gen] for text in texts], device=loaded.device)
        for i in range(gen):
            logits = session.step(tokens[:, i])
            require_finite(logits, f"of decode step {i + 1}", session, prompts)
            yield logits.float().log_softmax(-1)
    finally:
        session.close()


def _full(
    loaded: LoadedModel, cell: Cell, texts: list[list[int]], prompt: int, prefill: Prefill
) -> Generator[torch.Tensor, None, None]:
    """The full cache's log-probabilities at each step: kept from an earlier run, or from a run now."""
    axes = cell.axes
    key = (loaded.name, loaded.digest, axes.dtype, axes.device, axes.seed, prompt, *map(prompt_digest, texts))
    if key in _FULL:
        _FULL.move_to_end(key)
        yield from _FULL[key]
        return
    # Keep the rows while yielding them, if all of them fit. Then drop those of other texts, the least recently used
    # first.
    rows: list[torch.Tensor] = []
    steps, fits = len(texts[0]) - prompt - 1, True
    for row in _steps(loaded, cell, texts, prompt, [], prefill, "full"):
        fits = row.numel() * 4 * steps <= MEMORY
        if fits:
            rows.append(row.cpu())
        yield row
    if fits:
        _FULL[key] = rows
        while sum(row.numel() * 4 for rows in _FULL.values() for row in rows) > MEMORY:
            _FULL.popitem(last=False)
