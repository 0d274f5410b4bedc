"""Colours: the same for a policy in every figure, apart for colour-blind readers (after Okabe and Ito, and Tol)."""

from __future__ import annotations

import zlib
from typing import Any

POLICIES = {
    "full": "#7f7f7f",
    "streaming": "#E69F00",
    "local": "#F0E442",
    "h2o": "#56B4E9",
    "d2o": "#D55E00",
    "snapkv": "#009E73",
    "pyramidkv": "#0072B2",
    "roco": "#CC79A7",
    "cam": "#B09C85",
    "tova": "#8DA0CB",
    "random": "#BDBDBD",
    "quant": "#66A61E",
    "hf-dynamic": "#555555",
    "hf-static": "#A0A0A0",
}
SPARE = ("#332288", "#117733", "#882255", "#44AA99", "#999933", "#AA4499", "#88CCEE", "#661100")
PHASES = {"prefill": "#9ecae1", "compress": "#fdae6b", "decode": "#c7e9c0"}
PARTS = {"weights": "#999999", "KV": "#0072B2", "workspace and the rest": "#DDCC77"}
FATES = {"merged": "#0072B2", "lost": "#E69F00"}
VERDICTS = {
    "REGRESSED": "#D55E00",
    "INCOMPARABLE": "#CC79A7",
    "INCONCLUSIVE": "#E69F00",
    "IMPROVED": "#009E73",
    "OK": "#7f7f7f",
}
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3])


def colour(policy: str) -> str:
    """A plain policy's own colour; one with parameters, or an unknown one, has one of SPARE that its name decides."""
    return POLICIES.get(policy) or SPARE[zlib.crc32(policy.encode()) % len(SPARE)]


def theme(ink: str, soft: str, line: str, ground: str) -> dict[str, Any]:
    """The chart's config for one ground: ``ink`` for words, ``soft`` for axes, ``line`` for grids."""
    words = {"labelColor": ink, "titleColor": ink}
    axis = {"gridColor": line, "domainColor": soft, "tickColor": soft, "titleFontWeight": "normal"}
    return {
        "background": ground,
        "font": "sans-serif",
        "view": {"stroke": line},
        "axis": words | axis,
        "legend": words,
        "header": words,
        "title": {"color": ink, "fontSize": 11},
        "style": {"whisker": {"color": ink}, "bound": {"color": ink}, "guide": {"color": soft}},
    }


LIGHT = theme("#222222", "#888888", "#e4e4e4", "white")
DARK = theme("#dddddd", "#888888", "#3a3f44", "transparent")
