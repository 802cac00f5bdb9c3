"""The HTML report in a real browser: drawn, and used with the mouse and the keyboard.

Headless Chromium is driven through its DevTools pipe: no driver, no port, no network. Source of
the protocol: chromedevtools.github.io/devtools-protocol; `--remote-debugging-pipe` reads
NUL-terminated JSON from file descriptor 3 and writes it to 4.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from smoothl1_deploy import LossSpec, export, verify
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


class Page:
    """One tab, showing a local file."""

    def __init__(
        self, browser: Browser, url: str, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        self._browser, self._url = browser, url
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        browser.events.clear()
        self._call("Page.navigate", url=url)
        assert self.wait("[document.readyState, location.href]", ["complete", url])

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str, value: Any) -> bool:
        """Whether the expression comes to be `value`."""
        deadline = time.monotonic() + _PATIENCE
        while self.run(script) != value:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

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

    def complaints(self) -> list[str]:
        """What the page asked for beside itself, exceptions, and scripts or styles blocked."""
        self.run("0")
        found = []
        for event in self._browser.events:
            match event:
                case {"method": "Network.requestWillBeSent", "params": {"request": {"url": url}}}:
                    found += [url] if url != self._url else []
                case {"method": "Runtime.exceptionThrown", "params": params}:
                    found.append(str(params["exceptionDetails"]))
                case {"method": "Log.entryAdded", "params": {"entry": {"level": "error"} as entry}}:
                    found.append(entry["text"])
        return found


_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, _NAMES) if path), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as running:
        yield running


def saved(text: str, folder: Path) -> str:
    """The address of a page."""
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def red_page(red: Report, drift: Drift, tmp_path_factory: pytest.TempPathFactory) -> str:
    text = html.render(dataclasses.replace(red, drift=drift)).replace("<details", "<details open")
    return saved(text, tmp_path_factory.mktemp("red"))


@pytest.fixture(scope="module")
def green_page(green: Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with maps of the extensions and the glossary, all of it unfolded."""
    text = html.render(green).replace("<details", "<details open")
    return saved(text, tmp_path_factory.mktemp("green"))


@pytest.fixture(scope="module")
def verified_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """That of a red verification, with a name as long as ours are."""
    found = verify(export(LossSpec(0.5), shape=("N", 4)), spec=LossSpec())
    return saved(html.render(found), tmp_path_factory.mktemp("verified"))


@pytest.fixture
def page(browser: Browser, red_page: str) -> Iterator[Page]:
    with Page(browser, red_page) as opened:
        yield opened


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
    assert page.wait(VISIBLE, [])
    page.click(f".small a[href='#{name}']")
    assert page.wait(VISIBLE, [name])
    text = page.run("document.querySelector('.panel:target').innerText")
    assert "ULP >" in text and "Worst case" in text
    assert "smoothl1-deploy parity --beta 1.0 --reduction mean --dtype float32" in text
    assert page.wait("document.activeElement.className", "panel")
    scrolled = page.run("scrollY")
    page.press("Escape")
    assert page.wait(VISIBLE, [])
    assert page.wait("document.activeElement.hash", f"#{name}")
    assert page.run("scrollY") == scrolled > 0  # the reader stays at the map
    page.click(f".small a[href='#{name}']")
    page.click(".panel:target .close")
    assert page.wait(VISIBLE, [])
    assert page.complaints() == []


def test_the_keyboard_alone_will_do(page: Page) -> None:
    first = "float32-function-ort-cpu-none-beta-0.5"
    page.run(f"document.querySelector(\".small a[href='#{first}']\").focus()")
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        page.press(key)
    assert page.wait(VISIBLE, ["float32-function-ort-cpu-mean-beta-1"])


def test_an_address_with_a_cell_opens_it_and_hostile_text_stays_text(
    browser: Browser, red_page: str
) -> None:
    name = "float64-function-ort-cpu-sum-beta-2"
    with Page(browser, f"{red_page}#{name}") as page:
        assert page.wait(VISIBLE, [name])
        panel = page.run("document.querySelector('.panel:target').innerText")
        assert "no float64 here <script>alert('x')</script>" in panel
        assert page.run("document.querySelectorAll('script').length") == 1


def test_it_fits_and_reads_at_every_width_in_both_themes(
    browser: Browser, red_page: str, green_page: str, verified_page: str
) -> None:
    pages = {"red": red_page, "green": green_page, "verified": verified_page}
    for (name, url), width, dark in product(pages.items(), (1280, 390), (False, True)):
        with Page(browser, url, width, 844, dark) as page:
            assert page.run("document.documentElement.scrollWidth") == width, (name, dark)
            assert page.run(CLIPPED) == [], (name, width, dark)
            assert page.run(CONTRASTS) == [], (name, width, dark)
            assert page.run(SMALL) == [], (name, width, dark)


#: Links and folds of less than 24 pixels (WCAG 2.2's target size), but those inside a sentence.
SMALL = """[...document.querySelectorAll("nav a, summary, .close")]
  .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 24)
  .map((e) => e.innerText)"""

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
