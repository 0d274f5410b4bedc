"""Compiles kernels to machine code for GPUs that are not here, from the very launches that our code makes.

``python compile_kernels.py ARCHITECTURES DTYPES HEADS…``, for example ``90 bfloat16 4x128``: compute capabilities
without the point, dtypes, and query heads per KV head × head dimension. Needs Triton, but no GPU. Prints a line a
kernel: its name, what launched it, the capability, registers of a thread, bytes it spills, bytes of shared memory of a
program, and the kind of tensor-core instruction.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from decode_cases import Case, fresh, state_of
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from d2obench.attention import triton_columns as columns
from d2obench.decode.triton import backend
from d2obench.models import gated_triton, rotary_triton
from d2obench.policies import merging_triton

KINDS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.bool: "*i1",
}  # fmt: skip
STEPS = [("d2o", 1), ("d2o", 5), ("d2o(preset=mass)", 1), ("h2o", 1), ("h2o", 5), ("streaming", 1), ("full", 1)]
FEW = [("d2o", 5), ("full", 1)]
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def kind_of(given: Any) -> str:
    """The type of an argument, as Triton's launcher sees it."""
    if isinstance(given, torch.Tensor):
        return KINDS[given.dtype]
    return "fp32" if isinstance(given, float) else "i32"


def build(kernel: Any, given: tuple[Any, ...], meta: dict[str, Any], architecture: int) -> tuple[Any, str]:
    """The compiled kernel of a launch, and what the assembler said."""
    meta = dict(meta)
    options = {"num_stages": meta.pop("num_stages", 3), "num_warps": meta.pop("num_warps", 4)}
    names, fixed = kernel.arg_names, {*kernel.do_not_specialize, *kernel.do_not_specialize_on_alignment}
    kinds = dict(zip(names, map(kind_of, given), strict=False)) | dict.fromkeys(meta, "constexpr")
    known = dict(zip(names, given, strict=False))
    aligned = [
        name
        for name, value in known.items()
        if name not in fixed and (kinds[name].startswith("*") or (isinstance(value, int) and value % 16 == 0))
    ]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs=meta,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return built, said.getvalue()


@contextlib.contextmanager
def noted() -> Iterator[list[Launch]]:
    """Launches are noted and not made."""
    launches: list[Launch] = []
    real = {module: module.launch for module in (backend, columns, gated_triton, rotary_triton, merging_triton)}
    for module in real:
        module.launch = lambda kernel, grid, *given, **meta: launches.append((kernel, given, meta))
    try:
        yield launches
    finally:
        for module, launch in real.items():
            module.launch = launch


def decode_step(dtype: torch.dtype, group: int, width: int, policy: str, splits: int) -> None:
    case = Case(heads=8, group=group, widths=(width, width), dtype=dtype, capacities=(409,), policy=policy)
    state = state_of(case)
    state.backend = backend.TritonKernels(state, 132, interpreted=False, splits=splits)
    query, key, value = fresh(case, torch.Generator().manual_seed(1))
    state.write(0, key, value)
    state.attend(0, query, 0.088)
    if not state.grows:
        state.backend.update()


def prompt(dtype: torch.dtype, group: int, width: int) -> None:
    q, k = (torch.zeros(1, 256, heads, width, dtype=dtype).transpose(1, 2) for heads in (2 * group, 2))
    lse = columns.log_sum_exp(q, k, 0.1)
    for rows, squares in ((2, False), (2, True), (2 * group, False)):
        out = torch.zeros(1, rows, 256)
        columns.sum_columns(q, k, 0.1, lse, out, torch.zeros_like(out) if squares else None)


def rotary(dtype: torch.dtype, group: int, width: int) -> None:
    q, k = (torch.zeros(4, 1, heads, width, dtype=dtype).transpose(1, 2) for heads in (8 * group, 8))
    rotary_triton.rotated(q, k, *torch.zeros(2, 4, 1, width, dtype=dtype))


def merge(dtype: torch.dtype, group: int, width: int) -> None:
    evicted, kept = (torch.zeros(2, count, width, dtype=dtype) for count in (64, 32))
    merging_triton.nearest_keys(evicted, kept, torch.ones(2, 32, dtype=torch.bool), 1e-6)
    merging_triton.segment_sums(torch.zeros(2, 64, dtype=torch.long), torch.ones(2, 64), 32, [evicted])


def gates(dtype: torch.dtype, group: int, width: int) -> None:
    for gelu in (False, True):
        gated_triton.gated(torch.zeros(4, 1, 28672, dtype=dtype), gelu)


def compile_all(what: str, makes: Callable[[], None], architectures: list[int]) -> None:
    """Compiles the launches that ``makes`` makes, each variant once, and prints their lines."""
    with noted() as launches:
        makes()
    for kernel, given, meta in launches:
        for architecture in architectures:
            name = kernel.fn.__name__
            variant = name, tuple(map(kind_of, given)), tuple(sorted(meta.items())), architecture
            if variant in seen:
                continue
            seen.add(variant)
            built, said = build(kernel, given, meta, architecture)
            registers, spilt = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
            assert registers and spilt, said
            found = re.search(r"wgmma|tcgen05\.mma|mma\.sync", built.asm["ptx"])
            words = [
                name,
                what,
                architecture,
                registers[1],
                spilt[1],
                built.metadata.shared,
                found[0] if found else "-",
            ]
            print(*words, flush=True)


seen: set[Any] = set()
if __name__ == "__main__":
    knobs.nvidia.dump_ptxas_log = True
    architectures = [int(word) for word in sys.argv[1].split(",")]
    steps = STEPS if len(architectures) == 1 else FEW
    for name in sys.argv[2].split(","):
        dtype = getattr(torch, name)
        for group, width in (map(int, word.split("x")) for word in sys.argv[3:]):
            for policy, splits in steps:
                label = f"{name}/{group}x{width}/{policy}/{splits}"
                compile_all(
                    label,
                    lambda p=policy, s=splits, d=dtype, g=group, w=width: decode_step(d, g, w, p, s),
                    architectures,
                )
            compile_all(
                f"{name}/{group}x{width}/prompt", lambda d=dtype, g=group, w=width: prompt(d, g, w), architectures
            )
            for make in (rotary, gates, merge):
                compile_all(
                    f"{name}/{group}x{width}/{make.__name__}",
                    lambda m=make, d=dtype, g=group, w=width: m(d, g, w),
                    architectures,
                )
