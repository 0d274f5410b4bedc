"""Verdicts as JSON: every row with all its fields, sorted keys, two spaces."""

from __future__ import annotations

import json

import msgspec

from d2obench.gate.verdict import Verdicts
from d2obench.record import finite

SCHEMA = 1


def to_json(verdicts: Verdicts) -> str:
    """One document: ``schema``, ``verdict``, ``counts``, ``exit_code`` and the fields of :class:`Verdicts`."""
    document = {
        "schema": SCHEMA,
        "verdict": verdicts.worst.value,
        "counts": {verdict.value: count for verdict, count in verdicts.counts.items()},
        "exit_code": verdicts.exit_code(),
        **msgspec.to_builtins(verdicts),
    }
    return json.dumps(finite(document), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
