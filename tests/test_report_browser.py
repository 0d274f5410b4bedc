"""The page in a real browser: every figure drawn, a silent console, nothing fetched, sorting and legend at work.

Chromium is spoken to by its DevTools protocol over two pipes; the test is skipped where no Chromium is installed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_runs as made
from test_gate_forest import found
from waiting import LIMIT_S, wait_for

from d2obench.report import build, write_report
from d2obench.report.render import draw
from d2obench.report.render.html import html
from d2obench.report.verdicts import view

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe --window-size=1400,1000"
)
SAID = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Browser:
    """One headless Chromium with one page; ``events`` are all it has told so far."""

    def __init__(self, profile: Path) -> None:
        there, out = os.pipe()
        back, reply = os.pipe()

        def pipes() -> None:
            os.dup2(there, 10), os.dup2(reply, 11)
            os.dup2(10, 3), os.dup2(11, 4)

        assert CHROMIUM
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=pipes, close_fds=False, **quiet)  # type: ignore[call-overload]
        os.close(there), os.close(reply)
        self._out, self._back, self._buffer = os.fdopen(out, "wb"), os.fdopen(back, "rb", buffering=0), b""
        self.events: list[dict[str, Any]] = []
        self._last, self._session = 0, None
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        wait_for(lambda: self.run(script))

    def close(self) -> None:
        self._out.close()
        self._process.terminate()
        self._process.wait(LIMIT_S)
        self._back.close()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = self._back.read(1 << 16)
            assert more, "Chromium has gone"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = made.usual(tmp_path_factory.mktemp("run") / "quick", shapes=("512+24",), batches=(1, 4))
    write_report(build([place]), place, ("html",))
    return place


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.call("Page.navigate", url=f"file://{folder}/report.html")
    figures = len(build([folder]).figures)
    browser.wait(f"document.querySelectorAll('.chart[data-state=drawn]').length === {figures}")
    yield browser
    browser.close()


def test_every_figure_is_drawn(page: Browser) -> None:
    marks = page.run("[...document.querySelectorAll('.chart svg')].map(e => e.querySelectorAll('path, text').length)")
    assert len(marks) > 5
    assert min(marks) > 10
    labels = page.run("[...document.querySelectorAll('.chart svg')].map(e => e.getAttribute('aria-label'))")
    assert all(labels)


def test_the_first_screen_shows_the_sentences_the_figure_and_the_speed_up(page: Browser) -> None:
    size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    page.run("scrollTo(0, 0)")
    corner = "(e => [e.getBoundingClientRect().right, e.getBoundingClientRect().bottom])(document.querySelector({}))"
    for part in ("'.verdict'", "'#headline tbody tr:nth-child(4) td:last-child'", "'#figure-overview svg'"):
        right, bottom = page.run(corner.format(part))
        assert right <= 1280, part
        assert bottom <= 800, part
    assert page.run("document.querySelector('#headline th:last-child').textContent").startswith("× full")
    scrolled = page.run("(e => [e.scrollWidth, e.clientWidth])(document.querySelector('#headline .scroll'))")
    assert scrolled[0] <= scrolled[1]
    page.call("Emulation.clearDeviceMetricsOverride")


def test_console_is_silent_and_nothing_is_fetched(page: Browser) -> None:
    said = [
        event for event in page.events if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    ]
    logged = [event for event in page.events if event["method"] == "Log.entryAdded"]
    assert not [event["params"] for event in said + logged]
    asked = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [
        url for url in asked if url.endswith("report.html")
    ]
    blocked = "fetch('https://example.org/').then(() => 'open', () => 'closed')"
    assert page.run(blocked) == "closed"


def test_a_click_on_a_header_sorts(page: Browser) -> None:
    table = "document.querySelector('#headline table')"
    heads = page.run(f"[...{table}.tHead.rows[0].cells].map(e => e.textContent)")
    place = next(i for i, head in enumerate(heads) if head.startswith("decode, tok/s"))
    column = f"[...{table}.tBodies[0].rows].map(e => parseFloat(e.cells[{place}].dataset.s))"
    button = f"{table}.tHead.rows[0].cells[{place}].querySelector('button')"
    before = page.run(column)
    page.run(f"{button}.focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    page.call("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13)
    assert page.run(column) == sorted(before) != before
    assert page.run(f"{button}.parentElement.getAttribute('aria-sort')") == "ascending"
    page.run(f"{button}.click()")
    assert page.run(column) == sorted(before, reverse=True)


def test_a_click_on_the_legend_leaves_one_policy_standing_out(page: Browser) -> None:
    page.run("document.querySelector('#figures').open = true")
    faint = "[...document.querySelectorAll('#figure-position .mark-line path')].map(e => getComputedStyle(e).opacity)"
    assert set(page.run(faint)) == {"1"}
    entry = "document.querySelectorAll('#figure-position .role-legend-symbol path')[1]"
    page.run(f"{entry}.scrollIntoView({{block: 'center'}})")
    box = page.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({entry}.getBoundingClientRect())")
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
    page.wait(f"new Set({faint}).size === 2")


@pytest.mark.parametrize(("media", "scheme"), [("screen", "light"), ("screen", "dark"), ("print", "light")])
def test_words_stand_out_from_their_ground(page: Browser, folder: Path, media: str, scheme: str) -> None:
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    page.call("Emulation.setEmulatedMedia", media=media, features=feature)
    query = f"matchMedia('{media}').matches && matchMedia('(prefers-color-scheme: {scheme})').matches"
    page.wait(f"{query} && document.getAnimations().length === 0")
    pairs = page.run(
        "[...document.querySelectorAll('h1, li, td bdi, th, .warning, summary')].map(e => {"
        "let ground = e; while (ground && getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') "
        "ground = ground.parentElement; return [getComputedStyle(e).color, "
        "ground ? getComputedStyle(ground).backgroundColor : 'rgb(255, 255, 255)'] })"
    )
    assert len(pairs) > 100
    assert min(contrast(*pair) for pair in pairs) >= 4.5
    picture = page.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
    (folder / f"{media}-{scheme}.png").write_bytes(base64.b64decode(picture))


def test_prints_with_every_figure(page: Browser, folder: Path) -> None:
    page.call("Emulation.setEmulatedMedia", media="")
    pdf = base64.b64decode(page.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])
    (folder / "report.pdf").write_bytes(pdf)
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") >= 2
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", media="print", features=dark)
    shown = "[...document.querySelectorAll('.chart {}')].map(e => getComputedStyle(e).display === 'none')"
    assert not any(page.run(shown.format("img")))  # the light picture, whatever the screen's scheme
    assert all(page.run(shown.format(".live")))
    wide = page.run("[document.documentElement.scrollWidth, innerWidth]")
    page.call("Emulation.setEmulatedMedia", media="", features=[])
    assert all(page.run(shown.format("img")))
    assert not any(page.run(shown.format(".live")))
    assert wide[0] <= wide[1]


def test_a_gates_page_draws_its_forest_plots(page: Browser, tmp_path: Path) -> None:
    (tmp_path / "verdicts.html").write_text(html(view(found()), draw(view(found()))), "utf-8")
    before = len(page.events)
    page.call("Page.navigate", url=f"file://{tmp_path}/verdicts.html")
    page.wait("document.querySelectorAll('.chart[data-state=drawn]').length === 2")
    marks = page.run("[...document.querySelectorAll('.chart svg')].map(e => e.querySelectorAll('path').length)")
    assert min(marks) > 5
    said = [event for event in page.events[before:] if event["method"] in SAID]
    assert not [event["params"] for event in said]
    picture = page.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
    (tmp_path / "verdicts.png").write_bytes(base64.b64decode(picture))


def contrast(ink: str, ground: str) -> float:
    """WCAG 2 contrast of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
