"""NVIDIA's kvpress in the same measurement loop: one of its presses compresses the prompt, layer by layer, in its own
hook.

It runs in an environment in which kvpress can be imported, with another version of transformers
(``d2obench.run.isolated_workers``). A press does not support padding, so prompts of different lengths are read one by
one. Entries that a press masks per head instead of evicting them (AdaKV and related presses) stay in memory and are
counted as held.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from d2obench.attention import interface
from d2obench.cache.session import Footprint
from d2obench.errors import ModelError, PolicyError, UsageError
from d2obench.external.library import LibrarySession
from d2obench.models import LoadedModel
from d2obench.policies.yardsticks import Kvpress, Yardstick
from d2obench.suite.grammar import Budget, parse_spec

WHILE_DECODING = ("DecodingPress", "PrefillDecodingPress", "CompressionRatioDecodingPress")


class KvpressSession(LibrarySession):
    """Runs a press with ``compression_ratio`` 1 − budget; a budget in tokens is converted to a ratio for each
    prompt."""

    def __init__(self, loaded: LoadedModel, asked: Kvpress, budget: Budget | str | None, **options: Any) -> None:
        super().__init__(loaded, asked, budget, **options)
        if self.budget is None:
            raise PolicyError(f"'kvpress:{asked.method}' needs a budget", remedy="give one, for example --budget 0.2")
        self._parts: list[tuple[Any, Tensor, list[Any]]] = []
        """Cache, positions of the next tokens and per-head masks, for each group of sequences."""
        self._prompt_bytes = 0
        self._kept: list[list[float]] = []

    @staticmethod
    def ready(asked: Yardstick) -> None:
        """Raises what :func:`build` raises."""
        assert isinstance(asked, Kvpress)
        build(asked)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """See :meth:`Session.prefill`; the press compresses during the forward pass."""
        alike = len({len(prompt) for prompt in prompts}) <= 1
        self._parts, logits = [], []
        for group in [prompts] if alike else [[prompt] for prompt in prompts]:
            with self._pressing(len(group[0]) if group else 0):
                logits.append(super().prefill(group))
            self._parts.append((self.cache, self._positions, self._take_masks()))
        self._lengths = [len(prompt) for prompt in prompts]
        return torch.cat(logits)

    @torch.inference_mode()
    def compress(self) -> None:
        """Does not compress, since that happened during prefill; records how much was kept."""
        self._check_begun("compress")
        self._prompt_bytes, self._kept = self._bytes(), self._held()
        self.mark("decode")

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """See :meth:`Session.step`."""
        self._check_begun("step")
        return self._read(tokens[:, None])

    @torch.inference_mode()
    def fork(self, sequences: Sequence[int]) -> Self:
        """See :meth:`Session.fork`.

        Raises:
            ModelError: a part of a batch, where the press masks entries per head.
        """
        self._check_begun("fork")
        found, start = copy.copy(self), 0
        found._parts, found._lengths = [], [self._lengths[i] for i in sequences]
        for cache, positions, masks in self._parts:
            own = [i - start for i in sequences if start <= i < start + len(positions)]
            start += len(positions)
            if not own:
                continue
            if own != [*range(len(positions))] and any(mask is not None for mask in masks):
                raise ModelError(
                    "a part of a batch can't be asked alone with this press",
                    why="it masks entries of the whole batch",
                    remedy="use --set quality.batch=1",
                )
            chosen, copied = torch.tensor(own, device=positions.device), copy.deepcopy(cache)
            copied.reorder_cache(chosen)
            found._parts.append((copied, positions[chosen], masks))
        return found

    @property
    def decode_path(self) -> str:
        return f"kvpress' cache, {self.loaded.model.config._attn_implementation} attention of PyTorch"

    def prepare(self) -> None:
        """Does nothing: steps are not captured, because the caches of several groups are used in turn."""

    @torch.inference_mode()
    def skip_to(self, tokens: int) -> None:
        """Not supported."""
        raise ModelError("kvpress can't be moved on", remedy="use --decode full")

    @torch.inference_mode()
    def footprint(self) -> Footprint:
        """The size of the caches of all groups, counted from their tensors."""
        self._check_begun("footprint")
        held, size = self._held(), self._bytes()
        kept = self._kept or held
        total = sum(self._lengths)
        heads, _ = interface.kv_heads(self.loaded.model)
        gone = [int(heads * (total - sum(layer))) for layer in kept]
        assert self.budget is not None
        return Footprint(
            kv_bytes=size,
            prompt_kv_bytes=self._prompt_bytes or size,
            state_bytes=0,
            prompt_tokens=self._lengths,
            requested=sum(self.budget.of(length) for length in self._lengths) / len(self._lengths),
            kept=kept,
            held=held,
            effective=sum(map(sum, kept)) / (len(kept) * total),
            merged_layers=[0] * len(kept),
            evicted_layers=gone,
        )

    @torch.inference_mode()
    def snapshot(self, decode_only: bool = False) -> Any:
        """References to the tensors: a dynamic layer never modifies a tensor in place, so no copy is needed."""
        return [
            ([dict(vars(layer)) for layer in cache.layers], positions.clone(), masks)
            for cache, positions, masks in self._parts
        ]

    @torch.inference_mode()
    def restore(self, saved: Any) -> None:
        """Brings back a :meth:`snapshot` of this session."""
        for i, (layers, positions, masks) in enumerate(saved):
            cache = self._parts[i][0]
            for layer, held in zip(cache.layers, layers, strict=True):
                vars(layer).update(held)
            self._parts[i] = cache, positions.clone(), masks

    def close(self) -> None:
        """Frees the caches."""
        self._parts = []
        super().close()

    def _read(self, tokens: Tensor) -> Tensor:
        found, start = [], 0
        for i, (cache, positions, masks) in enumerate(self._parts):
            end = start + positions.shape[0]
            self.cache, self._positions = cache, positions
            self._set_masks(masks)
            try:
                found.append(super()._read(tokens[start:end]))
            finally:
                self._take_masks()
            self._parts[i] = cache, self._positions, masks
            start = end
        return torch.cat(found)

    def _new_cache(self, longest: int) -> Any:
        return DynamicCache()

    @contextmanager
    def _pressing(self, prompt: int) -> Iterator[None]:
        """Installs the press's hooks on the model, and marks their time as compression."""
        assert isinstance(self.asked, Kvpress) and self.budget is not None
        press = build(self.asked)
        keep = min(self.budget.of(prompt), prompt)
        # kvpress keeps int(prompt × (1 − ratio)); adding half a token makes this exact despite rounding
        press.compression_ratio = 0.0 if keep == prompt else 1 - (keep + 0.5) / prompt
        hook = press.forward_hook

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.mark("compress")
            result = hook(*args, **kwargs)
            self.mark("prefill")
            return result

        press.forward_hook = marked
        with press(self.loaded.model):
            yield

    def _attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.loaded.model.base_model.layers]

    def _take_masks(self) -> list[Any]:
        """Removes and returns the per-head masks that kvpress left on the model, because other sessions use the same
        model."""
        found = [getattr(module, "masked_key_indices", None) for module in self._attentions()]
        self._set_masks([None] * len(found))
        return found

    def _set_masks(self, masks: list[Any]) -> None:
        for module, mask in zip(self._attentions(), masks, strict=True):
            module.masked_key_indices = mask

    def _held(self) -> list[list[float]]:
        layers = zip(*(cache.layers for cache, _, _ in self._parts), strict=True)
        return [[float(part.keys.shape[2]) for part in layer for _ in range(part.keys.shape[0])] for layer in layers]

    def _bytes(self) -> int:
        tensors = (tensor for cache, _, _ in self._parts for one in cache.layers for tensor in (one.keys, one.values))
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def build(asked: Kvpress) -> Any:
    """Creates the requested press.

    Raises:
        UsageError: kvpress is not installed here.
        PolicyError: an unknown press or parameter, or a press whose compression can't be set by a budget.
    """
    press = _press(asked.method, asked.params)
    if type(press).__name__ in WHILE_DECODING or getattr(press, "compression_ratio", None) is None:
        raise PolicyError(
            f"kvpress:{asked.method} takes no budget", why="only presses of the prompt with a compression_ratio do"
        )
    return press


