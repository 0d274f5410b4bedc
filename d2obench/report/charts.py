"""Draws figures: altair makes a Vega-Lite spec of a figure's data, and vl-convert makes SVG of the spec.

The same spec is drawn interactively by the HTML page. altair and vl-convert take long to import, so this module is
imported only when a figure is drawn.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import msgspec

from d2obench.report.view import Figure

WIDTH, HEIGHT, MAX_NAME = 380, 250, 48
SHAPES = ["circle", "cross", "diamond", "triangle-up", "square"]
_ID = re.compile(r'(?<=["#])(clip|gradient_)\d+(?=[")])')
POLICIES = {
    "full": "#7f7f7f",
    "exp(−variance)": "#7f7f7f",
    "streaming": "#E69F00",
    "local": "#F0E442",
    "h2o": "#56B4E9",
    "d2o": "#D55E00",
    "d2o(preset=mass)": "#7B3294",
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


def spec(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite spec of a figure with its data and without a theme; equal figures give equal specs."""
    with alt.data_transformers.enable("default", max_rows=None, consolidate_datasets=False):
        found: dict[str, Any] = _CHARTS[figure.kind](_plain(figure)).to_dict(validate=True)
    found["config"] = {}
    return found


def svg(figure: Figure) -> str:
    """The figure as SVG on a white ground; its title and explanation are its label for screen readers."""
    import vl_convert

    text: str = vl_convert.vegalite_to_svg(spec(figure), config=LIGHT | {"aria": False})
    ids: dict[str, str] = {}  # Vega counts its ids through the life of a process
    text = _ID.sub(lambda found: ids.setdefault(found[0], f"{found[1]}{len(ids)}"), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_xml(f"{figure.title}. {figure.about}")}" ', 1)


