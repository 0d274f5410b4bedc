"""What happens in each layer: the tokens kept after compression, and the entries evicted, merged or lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from d2obench.metric import METRICS, show
from d2obench.report.memory import Point
from d2obench.report.rows import Entry, volume
from d2obench.report.view import Figure

MAX_LINES = 12
FATES = ("merged", "lost")


def layers(found: Sequence[Entry]) -> Iterator[Figure]:
    """Both figures, of each policy and budget at its largest setting, where a layer differs from another at all."""
    shown = _largest(found)
    kept: list[Point] = []
    gone: list[Point] = []
    for label, entry in shown.items():
        details, policy = entry.record.details, entry.key.policy
        merged = entry.values.get("merged")
        share = f"{show('merged', merged.value)} {METRICS['merged'].unit} merged" if merged and merged.value else ""
        for layer, tokens in enumerate(_numbers(details.get("kept_layers"))):
            kept.append((policy, f"{label}, {share}" if share else label, layer, round(tokens, 2)))
        pairs = zip(_numbers(details.get("merged_layers")), _numbers(details.get("evicted_layers")), strict=False)
        for layer, (into, out) in enumerate(pairs):
            for fate, count in zip(FATES, (into, out - into), strict=True):
                gone.append((policy, label, layer, fate, int(count), round(100 * count / out, 2) if out else None))
    if _layered(kept):
        yield Figure(
            "layers", "layers", "Tokens kept in each layer after compression",
            "Mean over sequences and KV heads; a policy that gives layers unequal budgets is not flat.",
            ("policy", "label", "layer", "kept"), tuple(kept), {"x": "layer", "y": "tokens kept", "wide": True},
        )  # fmt: skip
    if _layered(gone):
        yield Figure(
            "merges", "merges", "Entries evicted from each layer: merged into a kept one, or lost",
            "Counted over the sequences and KV heads of a request, at the prompt and while decoding.",
            ("policy", "label", "layer", "fate", "entries", "percent"), tuple(gone),
            {"x": "layer", "y": "entries evicted", "wide": True},
        )  # fmt: skip


def _largest(found: Sequence[Entry]) -> dict[str, Entry]:
    best: dict[str, Entry] = {}
    for entry in found:
        if entry.record.status == "ok" and entry.key.budget and _numbers(entry.record.details.get("kept_layers")):
            label = entry.key.label
            if label not in best or volume(entry.key) > volume(best[label].key):
                best[label] = entry
    return dict(list(best.items())[:MAX_LINES])


def _layered(points: Sequence[Point]) -> bool:
    return len({point[2] for point in points}) > 1


def _numbers(value: Any) -> list[float]:
    """A list of numbers, empty where it is something else."""
    good = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return [float(x) for x in value] if good else []
