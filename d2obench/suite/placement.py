"""Where a model lies on one machine: on one device, its layers in turn on several, or every layer split over all."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class Placement(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """``[models]`` of a suite. Without either, a model lies on the cell's device.

    Args:
        device_map: accelerate's way to hand out whole layers to the GPUs; ``none`` for one device.
        tensor_parallel: processes ("ranks"), one a device, that hold a share of every layer's heads each.
    """

    device_map: Literal["none", "auto", "balanced", "sequential"] = "none"
    tensor_parallel: Annotated[int, msgspec.Meta(ge=1)] = 1

    @property
    def single(self) -> bool:
        """Whether one device holds it all."""
        return self.device_map == "none" and self.tensor_parallel == 1
