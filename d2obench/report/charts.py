"""Figures → Vega-Lite specs (altair) → SVG (vl-convert): one spec, static and interactive.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; a policy has the same one in every figure.
altair is imported only here, and only when a figure is drawn.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import altair as alt

from d2obench.report.view import Figure

COLOURS = {
    "full": "#7f7f7f", "streaming": "#E69F00", "local": "#F0E442", "h2o": "#56B4E9", "d2o": "#D55E00", "snapkv": "#009E73",
    "pyramidkv": "#0072B2", "roco": "#CC79A7", "cam": "#B09C85", "tova": "#8DA0CB", "random": "#BDBDBD", "quant": "#66A61E",
    "hf-dynamic": "#555555", "hf-static": "#A0A0A0",
}  # fmt: skip
SPARE = ("#332288", "#117733", "#882255", "#44AA99", "#999933", "#AA4499", "#88CCEE", "#661100")
PHASES = {"prefill": "#9ecae1", "compress": "#fdae6b", "decode": "#c7e9c0"}
PARTS = {"weights": "#999999", "KV": "#D55E00", "workspace and the rest": "#DDCC77"}
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3])
WIDTH, HEIGHT = 380, 250


def theme(ink: str, soft: str, line: str, ground: str) -> dict[str, Any]:
    """The chart's config for one ground: ``ink`` for words, ``soft`` for axes, ``line`` for grids."""
    words = {"labelColor": ink, "titleColor": ink}
    return {
        "background": ground, "font": "sans-serif", "view": {"stroke": line},
        "axis": {**words, "gridColor": line, "domainColor": soft, "tickColor": soft, "titleFontWeight": "normal"},
        "legend": words, "header": words, "title": {"color": ink, "fontSize": 11},
        "style": {"whisker": {"stroke": ink}, "bound": {"color": ink}, "guide": {"stroke": soft}},
    }  # fmt: skip


LIGHT, DARK = theme("#222222", "#888888", "#e4e4e4", "white"), theme("#dddddd", "#888888", "#3a3f44", "transparent")


