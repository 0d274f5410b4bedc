"""Whole layers of a model handed out to the GPUs of a machine, by accelerate (``--device-map``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2obench.errors import OutOfMemory
from d2obench.models.ranks import split_options
from d2obench.suite.placement import Placement

if TYPE_CHECKING:
    import torch


def options(placement: Placement, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that put a model where it should lie; a rank joins the others here."""
    if placement.tensor_parallel > 1:
        return split_options(placement.tensor_parallel, device)
    if placement.device_map != "none":
        return {"device_map": placement.device_map}
    return {} if device.type == "cpu" else {"device_map": {"": device}}


def beside(model: Any) -> list[torch.device]:
    """The devices a model lies on beside its first one."""
    import torch

    given = (getattr(model, "hf_device_map", None) or {}).values()
    places = dict.fromkeys(f"cuda:{place}" if isinstance(place, int) else str(place) for place in given)
    return [torch.device(place) for place in places if torch.device(place) != model.device]


def hand_out(model: Any, device_map: str) -> Any:
    """Moves the layers of a model to the GPUs, as ``from_pretrained`` would have placed them."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    together = list(model._no_split_modules or ())
    limits = {gpu: free for gpu, free in get_max_memory().items() if gpu != "cpu"}
    if device_map != "sequential":
        limits = get_balanced_memory(model, max_memory=limits, no_split_module_classes=together)
    places = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=together)
    model.hf_device_map = places
    check_whole(type(model).__name__, model)
    return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def check_fits(name: str, needed: int, device: torch.device, placement: Placement) -> None:
    """Refuses ``needed`` bytes of weights that can't fit before the system's killer ends the process."""
    import psutil
    import torch

    where = str(device)
    if device.type == "cuda":
        spread = placement.device_map != "none"
        places = range(torch.cuda.device_count()) if spread else [device.index or 0]
        where = f"the {len(places)} GPUs" if spread else where
        cached = sum(torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu) for gpu in places)
        free = sum(torch.cuda.mem_get_info(gpu)[0] for gpu in places) + cached
        needed //= placement.tensor_parallel
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise OutOfMemory(
            f"the weights of {name} don't fit {where}",
            why=f"they take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free",
            remedy="use a smaller model or dtype, or another device",
        )


def check_whole(name: object, model: Any) -> None:
    """OutOfMemory where accelerate left layers on the CPU or the disk: every pass would move them."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if left := sorted(places & {"cpu", "disk"}):
        raise OutOfMemory(
            f"{name} doesn't fit the GPUs", why=f"some of its layers were left on {left[0]}", remedy="use a smaller one"
        )
