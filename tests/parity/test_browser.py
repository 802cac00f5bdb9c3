"""The HTML report in a real browser: drawn, and used with the mouse and the keyboard.

Headless Chromium is driven through its DevTools pipe: no driver, no port, no network. Source of
the protocol: chromedevtools.github.io/devtools-protocol; `--remote-debugging-pipe` reads
NUL-terminated JSON from file descriptor 3 and writes it to 4.
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smoothl1_deploy.parity._drift import Drift
from smoothl1_deploy.parity._report import Report
from smoothl1_deploy.parity.views import _html as html
from smoothl1_deploy.parity.views._html import anchors

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
_PATIENCE = 60.0  # seconds for one answer, on a machine that is busy


def find_chromium() -> str | None:
    """The browser's path, or None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Browser:
    """A browser process with one page at a time; use as a context manager."""

    def __init__(self, executable: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # Out of the way of 3 and 4, which the child's ends must become.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (to_browser, from_browser)]
        os.close(to_browser)
        os.close(from_browser)

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [executable, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in ends:
            os.close(fd)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(20)
        except Exception:  # whatever it died of, it must not outlive the test
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._in)
            os.close(self._out)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError(f"the browser said nothing for {_PATIENCE} s")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has gone")
            self._buffer += chunk
        first, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A page showing a local file."""
        return Page(self, path.as_uri(), width, height, dark)


class Page:
    """One tab."""

    def __init__(
        self, browser: Browser, url: str, width: int, height: int, dark: bool = False
    ) -> None:
        self._browser, self._url = browser, url
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._target = target
        self._call("Page.enable")
        self._call("Runtime.enable")
        self._call("Network.enable")
        self._call("Log.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        browser.events.clear()
        self._call("Page.navigate", url=url)
        deadline = time.monotonic() + _PATIENCE
        while self.run("document.readyState") != "complete" or self.run("location.href") != url:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} did not load")
            time.sleep(0.05)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str, value: Any) -> Any:
        """The expression's value, once it is `value`, or in the end whatever it is."""
        deadline = time.monotonic() + _PATIENCE
        while (found := self.run(script)) != value and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def click(self, selector: str) -> None:
        """A real click of the mouse in the middle of an element."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call(
                "Input.dispatchMouseEvent",
                type=kind, x=box[0], y=box[1], button="left", clickCount=1,
            )  # fmt: skip

    def press(self, key: str) -> None:
        """A real key, such as Enter, Escape or ArrowRight, into the focused element."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", **fields, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def requests(self) -> list[str]:
        """The addresses that the page asked for, its own left out."""
        self.run("0")
        urls = [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if url != self._url]

    def complaints(self) -> list[str]:
        """What the browser logged as an error: exceptions, blocked scripts or styles."""
        self.run("0")
        found = []
        for event in self._browser.events:
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            if event.get("method") == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error":
                    found.append(entry["text"])
        return found

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """A PNG of the whole page, or of the window."""
        options: dict[str, Any] = {"format": "png"}
        if whole:
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            options |= {"captureBeyondViewport": True}
            options["clip"] = {**size, "x": 0, "y": 0, "scale": 1}
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", **options)["data"]))
        return path

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)


CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def red_file(red: Report, drift: Drift, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "red.html"
    path.write_text(html.render(dataclasses.replace(red, drift=drift)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def green_file(green: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with maps of the extensions and the glossary, all of it unfolded."""
    path = tmp_path_factory.mktemp("report") / "green.html"
    path.write_text(html.render(green).replace("<details", "<details open"), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Browser, red_file: Path) -> Iterator[Page]:
    opened = browser.open(red_file)
    yield opened
    opened.close()


#: Ids of the panels that are on the screen.
VISIBLE = (
    "[...document.querySelectorAll('.panel')].filter(p => p.checkVisibility() &&"
    " p.getBoundingClientRect().width > 0).map(p => p.id)"
)


def test_the_map_has_its_cells_and_they_are_coloured(page: Page, red: Report) -> None:
    drawn = page.run(
        "[...document.querySelectorAll('.small a.place')].map(a => {"
        " const r = a.getBoundingClientRect();"
        " return [a.hash.slice(1), r.width, r.height, getComputedStyle(a).backgroundColor] })"
    )
    assert sorted(d[0] for d in drawn) == sorted(anchors(red.cells).values())
    assert all(width >= 30 and height >= 30 for _, width, height, _ in drawn)
    colours = {name: colour for name, _, _, colour in drawn}
    planted = colours["float32-function-ort-cpu-none-beta-2"]
    assert planted == "rgb(179, 38, 30)"
    assert colours["float32-function-ort-cpu-none-beta-0"] not in (planted, "rgba(0, 0, 0, 0)")


def test_a_click_opens_the_panel_and_escape_closes_it(page: Page) -> None:
    name = "float32-function-ort-cpu-mean-beta-1"
    assert page.wait(VISIBLE, []) == []
    page.click(f".small a[href='#{name}']")
    assert page.wait(VISIBLE, [name]) == [name]
    text = page.run("document.querySelector('.panel:target').innerText")
    assert "ULP >" in text and "Worst case" in text
    assert "smoothl1-deploy parity --beta 1.0 --reduction mean --dtype float32" in text
    assert page.wait("document.activeElement.className", "panel") == "panel"
    scrolled = page.run("scrollY")
    page.press("Escape")
    assert page.wait(VISIBLE, []) == []
    assert page.wait("document.activeElement.hash", f"#{name}") == f"#{name}"
    assert page.run("scrollY") == scrolled > 0  # the reader stays at the map
    page.click(f".small a[href='#{name}']")
    page.click(".panel:target .close")
    assert page.wait(VISIBLE, []) == []


def test_the_keyboard_alone_will_do(page: Page) -> None:
    first = "float32-function-ort-cpu-none-beta-0.5"
    page.run(f"document.querySelector(\".small a[href='#{first}']\").focus()")
    page.press("ArrowRight")
    page.press("ArrowDown")
    page.press("Enter")
    assert page.wait(VISIBLE, ["float32-function-ort-cpu-mean-beta-1"]) == [
        "float32-function-ort-cpu-mean-beta-1"
    ]


def test_an_address_with_a_cell_opens_it(browser: Browser, red_file: Path) -> None:
    page = Page(browser, f"{red_file.as_uri()}#float64-function-ort-cpu-sum-beta-2", 1280, 900)
    assert page.wait(VISIBLE, ["float64-function-ort-cpu-sum-beta-2"]) == [
        "float64-function-ort-cpu-sum-beta-2"
    ]
    assert "no float64 here <script>" in page.run(
        "document.querySelector('.panel:target').innerText"
    )
    page.close()


def test_nothing_is_fetched_and_nothing_is_blocked(page: Page) -> None:
    page.click(".small a.place")
    assert page.requests() == []
    assert page.complaints() == []


def test_hostile_text_runs_nowhere(page: Page, hostile: str) -> None:
    assert page.run("document.querySelectorAll('script').length") == 1
    assert "<script>alert('x')</script>" in page.run("document.body.innerText")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["red_file", "green_file"])
def test_it_fits_and_reads_at_every_width_in_both_themes(
    request: pytest.FixtureRequest,
    browser: Browser,
    tmp_path: Path,
    name: str,
    width: int,
    dark: bool,
) -> None:
    page = browser.open(request.getfixturevalue(name), width, 844, dark)
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run(CLIPPED) == []
    assert page.run(CONTRASTS) == []
    picture = page.screenshot(tmp_path / "report.png").read_bytes()
    assert struct.unpack(">II", picture[16:24])[0] == width
    page.close()


#: Texts that stick out of their cell or tile, where they would be cut off.
CLIPPED = """(() => {
  const cut = [];
  const texts = ".place b, .place small, .map th, .tiles b, h1, .scale li";
  for (const text of document.querySelectorAll(texts)) {
    if (!text.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(text);
    const box = text.matches("th, li") ? text : text.parentElement;
    const inner = range.getBoundingClientRect(), outer = box.getBoundingClientRect();
    if (inner.left < outer.left - 1 || inner.right > outer.right + 1 ||
        inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1) cut.push(text.innerText);
  }
  return cut.slice(0, 10);
})()"""

#: Texts whose contrast to what is behind them is below WCAG's 4.5 (AA), as [text, ratio].
CONTRASTS = """(() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const e of document.querySelectorAll("main *, header *")) {
    if (e.closest("svg") || !e.checkVisibility()) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push([e.innerText.slice(0, 40), e.className, ratio]);
  }
  return poor.slice(0, 10);
})()"""


def test_dump_dom_sees_the_report_without_any_driver(red_file: Path, tmp_path: Path) -> None:
    """As a person's shell would: the plain command line, one process."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *_FLAGS[:-1], f"--user-data-dir={tmp_path}", "--dump-dom", red_file.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count('class="panel"') == done.stdout.count("<article")
    assert done.stdout.count('class="place ') > 20
