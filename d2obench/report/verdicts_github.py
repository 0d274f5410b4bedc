"""Verdicts as workflow commands: GitHub shows ten annotations a step, so the nine worst and a summary."""

from __future__ import annotations

import re

from d2obench.gate.verdict import Row, Verdict, Verdicts

MOST = 9
_LEVEL = {Verdict.REGRESSED: "error", Verdict.INCOMPARABLE: "error", Verdict.INCONCLUSIVE: "warning"}


def workflow_commands(verdicts: Verdicts) -> str:
    """``::error title=…::…`` lines, worst first, and a last ``::notice`` that counts all rows."""
    rows = verdicts.of(*_LEVEL)
    lines = [_command(_LEVEL[row.verdict], f"{row.verdict.value} {row.header}", _message(row)) for row in rows[:MOST]]
    more = f"; {len(rows) - MOST} more in the summary" if len(rows) > MOST else ""
    lines.append(_command("notice", f"d2obench gate {verdicts.worst.value}", verdicts.summary + more))
    return "\n".join(lines) + "\n"


def _message(row: Row) -> str:
    figures = f"{row.shown(row.base)} → {row.shown(row.head)}" if row.base is not None or row.head is not None else ""
    return "; ".join(filter(None, (row.cell, figures, row.change, row.reason)))[:1000]


def _command(level: str, title: str, message: str) -> str:
    named = _escape(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={named}::{_escape(message)}"


def _escape(text: str) -> str:
    flat = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    return flat.replace("%", "%25")
