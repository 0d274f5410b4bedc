"""A module with kvpress's interface and two presses, for tests without it: hooks on attention, a ratio, a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class BasePress:
    def compress(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a press of its own compresses")

    def forward_hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer = (kwargs.get("cache") or kwargs["past_key_values"]).layers[module.layer_idx]
        layer.keys, layer.values = self.compress(layer.keys, layer.values)
        return output

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        hooks = [
            layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True) for layer in model.model.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class RecentPress(BasePress):
    """Keeps the newest tokens."""

    compression_ratio: float = 0.0
    window_size: int = 4

    def __post_init__(self) -> None:
        assert self.window_size > 0, "a window has tokens"

    def compress(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        return keys[:, :, -kept:].contiguous(), values[:, :, -kept:].contiguous()


@dataclass
class WrapperPress(BasePress):
    press: BasePress = field(default_factory=RecentPress)

    @property
    def compression_ratio(self) -> float:
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value

    def compress(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.press.compress(keys, values)


@dataclass
class TargetPress(BasePress):
    """Knows no ratio."""

    target: int = 4
