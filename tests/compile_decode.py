"""Compiles every kernel of a decode step for Hopper, to machine code, for the dimensions of Llama-3-8B: from the very
launches that a step makes.

Run by ``test_decode_triton.py``; needs Triton, but no GPU. Prints a line a kernel: name, policy, splits, registers of
a thread, bytes it spills, bytes of shared memory of a program.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import torch
import triton
from decode_cases import Case, fresh, state_of
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from d2obench.decode.triton import backend as path
from d2obench.models import rotary_triton as rotary_kernel

LIMIT = 99 * 1024
"""Bytes of shared memory that a program may have on the smallest supported GPUs."""
KINDS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


def kind_of(given: Any) -> str:
    """The type of an argument, as Triton's launcher sees it."""
    if isinstance(given, torch.Tensor):
        return KINDS[given.dtype]
    return "fp32" if isinstance(given, float) else "i32"


def build(kernel: Any, given: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, str]:
    """The compiled kernel of a launch, and what the assembler said."""
    stages = meta.pop("num_stages", 3)
    names, fixed = kernel.arg_names, set(kernel.do_not_specialize)
    kinds = dict(zip(names, map(kind_of, given), strict=False)) | dict.fromkeys(meta, "constexpr")
    known = dict(zip(names, given, strict=False))
    aligned = [
        name
        for name, value in known.items()
        if kinds[name].startswith("*") or (isinstance(value, int) and name not in fixed and value % 16 == 0)
    ]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs=meta,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": stages})
    return built, said.getvalue()


def compile_once(kernel: Any, given: tuple[Any, ...], meta: dict[str, Any], policy: str, splits: int) -> None:
    """Compiles a launch unlike those before, and prints its line."""
    name = kernel.fn.__name__
    if (mark := (policy == "rotary", name, tuple(meta.items()))) in seen:
        return
    seen.add(mark)
    built, said = build(kernel, given, dict(meta))
    registers, spilt = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilt, said
    assert name not in ("attend", "weigh", "mix") or "mma" in built.asm["ptx"], "no tensor cores"
    assert built.metadata.shared <= LIMIT, built.metadata.shared
    assert int(spilt[1]) == 0, said
    print(name, policy, splits, registers[1], spilt[1], built.metadata.shared)


class Noting:
    """A kernel whose launches are noted and not made."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *given, **meta: launches.append((self.kernel, given, meta))


knobs.nvidia.dump_ptxas_log = True
seen = set()
launches: list[Any] = []
path.launch = lambda kernel, grid, *given, **meta: launches.append((kernel, given, meta))
for policy in ("d2o", "d2o(preset=mass)", "h2o", "streaming", "full"):
    for splits in (1, 5):
        case = Case(heads=8, group=4, widths=(128, 128), dtype=torch.bfloat16, capacities=(409,), policy=policy)
        state = state_of(case)
        state.backend = path.TritonKernels(state, 132, interpreted=False, splits=splits)
        launches.clear()
        query, key, value = fresh(case, torch.Generator().manual_seed(1))
        state.write(0, key, value)
        state.attend(0, query, 0.088)
        if not state.grows:
            state.backend.update()
        for launch in list(launches):
            compile_once(*launch, policy, splits)

launches.clear()
rotary_kernel.rotate = Noting(rotary_kernel.rotate)
query, key = (torch.zeros(4, 1, heads, 128, dtype=torch.bfloat16).transpose(1, 2) for heads in (32, 8))
rotary_kernel.rotated(query, key, *torch.zeros(2, 4, 1, 128, dtype=torch.bfloat16))
compile_once(*launches[0], "rotary", 1)
