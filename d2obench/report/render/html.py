"""One HTML file that contains its tables, its figures and the scripts that draw them; nothing is fetched.

The page carries a content security policy that names its scripts by hash and forbids every connection, so that a name
in the records could not run or load anything even if escaping failed. Without scripts, the figures are shown as images.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from d2obench.report.render import Drawn, Files
from d2obench.report.view import Figure, Report, printable

MAX_POINTS = 200
"""Rows of the table behind a figure; its CSV file has all of them."""


def files(report: Report, drawn: Drawn) -> Files:
    """One self-contained page."""
    return [(f"{report.name}.html", html(report, drawn))]


def html(report: Report, drawn: Mapping[str, str]) -> str:
    """The page; ``drawn`` holds the SVG of each figure by figure id."""
    scripts = [_bundle(), _read("page.js")] if drawn else [_read("page.js")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return _template().render(
        report=report,
        figures=[_figure(figure, drawn[figure.id]) for figure in report.figures if figure.id in drawn],
        scripts=[Markup(text) for text in scripts],
        style=Markup(_read("page.css")),
        hashes=Markup(hashes),
        themes=_themes() if drawn else Markup("{}"),
    )


def _figure(figure: Figure, svg: str) -> dict[str, Any]:
    from d2obench.report.charts import as_json

    image = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    rows = [[_number(value) for value in row] for row in figure.rows[:MAX_POINTS]]
    return {
        "figure": figure,
        "image": image,
        "spec": Markup(as_json(figure)),
        "rows": rows,
        "hidden": max(0, len(figure.rows) - MAX_POINTS),
    }


def _number(value: Any) -> str:
    """A value of a figure as its CSV file has it."""
    return "" if value is None else "yes" if value is True else "no" if value is False else str(value)


def _themes() -> Markup:
    from d2obench.report.charts import DARK, LIGHT

    return Markup(json.dumps({"light": LIGHT, "dark": DARK}, sort_keys=True))


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script of about 0.9 MB, which vl-convert makes in a second."""
    import vl_convert

    text: str = vl_convert.javascript_bundle("window.vegaEmbed=vegaEmbed;")
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


@cache
def _read(name: str) -> str:
    return (importlib.resources.files("d2obench.report") / "templates" / name).read_text("utf-8")


@cache
def _template() -> jinja2.Template:
    """The template. Everything is escaped except what this module marks as markup: its scripts, style and specs."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = lambda text: printable(str(text), keep="\n")
    return environment.get_template("page.html")
