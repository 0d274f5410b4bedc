"""Compiles the prompt's kernels for Hopper, to machine code: tensor cores, and the shared memory of smaller GPUs, too.

Run by ``test_attention_triton.py``; needs Triton, but no GPU.
"""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from d2obench.attention import triton_columns as columns

POINTERS = {"query": "*bf16", "keys": "*bf16", "lse": "*fp32", "out": "*fp32", "out_square": "*fp32"}
LIMIT = 99 * 1024
"""Bytes of shared memory that a program may have on the smallest supported GPUs."""

for function in (columns._sum_columns, columns._sum_rows):
    constants = columns._blocks(torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)) | {"G": 4, "SQUARES": False}
    stages = constants.pop("num_stages")
    names = function.arg_names
    kinds = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    kinds["scale"] = "fp32"
    aligned = [name for name in names if name in POINTERS or (kinds[name] == "i32" and name not in columns.SIZES)]
    source = ASTSource(
        fn=function,
        signature=kinds,
        constexprs={name: value for name, value in constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": stages})
    assert len(built.asm["cubin"]) > 0
    assert "wgmma" in built.asm["ptx"], "no tensor cores"
    assert built.metadata.shared <= LIMIT, built.metadata.shared
    print(function.__name__)
