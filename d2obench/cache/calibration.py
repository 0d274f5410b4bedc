"""Statistics of a model's queries, measured on plain text, for policies that need them (``triattention``).

Each text is read in one forward pass by a cache that keeps nothing, so that one layer's queries are in memory at a
time. What was measured for a model with real weights on generated texts is kept in the cache folder; its name depends
on the weights and on the texts.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from d2obench.attention import interface
from d2obench.cache import policy_cache
from d2obench.cache.devices import shard_of
from d2obench.errors import PolicyError, RecordError, UsageError
from d2obench.models import LoadedModel
from d2obench.models.embedded import cache_folder
from d2obench.policies.base import Entries, Needs, Policy
from d2obench.policies.calibration import GENERATED, QueryStatistics, digest_of, read, sums_of
from d2obench.record import write_atomic
from d2obench.texts.writer import token_ids

TEXTS, LENGTH = 2, 2048
"""Number of generated texts, and the tokens of each, at most the model's context."""
RANDOM = 64
"""Tokens of each text for a model without a tokenizer, which are drawn at random."""
EVERY = 2**31
"""More queries than a text has."""

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``, in layers of all texts."""
_known: weakref.WeakKeyDictionary[PreTrainedModel, QueryStatistics] = weakref.WeakKeyDictionary()
"""What was measured on generated texts in this process."""


@dataclass(frozen=True)
class Listener(Policy):
    """Keeps almost nothing, and hands the queries of each layer over."""

    hear: Callable[[Entries], None] = lambda entries: None

    @property
    def needs(self) -> Needs:
        return Needs(queries=EVERY)

    def describe(self, entries: Entries) -> None:
        self.hear(entries)


def measure(
    model: PreTrainedModel,
    texts: Sequence[list[int]],
    *,
    about: str,
    name: str = "",
    weights: str = "",
    progress: Progress | None = None,
) -> QueryStatistics:
    """Reads texts and returns the statistics of the model's queries.

    Args:
        model: a transformers model of a supported family.
        texts: tokens of each text, at most as many as the model's context.
        about: what was read, for records.
        name: the model's name.
        weights: what identifies its weights.
        progress: called after each layer of each text.

    Raises:
        PolicyError: the model's positions can't be undone, or its heads are divided among processes.
        UsageError: a text is empty or longer than the model's context.
    """
    rotary, limit = interface.rotary(model), interface.longest(model)
    if shard_of(model) is not None:
        raise PolicyError(
            "the queries of a model whose heads are divided among processes can't be measured",
            why="each process sees its own",
            remedy="run d2obench calibrate without --tensor-parallel and give its file: stats=FILE",
        )
    if rotary is None:
        raise PolicyError(
            "this model's queries can't be measured",
            why="its rotary angles depend on the length of the text, so that positions can't be undone",
            remedy="use another policy",
        )
    if not texts or not all(0 < len(text) <= limit for text in texts):
        lengths = ", ".join(str(len(text)) for text in texts)
        raise UsageError(f"texts of {lengths or 'no'} tokens can't be read", why=f"the model can see 1 to {limit}")
    found: dict[int, tuple[Tensor, Tensor]] = {}
    done, tokens = 0, sum(map(len, texts))

    def hear(entries: Entries) -> None:
        nonlocal done
        assert entries.queries is not None
        own = sums_of(entries.queries[0], entries.position[0, 0], rotary.to(entries.keys.device))
        mean, size = (held.view(entries.keys.shape[1], -1, held.shape[-1]).cpu() for held in own)
        before = found.get(entries.layer)
        found[entries.layer] = (mean, size) if before is None else (before[0] + mean, before[1] + size)
        done += 1
        if progress is not None:
            progress("calibrate", done, entries.layers * len(texts))

    interface.attach(model)
    for text in texts:
        held = policy_cache.cache(Listener(hear=hear), 1, model=model, whole=True, max_new=1)
        with torch.inference_mode():
            ids = torch.tensor([text], device=model.device)
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **{interface.keyword(model): held})
        held.free()
    means, sizes = (torch.stack([found[layer][part] for layer in sorted(found)]) / tokens for part in (0, 1))
    made = QueryStatistics(means.float(), sizes.float(), name, weights, about, tokens)
    return replace(made, digest=digest_of(made.packed()))


def calibrated(policy: Policy, model: PreTrainedModel, tokenizer: Any, loaded: LoadedModel | None = None) -> Policy:
    """The policy with the statistics that it needs of a model; the policy itself if it needs none, or has them.

    Args:
        policy: a policy.
        model: the model that it is going to run with.
        tokenizer: its tokenizer; None if there is none.
        loaded: what else is known of the model.

    Raises:
        PolicyError: the file that the policy names can't be read or is of another model; see :func:`measure`.
    """
    if not policy.calibration or policy.statistics is not None:
        return policy
    return replace(policy, statistics=_statistics(policy.calibration, model, tokenizer, loaded, None))


def prepare(policy: Policy, loaded: LoadedModel, progress: Progress) -> None:
    """Measures what a policy needs to know of a model ahead of its first session, with progress."""
    if policy.calibration:
        _statistics(policy.calibration, loaded.model, loaded.tokenizer, loaded, progress)


def record_of(policy: Policy, loaded: LoadedModel) -> dict[str, Any]:
    """What the record of a cell says about the statistics that its policy used; empty for most policies."""
    if not policy.calibration:
        return {}
    found = _statistics(policy.calibration, loaded.model, loaded.tokenizer, loaded, None)
    return {"calibration": found.record}


def _statistics(
    source: str, model: PreTrainedModel, tokenizer: Any, loaded: LoadedModel | None, progress: Progress | None
) -> QueryStatistics:
    if source == GENERATED:
        if model not in _known:
            _known[model] = _measured_on_generated(model, tokenizer, loaded, progress)
        return _known[model]
    found, rotary = read(source), interface.rotary(model)
    config: Any = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = sum(window is None for window in interface.layer_kinds(model))
    name, weights = ("", "") if loaded is None else (loaded.name, loaded.digest)
    pairs = 0 if rotary is None else len(rotary)
    found.check_fits(layers, *interface.kv_heads(model), width, pairs, name, weights)
    return found


def generated_texts(model: PreTrainedModel, tokenizer: Any, tokens: int = TEXTS * LENGTH) -> list[list[int]]:
    """Generated prose, in texts of LENGTH tokens or of the model's context; random tokens without a tokenizer."""
    limit = interface.longest(model)
    if tokenizer is None:
        drawn = torch.Generator().manual_seed(0)
        shape, vocabulary = (TEXTS, min(RANDOM, limit)), model.config.get_text_config().vocab_size
        texts: list[list[int]] = torch.randint(0, vocabulary, shape, generator=drawn).tolist()
        return texts

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    size = min(LENGTH, limit, tokens)
    return [token_ids(i, size, encode, "calibration") for i in range(max(1, tokens // size))]


def _measured_on_generated(
    model: PreTrainedModel, tokenizer: Any, loaded: LoadedModel | None, progress: Progress | None
) -> QueryStatistics:
    texts = generated_texts(model, tokenizer)
    name, weights = ("", "") if loaded is None else (loaded.name, loaded.digest)
    about = "random tokens" if tokenizer is None else GENERATED
    place = None
    if loaded is not None and loaded.has_sense:
        key = hashlib.sha256(repr((weights, str(model.dtype), texts)).encode()).hexdigest()[:16]
        place = cache_folder() / "calibrations" / f"{key}.safetensors"
        with suppress(PolicyError):  # not there yet, or damaged
            return read(str(place))
    found = measure(model, texts, about=about, name=name, weights=weights, progress=progress)
    if place is not None:
        with suppress(RecordError):  # it is measured again in the next process
            write_atomic(place, found.packed())
    return found


def write(found: QueryStatistics, path: Path) -> None:
    """Writes the file of ``d2obench calibrate``.

    Raises:
        RecordError: the disk is full or the folder can't be written.
    """
    write_atomic(path, found.packed())
