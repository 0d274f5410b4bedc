"""A part of a suite: every n-th interleaved group, so that several machines can each run one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from d2obench.errors import UsageError
from d2obench.run.check import Checked
from d2obench.run.plan import group


def parse_shard(text: str) -> tuple[int, int]:
    """``2/8`` → (2, 8).

    Raises:
        UsageError: it is not of that form, or the first number is not between 1 and the second.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"can't read the shard '{text}'", remedy="write it as 2/8: the second of eight")
    return number, count


def shard(checked: Checked, number: int, count: int) -> Checked:
    """Part ``number`` of ``count``; groups stay whole.

    Raises:
        UsageError: there are fewer groups than that.
    """
    groups = group(checked.cells)[number - 1 :: count]
    if not groups:
        whole = len(group(checked.cells))
        raise UsageError(f"shard {number}/{count} is empty", why=f"the suite has {whole} groups of cells")
    return replace(checked, cells=tuple(cell for one in groups for cell in one))


def part(checked: Checked, planned: Collection[str]) -> Checked:
    """The cells that a run has planned, where it is a shard: the same suite names more."""
    cells = tuple(cell for cell in checked.cells if cell.id in planned)
    return replace(checked, cells=cells) if cells else checked
