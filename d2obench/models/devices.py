"""Placement of a model: on one device, its layers over the GPUs of a machine, or its heads over several processes.

``--device-map`` distributes whole layers, by accelerate. ``--tensor-parallel`` splits every layer by transformers' own
plan: each rank is a process with torchrun's variables ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. Ranks that d2obench
starts itself find each other through a file in a private folder (``RENDEZVOUS``), so that no other user of the machine
can join; under torchrun they use its address.
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
    """Arguments of ``from_pretrained`` that place a model as requested; with several ranks, waits for the other
    ranks."""
    if placement.tensor_parallel > 1:
        return split_options(placement.tensor_parallel, device)
    if placement.device_map != "none":
        return {"device_map": placement.device_map}
    return {} if device.type == "cpu" else {"device_map": {"": device}}


def beside(model: Any) -> list[torch.device]:
    """The devices of a model other than its first one."""
    import torch

    given = (getattr(model, "hf_device_map", None) or {}).values()
    places = dict.fromkeys(f"cuda:{place}" if isinstance(place, int) else str(place) for place in given)
    return [torch.device(place) for place in places if torch.device(place) != model.device]


def dispatch_layers(model: Any, device_map: str) -> Any:
    """Moves the layers of a loaded model to the GPUs, to the places that ``from_pretrained`` would have chosen."""
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
    """Raises OutOfMemory if ``needed`` bytes of weights don't fit, before the operating system would kill the
    process."""
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
    """Raises OutOfMemory if accelerate left layers on the CPU or the disk, from where every forward pass would move
    them."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if left := sorted(places & {"cpu", "disk"}):
        raise OutOfMemory(
            f"{name} doesn't fit the GPUs", why=f"some of its layers were left on {left[0]}", remedy="use a smaller one"
        )


RENDEZVOUS, TIMEOUT_S = "D2OBENCH_RENDEZVOUS", "D2OBENCH_RENDEZVOUS_TIMEOUT_S"
"""Environment variables of a rank: the file through which ranks find each other, and how long to wait for any of
them."""
SPLIT = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma3_text")
"""Architectures whose plan gives each rank its own KV heads. Phi-3's fused projection is gathered; Falcon has no
plan."""


def check_split(name: str, architecture: str, kv_heads: int, ranks: int) -> None:
    """Raises a UsageError if ``ranks`` processes can't divide the KV heads of a model evenly."""
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
    """Makes this process one of ``ranks`` in a process group; has no effect if it already is.

    Raises:
        UsageError: the process was started alone, or with another number of ranks.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        # 1. find the other ranks: through the private file if d2obench started them, otherwise through torchrun's
        # address
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
        # 2. NCCL for GPUs, Gloo for CPUs
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
    """Arguments of ``from_pretrained`` for one rank's share of a model; joins the other ranks first."""
    from transformers.distributed import DistributedConfig

    join(ranks, device)
    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def own_share(model: Any) -> None:
    """Frees the whole tensors from which a rank's parameters were cut: on a CPU a share is a view that keeps them
    alive."""
    from torch.distributed.tensor import DTensor
    from torch.nn import Parameter

    fresh: dict[int, Any] = {}  # by id, so that tied parameters stay tied
    for module in model.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            if not isinstance(held, DTensor):
                continue
            part = local(held).detach()
            if part.untyped_storage().nbytes() <= part.nbytes:
                continue
            # replace the view by a copy of the rank's own part
            if id(held) not in fresh:
                whole = DTensor.from_local(
                    part.clone(), held.device_mesh, held.placements, run_check=False, shape=held.shape,
                    stride=held.stride(),
                )  # fmt: skip
                fresh[id(held)] = held, Parameter(whole, requires_grad=False)
            module.register_parameter(name, fresh[id(held)][1])


def local(tensor: Any) -> Any:
    """The part of a parameter that this process holds; the tensor itself if it is not divided."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def no_gguf(path: Any) -> ModelError:
    """The error for a GGUF file with several ranks: transformers dequantises it into whole tensors only."""
    return ModelError(
        f"--tensor-parallel can't split {path}",
        why="a GGUF file is dequantised whole",
        remedy="use a folder with safetensors, a hub id, or embedded",
    )
