"""Folded stacks of a profile, as flame graphs are made of: like stacks added up, what lies above the root cut off.

Stacks that differ in nothing but which layer or object they are about are alike: thirty layers make one tower.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

_WHICH = re.compile(r"_at_0x[0-9a-f]+|(?<=nn\.Module:_)(\w+?)_\d+(?=;|$)")
"""An object's address, and the number that torch gives each module of a class."""


def fold(path: Path, root: str) -> None:
    """Rewrites ``path``: every stack once, and only what lies below ``root``.

    Args:
        path: lines of ``frame;frame;frame microseconds``, as torch.profiler writes them.
        root: the end of a frame's name; stacks without it are left out.
    """
    spent: Counter[str] = Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            stack, _, cost = line.rstrip("\n").rpartition(" ")
            frames = stack.split(";")
            at = next((i for i, frame in enumerate(frames) if frame.endswith(root)), len(frames))
            if cost.isdigit() and frames[at + 1 :]:
                spent[_WHICH.sub(r"\1", ";".join(frames[at + 1 :]))] += int(cost)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{stack} {cost}\n" for stack, cost in sorted(spent.items()))