def as_json(figure: Figure) -> str:
    """The spec as JSON with sorted keys, escaped so that it can be the content of a script element."""
    text = json.dumps(spec(figure), sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def colour(policy: str) -> str:
    """The colour of a policy. A policy with parameters, or an unknown one, gets a colour of SPARE by its name."""
    return POLICIES.get(policy) or SPARE[zlib.crc32(policy.encode()) % len(SPARE)]


def palette(policies: Sequence[str]) -> list[str]:
    """The colours of the policies of one figure. Where two would have the same one of SPARE, the later policy gets the
    next free one."""
    found: list[str] = []
    for policy in policies:
        shade = colour(policy)
        if shade in SPARE:
            first = SPARE.index(shade)
            turns = [*SPARE[first:], *SPARE[:first]]
            shade = next((one for one in turns if one not in found), shade)
        found.append(shade)
    return found


def theme(ink: str, soft: str, line: str, ground: str) -> dict[str, Any]:
    """The configuration of a chart for a background colour ``ground``.

    Args:
        ink: the colour of words.
        soft: of axes.
        line: of grids.
        ground: of the background.
    """
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


def _tradeoff(figure: Figure) -> Any:
    base, pick, fade = _base(figure)
    log = alt.Scale(type="log", nice=False, padding=24)
    x = alt.X("kv:Q", title=figure.options["x"], scale=log, axis=alt.Axis(tickCount=5, labelOverlap="greedy"))
    y = alt.Y("quality:Q", title=figure.options["y"], scale=alt.Scale(zero=False))
    shown = base.encode(x=x, color=_policies(figure), opacity=fade)
    tips = ["label:N", "kv:Q", "quality:Q", "lo:Q", "hi:Q"]
    steps = base.transform_filter("datum.front").encode(x=x, y=y)
    front = steps.mark_line(style="guide", strokeDash=[3, 3], interpolate="step-after")
    whiskers = shown.mark_rule().encode(y=alt.Y("lo:Q", title=figure.options["y"]), y2="hi:Q")
    dots = shown.mark_point(filled=True, size=90).encode(y=y, tooltip=tips)
    names = shown.mark_text(dx=7, dy=-7, align="left", fontSize=10).encode(y=y, text="budget:N")
    return _panels(figure, alt.layer(*_if(figure, "front", front), whiskers, dots.add_params(pick), names))


def _budgets(figure: Figure) -> Any:
    base, pick, fade = _base(figure)
    log = alt.Scale(type="log", nice=False, padding=12)
    upright = log if figure.options["log"] else alt.Scale(zero=False)
    ticks = alt.Axis(values=sorted({round(size) for size in _column(figure, "budget")}), labelOverlap="greedy")
    x = alt.X("budget:Q", title=figure.options["x"], scale=log, axis=ticks)
    y = alt.Y("quality:Q", title=figure.options["y"], scale=upright)
    names = _order(figure, "policy")
    colours = palette(names)
    shapes = [SHAPES[colours[:i].count(shade) % len(SHAPES)] for i, shade in enumerate(colours)]
    shape = alt.Shape("policy:N", title="policy", scale=alt.Scale(domain=names, range=shapes))
    shown = base.encode(x=x, color=_policies(figure).legend(alt.Legend(labelLimit=320)), opacity=fade)
    whiskers = shown.mark_rule().encode(y=alt.Y("lo:Q", title=figure.options["y"], scale=upright), y2="hi:Q")
    tips = ["label:N", "quality:Q", "lo:Q", "hi:Q"]
    dots = shown.mark_point(filled=True, size=50).encode(y=y, shape=shape, tooltip=tips)
    lines = shown.mark_line().encode(y=y)
    return _panels(figure, alt.layer(lines, whiskers, dots.add_params(pick)), height=360)


def _overview(figure: Figure) -> Any:
    """Two panels over the same axis of bytes: quality above, speed below."""
    base, pick, fade = _base(figure)
    x = alt.X("kv:Q", title=figure.options["x"], scale=alt.Scale(type="log", nice=False, padding=24))
    x = x.axis(tickCount=5, labelOverlap="greedy")
    tips = ["label:N", "kv:Q", "quality:Q", "lo:Q", "hi:Q", "speed:Q", "slow:Q", "fast:Q"]
    panels: list[Any] = []
    for value, low, high, title in (
        ("quality", "lo", "hi", figure.options["y"]), ("speed", "slow", "fast", figure.options["speed"])
    ):  # fmt: skip
        if not any(one is not None for one in _column(figure, value)):
            continue
        colours = _policies(figure).legend(orient="top", columns=4, title=None)
        shown = base.transform_filter(f"isValid(datum.{value})").encode(x=x, color=colours, opacity=fade)
        y = alt.Y(f"{value}:Q", title=title, scale=alt.Scale(zero=False))
        whiskers = shown.mark_rule().encode(y=alt.Y(f"{low}:Q", title=title), y2=f"{high}:Q")
        dots = shown.mark_point(filled=True, size=70).encode(y=y, tooltip=tips)
        dots = dots if panels else dots.add_params(pick)
        names = shown.mark_text(dx=6, dy=-7, align="left", fontSize=10).encode(y=y, text="budget:N")
        layer = alt.layer(*_if(figure, low, whiskers), dots, names)
        panels.append(layer.properties(width=300, height=135))
    return alt.vconcat(*panels, data=_data(figure)) if len(panels) > 1 else panels[0].properties(data=_data(figure))


def _speedup(figure: Figure) -> Any:
    base, _, _ = _base(figure)
    ends = [value for row in figure.rows for value in row[3:] if isinstance(value, float)]
    scale = alt.Scale(domain=[0, round(1.08 * max([1.0, *ends]), 3)])
    rows = base.encode(y=alt.Y("label:N", title=None, sort=_order(figure, "label")))
    x = alt.X("speedup:Q", title=figure.options["x"], scale=scale)
    tips = ["label:N", "speedup:Q", "lo:Q", "hi:Q", "bound:Q"]
    bars = rows.mark_bar(height=13).encode(x=x, color=_policies(figure), tooltip=tips)
    whiskers = rows.mark_rule(style="whisker").encode(x="lo:Q", x2="hi:Q")
    bounds = rows.mark_tick(style="bound", thickness=2, size=17).encode(x="bound:Q")
    one = base.mark_rule(style="guide", strokeDash=[4, 3]).encode(x=alt.datum(1))
    return _panels(figure, alt.layer(bars, whiskers, *_if(figure, "bound", bounds), one), height={"step": 20})


def _throughput(figure: Figure) -> Any:
    base, pick, fade = _base(figure)
    scale, ticks = alt.Scale(type="log", base=2, nice=False), alt.Axis(values=sorted(set(_column(figure, "batch"))))
    x = alt.X("batch:Q", title="batch (sequences decoded together)", scale=scale, axis=ticks)
    shown = base.encode(x=x, color=_policies(figure), detail="label:N")
    y = alt.Y("tok_s:Q", title=figure.options["y"], scale=alt.Scale(zero=True))
    tips = ["label:N", "batch:Q", "tok_s:Q", "lo:Q", "hi:Q"]
    band = shown.mark_area(opacity=0.18).encode(y=alt.Y("lo:Q", title=figure.options["y"]), y2="hi:Q")
    line = shown.mark_line(point=True).encode(y=y, strokeDash=_dashes(figure), opacity=fade, tooltip=tips)
    walls = shown.transform_filter("datum.wall").mark_point(shape="cross", angle=45, size=120, filled=True)
    crosses = walls.encode(y=alt.value(HEIGHT - 8), tooltip=["label:N", "batch:Q"])
    return _panels(figure, alt.layer(band, line.add_params(pick), *_if(figure, "wall", crosses)))


def _position(figure: Figure) -> Any:
    """A line for each policy over positions of the generation; the last column is its height."""
    base, pick, fade = _base(figure)
    height = f"{figure.columns[-1]}:Q"
    y = alt.Y(height, title=figure.options["y"], scale=alt.Scale(zero=False))
    shown = base.encode(x=alt.X("position:Q", title=figure.options["x"]), y=y, color=_policies(figure))
    tips = ["label:N", "position:Q", height]
    lines = shown.mark_line(clip=True).encode(strokeDash=_dashes(figure), detail="label:N", opacity=fade, tooltip=tips)
    return lines.add_params(pick).properties(data=_data(figure), width=480, height=280)


def _timeline(figure: Figure) -> Any:
    spans = [dict(zip(("label", "phase", "start", "end"), span, strict=True)) for span in figure.options["phases"]]
    known = [name for name in PHASES if any(span["phase"] == name for span in spans)]
    shade = alt.Color("phase:N", title="phase", scale=alt.Scale(domain=known, range=[PHASES[name] for name in known]))
    x = alt.X("start:Q", title=figure.options["x"])
    y = alt.Y("memory:Q", title=figure.options["y"], scale=alt.Scale(zero=False))
    rows = []
    for label in _order(figure, "label"):
        points = [row for row in figure.records() if row["label"] == label]
        phases = alt.Chart(alt.Data(values=[span for span in spans if span["label"] == label]))
        line = alt.Chart(alt.Data(values=points)).mark_line(color=colour(str(points[0]["policy"])), strokeWidth=2)
        back = phases.mark_rect(opacity=0.45).encode(x=x, x2="end:Q", color=shade)
        front = line.encode(x="t:Q", y=y, tooltip=["t:Q", "memory:Q"])
        rows.append(alt.layer(back, front).properties(width=WIDTH - 60, height=120, title=label))
    return alt.concat(*rows, columns=3).resolve_scale(y="shared")


def _peak(figure: Figure) -> Any:
    base, _, _ = _base(figure)
    scale = alt.Scale(domain=list(PARTS), range=list(PARTS.values()))
    x = alt.X("memory:Q", title=figure.options["x"], stack="zero")
    y = alt.Y("label:N", title=None, sort=_order(figure, "label"))
    parts = alt.Color("part:N", title=None, scale=scale, legend=alt.Legend(orient="top"))
    bars = base.mark_bar(height=14).encode(
        x=x, y=y, color=parts, order="order:Q", tooltip=["label:N", "part:N", "memory:Q"]
    )
    return bars.properties(data=_data(figure), width=470, height={"step": 22})


def _layers(figure: Figure) -> Any:
    base, _, _ = _base(figure)
    x = alt.X("layer:O", title=figure.options["x"], axis=alt.Axis(labelOverlap=True, labelAngle=0))
    y = alt.Y("kept:Q", title=figure.options["y"])
    bars = base.mark_bar().encode(x=x, y=y, color=_policies(figure), tooltip=["label:N", "layer:O", "kept:Q"])
    return _panels(figure, bars, "label", height=110)


def _merges(figure: Figure) -> Any:
    base, _, _ = _base(figure)
    x = alt.X("layer:O", title=figure.options["x"], axis=alt.Axis(labelOverlap=True, labelAngle=0))
    y = alt.Y("entries:Q", title=figure.options["y"], stack="zero")
    scale = alt.Scale(domain=list(FATES), range=list(FATES.values()))
    fate = alt.Color("fate:N", title=None, scale=scale, legend=alt.Legend(orient="top"))
    tips = ["label:N", "layer:O", "fate:N", "entries:Q", "percent:Q"]
    return _panels(figure, base.mark_bar().encode(x=x, y=y, color=fate, tooltip=tips), "label", height=110)


def _diagnosis(figure: Figure) -> Any:
    """One panel for each figure, with a scale of its own."""
    base, pick, fade = _base(figure)
    legend = alt.Legend(orient="top", columns=2, labelLimit=320, title=None)
    shown = base.encode(
        x=alt.X("layer:Q", title=figure.options["x"], axis=alt.Axis(tickMinStep=1)),
        color=_policies(figure).legend(legend),
        opacity=fade,
        tooltip=["policy:N", "layer:Q", "value:Q"],
    )
    panels: list[Any] = []
    for name in _order(figure, "panel"):
        lines = shown.transform_filter(alt.datum.panel == name).mark_line(point={"size": 16}, strokeWidth=1.5)
        lines = lines.encode(y=alt.Y("value:Q", title=name)).properties(width=300, height=150)
        panels.append(lines if panels else lines.add_params(pick))
    return alt.concat(*panels, columns=2, data=_data(figure))


def _forest(figure: Figure) -> Any:
    base, _, _ = _base(figure)
    middle: float = figure.options["middle"]
    scale = alt.Scale(type="log", nice=False, padding=16) if middle else alt.Scale(zero=False, nice=False, padding=16)
    verdicts = [name for name in VERDICTS if name in _column(figure, "verdict")]
    colours = alt.Scale(domain=verdicts, range=[VERDICTS[name] for name in verdicts])
    shape = alt.Shape("verdict:N", title="verdict", scale=alt.Scale(domain=verdicts, range=SHAPES[: len(verdicts)]))
    y = alt.Y("label:N", title=None, sort=_order(figure, "label"), axis=alt.Axis(labelLimit=420))
    x, rows = alt.X("value:Q", title=figure.options["x"], scale=scale), base.encode(y=y)
    tips = ["label:N", "verdict:N", "value:Q", "lo:Q", "hi:Q", "least:Q", "most:Q"]
    color = alt.Color("verdict:N", title="verdict", scale=colours)
    band = rows.mark_bar(height=16, opacity=0.3, color="#999999").encode(x=alt.X("least:Q", scale=scale), x2="most:Q")
    whiskers = rows.mark_rule(strokeWidth=2).encode(x="lo:Q", x2="hi:Q", color=color)
    points = rows.mark_point(filled=True, size=70, opacity=1).encode(x=x, color=color, shape=shape, tooltip=tips)
    same = base.mark_rule(style="guide", strokeDash=[4, 3]).encode(x=alt.datum(middle))
    layers = alt.layer(band, *_if(figure, "lo", whiskers), points, same)
    return layers.properties(data=_data(figure), width=460, height={"step": 22})


def _history(figure: Figure) -> Any:
    base, _, _ = _base(figure)
    names = _order(figure, "series")
    hues = alt.Scale(domain=names, range=[SPARE[i % len(SPARE)] for i in range(len(names))])
    legend = alt.Legend(orient="bottom", columns=1, labelLimit=WIDTH + 200)
    y = alt.Y("value:Q", title=figure.options["y"], scale=alt.Scale(zero=False))
    x = alt.X("number:Q", title=figure.options["x"], axis=alt.Axis(tickMinStep=1, format="d"))
    rows = base.encode(x=x, color=alt.Color("series:N", title=None, scale=hues, legend=legend))
    tips = ["commit:N", "when:N", "value:Q", "lo:Q", "hi:Q"]
    whiskers = rows.mark_rule().encode(y=alt.Y("lo:Q", title=figure.options["y"]), y2="hi:Q")
    line = rows.mark_line(point=alt.OverlayMarkDef(size=40)).encode(y=y, tooltip=tips)
    changes = rows.transform_filter("datum.begins").mark_rule(strokeDash=[4, 3], strokeWidth=1.5)
    layers = alt.layer(*_if(figure, "lo", whiskers), line, *_if(figure, "begins", changes))
    return layers.properties(data=_data(figure), width=WIDTH + 160, height=160)


def _heatmap(figure: Figure) -> Any:
    base, _, _ = _base(figure)
    low, high, share = figure.options["low"], figure.options["high"], figure.options["low"] == 0
    ends = alt.Scale(domain=[low, 0, high], range=["#b35806", "#f7f7f7", "#542788"])
    scale = alt.Scale(domain=[low, high], scheme="viridis") if share else ends
    dark = "datum.found < 55" if share else "abs(datum.found) > 55"
    x, y = alt.X("context:O", title="context, tokens"), alt.Y("depth:O", title="depth of the needle")
    found = alt.Color("found:Q", title=figure.options["title"], scale=scale)
    boxes = base.mark_rect().encode(x=x, y=y, color=found, tooltip=["label:N", "context:Q", "depth:Q", "text:N"])
    ink = alt.condition(dark, alt.value("white"), alt.value("black"))
    words = base.mark_text(fontSize=9).encode(x=x, y=y, text="text:N", color=ink)
    return _panels(figure, alt.layer(boxes, words), "label", columns=4, width={"step": 34}, height={"step": 20})


def _if(figure: Figure, column: str, layer: Any) -> list[Any]:
    """A list of the layer, empty if the column has no data, because Vega warns of a layer without data."""
    return [layer] if any(_column(figure, column)) else []


def _base(figure: Figure) -> tuple[Any, Any, Any]:
    """A chart, the selection of a policy in the legend, and the opacity that fades the policies not selected."""
    pick = alt.selection_point(name="pick", fields=["policy"], bind="legend")
    return alt.Chart(), pick, alt.condition(pick, alt.value(1), alt.value(0.12))


def _data(figure: Figure) -> Any:
    return alt.Data(values=figure.records())


def _policies(figure: Figure) -> Any:
    """The colour of each policy, in the order of the rows."""
    names = _order(figure, "policy")
    return alt.Color("policy:N", title="policy", scale=alt.Scale(domain=names, range=palette(names)))


def _dashes(figure: Figure) -> Any:
    """A dash pattern for each budget, so that lines of one colour can be distinguished."""
    names = _order(figure, "budget")
    patterns = [DASHES[i % len(DASHES)] for i in range(len(names))]
    return alt.StrokeDash("budget:N", title="budget", scale=alt.Scale(domain=names, range=patterns))


def _order(figure: Figure, column: str) -> list[str]:
    """The values of a column in the order of the rows."""
    return list(dict.fromkeys(map(str, _column(figure, column))))


def _column(figure: Figure, column: str) -> list[Any]:
    place = figure.columns.index(column)
    return [row[place] for row in figure.rows]


def _panels(figure: Figure, chart: Any, column: str = "setting", columns: int = 3, **size: Any) -> Any:
    """One panel for each value of a column; a single one needs no facet."""
    names = _order(figure, column)
    chart = chart.properties(data=_data(figure), **({"width": WIDTH, "height": HEIGHT} | size))
    if len(names) < 2:
        return chart
    facet = alt.Facet(f"{column}:N", title=None, sort=names)
    return chart.facet(facet, columns=columns).resolve_scale(x="shared", y="shared")


def _plain(figure: Figure) -> Figure:
    """The figure with names that are short enough for a legend and have only characters that Vega accepts."""
    options = dict(figure.options)
    most = options.get("longest", MAX_NAME)
    rows = tuple(tuple(_name(value, most) for value in row) for row in figure.rows)
    if "phases" in options:
        options["phases"] = [[_name(value) for value in span] for span in options["phases"]]
    return msgspec.structs.replace(figure, rows=rows, options=options)


def _name(value: Any, most: int = MAX_NAME) -> Any:
    if not isinstance(value, str):
        return value
    text = "".join(char if char.isprintable() else "�" for char in value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _xml(text: str) -> str:
    """Text escaped for an XML attribute."""
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(char, entity)
    return "".join(char if char.isprintable() else " " for char in text)


_CHARTS: dict[str, Callable[[Figure], Any]] = {
    "overview": _overview,
    "tradeoff": _tradeoff,
    "budgets": _budgets,
    "speedup": _speedup,
    "throughput": _throughput,
    "position": _position,
    "drift": _position,
    "timeline": _timeline,
    "peak": _peak,
    "layers": _layers,
    "merges": _merges,
    "diagnosis": _diagnosis,
    "heatmap": _heatmap,
    "forest": _forest,
    "history": _history,
}
