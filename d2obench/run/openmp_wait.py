"""How long PyTorch's CPU threads spin before they sleep.

A decode step on a CPU consists of a few hundred short parallel regions. At the end of each, a thread of the OpenMP
runtime (libgomp) waits for the other threads by spinning, by default for some milliseconds. On an idle machine that is
fastest. If another process needs one of the cores, the spinning thread uses up the time slice in which the thread that
it waits for could have run, and a step takes up to 30 times as long. A thread that spins for some fifty microseconds
and then sleeps costs at most two percent on an idle machine (15 percent if it spins for seven), because that is longer
than most of the serial work between two regions. On a busy machine a step takes about two and a half times as long,
which is near the fair share of the cores.

libgomp counts spins in pause instructions, whose duration differs tenfold between processors, so it is measured first.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import time
from collections.abc import Mapping

SPIN_S = 50e-6
"""Seconds that a waiting thread spins: longer than most of the serial work between two parallel regions of a step,
much shorter than a time slice of the scheduler."""
VARIABLE = "GOMP_SPINCOUNT"
_LOOP = """
declare void @llvm.x86.sse2.pause()
define void @spin(i64 %count) {
entry:
  br label %loop
loop:
  %done = phi i64 [0, %entry], [%next, %loop]
  call void @llvm.x86.sse2.pause()
  %next = add i64 %done, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %end
end:
  ret void
}
"""


def bounded_spin(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variable that makes OpenMP threads of a process spin for :data:`SPIN_S` only, as a
    dictionary.

    Empty if ``environment`` already sets a wait policy, or on processors other than x86, where this has not been
    measured.
    """
    if VARIABLE in environment or "OMP_WAIT_POLICY" in environment or platform.machine() not in ("x86_64", "AMD64"):
        return {}
    return {VARIABLE: str(max(1, round(SPIN_S / pause_s())))}


@functools.cache
def pause_s() -> float:
    """Duration of one pause instruction in seconds: the shortest of a few runs, so that other work on the machine has
    little influence."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(_LOOP)
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    spin = ctypes.CFUNCTYPE(None, ctypes.c_int64)(engine.get_function_address("spin"))
    count, runs = 1000, []
    for _ in range(20):
        start = time.perf_counter()
        spin(count)
        runs.append((time.perf_counter() - start) / count)
    return min(runs)