def _press(name: str, params: Mapping[str, Any]) -> Any:
    kvpress = _kvpress()
    kind = getattr(kvpress, name, None)
    if not (isinstance(kind, type) and issubclass(kind, kvpress.BasePress)):
        presses = [word for word in dir(kvpress) if word.endswith("Press") and word != "BasePress"]
        near = difflib.get_close_matches(name, presses, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise PolicyError(f"kvpress has no press '{name}'", remedy=f"{hint}it has {', '.join(presses)}")
    try:
        return kind(**{key: _value(value) for key, value in params.items()})
    except (TypeError, ValueError, AssertionError) as problem:
        raise PolicyError(f"kvpress:{name} can't be made", why=str(problem).replace("\n", " ")[:200]) from None


def _value(value: Any) -> Any:
    """Converts a parameter; the name of a press, with its own parameters, becomes that press."""
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, str) and value.partition("(")[0].endswith("Press"):
        (part,) = parse_spec(value).parts
        return _press(part.name, part.params)
    return value


def _kvpress() -> Any:
    try:
        import kvpress
    except ImportError as problem:
        raise UsageError(
            "kvpress can't be imported here",
            why=str(problem),
            remedy="run d2obench bridges install kvpress, or give --python an interpreter that has it",
        ) from None
    return kvpress