def spec(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite spec of a figure, data included; the same figure gives the same spec."""
    with alt.data_transformers.enable("default", max_rows=None, consolidate_datasets=False):
        chart = _CHARTS[figure.kind](figure)
        found: dict[str, Any] = chart.properties(usermeta={"about": figure.title}).to_dict(validate=True)
    found["config"] = {}
    return found


def svg(figure: Figure) -> str:
    """The figure as SVG on white, with its title and description for screen readers."""
    import vl_convert

    text: str = vl_convert.vegalite_to_svg(spec(figure), config=LIGHT | {"aria": False})
    title = _xml(f"{figure.title}. {figure.about}")
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def as_json(figure: Figure) -> str:
    """The spec as JSON with sorted keys that can stand inside a script element."""
    text = json.dumps(spec(figure), sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def colour(policy: str) -> str:
    """The colour of a policy: its own, its first part's, or one of SPARE chosen by its name."""
    base = policy.split("(")[0].split("+")[0]
    if policy != base:
        return SPARE[zlib.crc32(policy.encode()) % len(SPARE)]
    return COLOURS.get(base) or SPARE[zlib.crc32(base.encode()) % len(SPARE)]


def _data(figure: Figure) -> Any:
    return alt.Data(values=figure.records())


def _policies(figure: Figure) -> Any:
    """The colour of each policy, in the order of the rows."""
    place = figure.columns.index("policy")
    names = list(dict.fromkeys(str(row[place]) for row in figure.rows))
    return alt.Color("policy:N", title="policy", scale=alt.Scale(domain=names, range=[colour(name) for name in names]))


def _dashes(figure: Figure) -> Any:
    """A dash pattern for each budget of a policy, so that lines of one colour are told apart."""
    policy, label = figure.columns.index("policy"), figure.columns.index("label")
    names = list(dict.fromkeys((str(row[policy]), str(row[label])) for row in figure.rows))
    turn: dict[str, int] = {}
    patterns = []
    for name, _ in names:
        patterns.append(DASHES[turn.get(name, 0) % len(DASHES)])
        turn[name] = turn.get(name, 0) + 1
    return alt.StrokeDash("label:N", title="cell", scale=alt.Scale(domain=[text for _, text in names], range=patterns))


def _order(figure: Figure, field: str = "label") -> list[str]:
    return list(dict.fromkeys(str(row[figure.columns.index(field)]) for row in figure.rows))


def _panels(figure: Figure, chart: Any, field: str = "setting", columns: int = 3) -> Any:
    """One panel for each value of ``field``; a single one needs no facet."""
    names = _order(figure, field)
    if len(names) < 2:
        return chart
    return chart.facet(alt.Facet(f"{field}:N", title=None, sort=names), columns=columns).resolve_scale(
        x="shared", y="shared"
    )


def _pick(policy: bool = True) -> Any:
    """A click on the legend leaves one policy standing out."""
    return alt.selection_point(name="pick", fields=["policy" if policy else "label"], bind="legend")


def _tradeoff(figure: Figure) -> Any:
    pick = _pick()
    x = alt.X("kv:Q", title=figure.options["x"], scale=alt.Scale(type="log", nice=False, padding=24))
    y = alt.Y("quality:Q", title=figure.options["y"], scale=alt.Scale(zero=False))
    fade = alt.condition(pick, alt.value(1), alt.value(0.12))
    line = (
        alt.Chart()
        .transform_filter("datum.front")
        .mark_line(style="guide", strokeDash=[3, 3], interpolate="step-after")
    )
    bars = (
        alt.Chart()
        .mark_rule()
        .encode(x=x, y=alt.Y("lo:Q", title=figure.options["y"]), y2="hi:Q", color=_policies(figure), opacity=fade)
    )
    dots = alt.Chart().mark_point(filled=True, size=90).encode(
        x=x, y=y, color=_policies(figure), opacity=fade, tooltip=["label:N", "kv:Q", "quality:Q", "lo:Q", "hi:Q"]
    )  # fmt: skip
    names = (
        alt.Chart()
        .mark_text(dx=8, dy=-8, align="left", fontSize=10)
        .encode(x=x, y=y, text="label:N", color=_policies(figure), opacity=fade)
    )
    layers = alt.layer(line.encode(x=x, y=y), bars, dots.add_params(pick), names, data=_data(figure)).properties(
        width=WIDTH, height=HEIGHT
    )
    return _panels(figure, layers)


def _speedup(figure: Figure) -> Any:
    y = alt.Y("label:N", title=None, sort=_order(figure))
    ends = [value for row in figure.rows for value in row[3:] if isinstance(value, float)]
    x = alt.X("speedup:Q", title=figure.options["x"], scale=alt.Scale(domain=[0, round(1.08 * max([1.0, *ends]), 3)]))
    bars = (
        alt.Chart()
        .mark_bar(height=13)
        .encode(x=x, y=y, color=_policies(figure), tooltip=["label:N", "speedup:Q", "lo:Q", "hi:Q", "bound:Q"])
    )
    rules = alt.Chart().mark_rule(style="whisker").encode(x="lo:Q", x2="hi:Q", y=y)
    ticks = alt.Chart().mark_tick(style="bound", thickness=2, size=17).encode(x="bound:Q", y=y)
    one = alt.Chart().mark_rule(style="guide", strokeDash=[4, 3]).encode(x=alt.datum(1))
    layers = alt.layer(bars, rules, ticks, one, data=_data(figure)).properties(width=WIDTH, height={"step": 20})
    return _panels(figure, layers)


def _throughput(figure: Figure) -> Any:
    pick = _pick()
    fade = alt.condition(pick, alt.value(1), alt.value(0.12))
    x = alt.X("batch:Q", title="batch (sequences decoded together)", scale=alt.Scale(type="log", base=2, nice=False))
    y = alt.Y("tok_s:Q", title=figure.options["y"], scale=alt.Scale(zero=True))
    band = (
        alt.Chart()
        .mark_area(opacity=0.18)
        .encode(x=x, y=alt.Y("lo:Q", title=figure.options["y"]), y2="hi:Q", color=_policies(figure), detail="label:N")
    )
    line = alt.Chart().mark_line(point=True).encode(
        x=x, y=y, color=_policies(figure), strokeDash=_dashes(figure), opacity=fade, tooltip=["label:N", "batch:Q", "tok_s:Q", "lo:Q", "hi:Q"]
    )  # fmt: skip
    wall = alt.Chart().transform_filter("datum.wall").mark_point(shape="cross", angle=45, size=120, filled=True).encode(
        x=x, y=alt.value(HEIGHT - 8), color=_policies(figure), tooltip=["label:N", "batch:Q"]
    )  # fmt: skip
    layers = alt.layer(band, line.add_params(pick), wall, data=_data(figure)).properties(width=WIDTH, height=HEIGHT)
    return _panels(figure, layers)


def _position(figure: Figure) -> Any:
    pick = _pick()
    fade = alt.condition(pick, alt.value(1), alt.value(0.12))
    return alt.Chart(_data(figure)).mark_line(clip=True).encode(
        x=alt.X("position:Q", title=figure.options["x"]), y=alt.Y("tpot:Q", title=figure.options["y"], scale=alt.Scale(zero=False)),
        color=_policies(figure), strokeDash=_dashes(figure), opacity=fade, tooltip=["label:N", "position:Q", "tpot:Q"],
    ).add_params(pick).properties(width=560, height=280)  # fmt: skip


def _timeline(figure: Figure) -> Any:
    spans = [dict(zip(("label", "phase", "start", "end"), span, strict=True)) for span in figure.options["phases"]]
    known = [name for name in PHASES if any(span["phase"] == name for span in spans)]
    shade = alt.Color("phase:N", title="phase", scale=alt.Scale(domain=known, range=[PHASES[name] for name in known]))
    rows = []
    for label in _order(figure):
        here = alt.Data(values=[span for span in spans if span["label"] == label])
        line = alt.Data(values=[row for row in figure.records() if row["label"] == label])
        back = (
            alt.Chart(here)
            .mark_rect(opacity=0.45)
            .encode(x=alt.X("start:Q", title=figure.options["x"]), x2="end:Q", color=shade)
        )
        front = alt.Chart(line).mark_line(color="#D55E00", strokeWidth=1.5).encode(
            x="t:Q", y=alt.Y("memory:Q", title=figure.options["y"], scale=alt.Scale(zero=False)), tooltip=["t:Q", "memory:Q"]
        )  # fmt: skip
        rows.append(alt.layer(back, front).properties(width=WIDTH - 60, height=120, title=label))
    return alt.concat(*rows, columns=3).resolve_scale(y="shared")


def _peak(figure: Figure) -> Any:
    parts = alt.Color(
        "part:N",
        title=None,
        scale=alt.Scale(domain=list(PARTS), range=list(PARTS.values())),
        legend=alt.Legend(orient="top"),
    )
    return alt.Chart(_data(figure)).mark_bar(height=14).encode(
        x=alt.X("memory:Q", title=figure.options["x"], stack="zero"), y=alt.Y("label:N", title=None, sort=_order(figure)),
        color=parts, order="order:Q", tooltip=["label:N", "part:N", "memory:Q"],
    ).properties(width=560, height={"step": 22})  # fmt: skip


def _layers(figure: Figure) -> Any:
    shown = alt.Chart(_data(figure)).mark_bar().encode(
        x=alt.X("layer:O", title=figure.options["x"], axis=alt.Axis(labelOverlap=True)), y=alt.Y("kept:Q", title=figure.options["y"]),
        color=_policies(figure), tooltip=["label:N", "layer:O", "kept:Q"],
    ).properties(width=WIDTH - 40, height=110)  # fmt: skip
    return _panels(figure, shown, "label")


def _heatmap(figure: Figure) -> Any:
    low, high = figure.options["low"], figure.options["high"]
    scheme = (
        alt.Scale(domain=[low, high], scheme="viridis")
        if low == 0
        else alt.Scale(domain=[low, 0, high], range=["#b35806", "#f7f7f7", "#542788"])
    )
    x, y = alt.X("context:O", title="context, tokens"), alt.Y("depth:O", title="depth of the needle")
    boxes = (
        alt.Chart()
        .mark_rect()
        .encode(
            x=x,
            y=y,
            color=alt.Color("found:Q", title=figure.options["title"], scale=scheme),
            tooltip=["label:N", "context:Q", "depth:Q", "text:N"],
        )
    )
    dark = "datum.found < 55" if low == 0 else "abs(datum.found) > 55"
    words = (
        alt.Chart()
        .mark_text(fontSize=9)
        .encode(x=x, y=y, text="text:N", color=alt.condition(dark, alt.value("white"), alt.value("black")))
    )
    shown = alt.layer(boxes, words, data=_data(figure)).properties(width={"step": 34}, height={"step": 20})
    return _panels(figure, shown, "label", columns=4)


def _xml(text: str) -> str:
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(char, entity)
    return "".join(char if char.isprintable() else " " for char in text)


_CHARTS: dict[str, Callable[[Figure], Any]] = {
    "tradeoff": _tradeoff, "speedup": _speedup, "throughput": _throughput, "position": _position, "timeline": _timeline,
    "peak": _peak, "layers": _layers, "heatmap": _heatmap,
}  # fmt: skip
