"""Where a model lies: on one device, its layers over the GPUs of a machine, or its heads over several processes.

``--device-map`` hands out whole layers, by accelerate. ``--tensor-parallel`` splits every layer by transformers' own
plan: each rank is a process with torchrun's ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. Ranks that d2obench starts
itself meet through a file in a private folder (``RENDEZVOUS``), so that nobody else on the machine can join them; under
torchrun they meet at its address.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from d2obench.errors import ModelError, OutOfMemory, UsageError
from d2obench.suite.definition import Placement

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


def dispatch_layers(model: Any, device_map: str) -> Any:
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
        on_many = placement.device_map != "none"
        places = range(torch.cuda.device_count()) if on_many else [device.index or 0]
        where = f"the {len(places)} GPUs" if on_many else where
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


RENDEZVOUS, TIMEOUT_S = "D2OBENCH_RENDEZVOUS", "D2OBENCH_RENDEZVOUS_TIMEOUT_S"
"""Variables of a rank: the file where it meets the others, and how long it waits for any of them."""
SPLIT = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma3_text")
"""Architectures whose plan gives each rank its own KV heads. Phi-3's fused projection is gathered, Falcon has none."""


def check_split(name: str, architecture: str, kv_heads: int, ranks: int) -> None:
    """A UsageError where ``ranks`` processes can't share the KV heads of a model."""
    if architecture not in SPLIT:
        raise UsageError(
            f"--tensor-parallel {ranks} can't split {name}",
            why=f"transformers' plan gives no rank KV heads of its own for '{architecture}'",
            remedy=f"use one of {', '.join(SPLIT)}, or --device-map auto",
        )
    if kv_heads % ranks:
        fits = ", ".join(str(n) for n in range(2, kv_heads + 1) if kv_heads % n == 0)
        raise UsageError(
            f"--tensor-parallel {ranks} can't share the {kv_heads} KV heads of {name}",
            why="every rank holds as many as the others",
            remedy=f"use {fits}" if fits else "leave it out",
        )


def join(ranks: int, device: torch.device) -> None:
    """Makes this process one of ``ranks``; nothing happens twice.

    Raises:
        UsageError: it was started alone, or among another number of ranks.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise UsageError(
                f"{ranks} ranks were asked for and this process is alone",
                remedy="use d2obench run --tensor-parallel, or start it with torchrun",
            )
        path, seconds = os.environ.get(RENDEZVOUS), float(os.environ.get(TIMEOUT_S, "1800"))
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        where: dict[str, Any] = {"init_method": "env://"}
        if path:
            where = {"init_method": f"file://{path}", "rank": rank, "world_size": world}
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(seconds=seconds),
            device_id=device if cuda else None,
            **where,
        )
    if dist.get_world_size() != ranks:
        raise UsageError(f"{ranks} ranks were asked for and {dist.get_world_size()} were started")


def split_options(ranks: int, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for one rank's share of a model, once it has joined the others."""
    from transformers.distributed import DistributedConfig

    join(ranks, device)
    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def own_share(model: Any) -> None:
    """Lets go of what a rank's parameters were cut from: on a CPU a share is a view, and the whole tensor stays."""
    from torch.distributed.tensor import DTensor
    from torch.nn import Parameter

    fresh: dict[int, Any] = {}  # tied ones stay one
    for module in model.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            if not isinstance(held, DTensor):
                continue
            part = local(held).detach()
            if part.untyped_storage().nbytes() <= part.nbytes:
                continue
            if id(held) not in fresh:
                whole = DTensor.from_local(
                    part.clone(), held.device_mesh, held.placements, run_check=False, shape=held.shape,
                    stride=held.stride(),
                )  # fmt: skip
                fresh[id(held)] = held, Parameter(whole, requires_grad=False)
            module.register_parameter(name, fresh[id(held)][1])


def local(tensor: Any) -> Any:
    """The part of a parameter that this process holds; the tensor itself where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def no_gguf(path: Any) -> ModelError:
    """transformers dequantises a GGUF file into whole tensors only."""
    return ModelError(
        f"--tensor-parallel can't split {path}",
        why="a GGUF file is dequantised whole",
        remedy="use a folder with safetensors, a hub id, or embedded",
    )
