"""The server's page in a real browser: Chromium without a window, driven as hands drive it."""

import base64
import io
import os
import shutil
import time
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
from PIL import Image

from runtime import LocalControlPipeline

NAMES = ("chromium", "chromium-browser", "google-chrome")


def require_chromium() -> str:
    """Return Chromium's path; skip the test module, in one line, where it or Playwright is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is missing: pip install playwright"
    )
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        with playwright.sync_playwright() as driver:
            found = driver.chromium.executable_path
    if not os.path.exists(found):
        pytest.skip("Chromium is missing: apt-get install chromium", allow_module_level=True)
    return found


@cache
def embedded() -> LocalControlPipeline:
    return LocalControlPipeline.from_pretrained("embedded")


@contextmanager
def browser():
    """Chromium, started once for a module."""
    from playwright.sync_api import sync_playwright

    path = require_chromium()
    with sync_playwright() as driver:
        made = driver.chromium.launch(
            executable_path=path, args=["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        )
        yield made
        made.close()


class Tab:
    """The page in a tab, and what went wrong in it: errors of its console, and requests to another host."""

    def __init__(self, context, url: str, expected=()):
        self.context, self.url, self.expected = context, url, expected
        self.wrong = []
        context.set_default_timeout(20_000)
        self.page = context.new_page()
        self.page.on("console", lambda message: self._heard(message.type, message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._requested)
        self.page.goto(url)

    def _heard(self, kind, text):
        if kind == "error" and not any(each in text for each in self.expected):
            self.wrong.append(text)

    def _requested(self, request):
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.wrong.append(f"asked {request.url}")

    def ready(self, results: int = 1):
        """Wait until so many results are there and nothing is drawn."""
        self.page.wait_for_selector(f"#results li:nth-child({results})")
        self.quiet()

    def quiet(self):
        self.page.wait_for_selector("#cancel[disabled]")

    def says(self, text: str):
        """Wait until the status says something with this text."""
        self.page.locator("#status, #step", has_text=text).first.wait_for()

    def get(self, expression: str):
        """A value of the page's own object."""
        return self.page.evaluate(f"() => {{ const page = window.localcontrol; return {expression}; }}")

    def until(self, expression: str):
        """Wait until an expression of the page's own object is true."""
        end = time.monotonic() + 20
        while not self.get(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(10)

    def bitmap(self, which: str = "mask", region: int | None = None) -> np.ndarray:
        """A bitmap's pixels: (H, W), or (H, W, 3) of a condition."""
        at = "page.painting.chosen" if region is None else f"page.painting.state.regions[{region}]"
        read = (
            f"(({{width, height, channels, data}}) => ({{shape: [height, width, channels], data: "
            f"btoa(data.reduce((text, byte) => text + String.fromCharCode(byte), ''))}}))({at}.{which})"
        )
        found = self.get(read)
        pixels = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(found["shape"])
        return pixels[..., 0] if which == "mask" else pixels

    def picture(self) -> np.ndarray:
        """The picture of the newest result: (H, W, 3)."""
        read = (
            "page.results.current.picture.arrayBuffer().then((buffer) => "
            "btoa(new Uint8Array(buffer).reduce((text, byte) => text + String.fromCharCode(byte), '')))"
        )
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(self.get(read)))).convert("RGB"))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the picture is in the window."""
        box = self.page.locator("#canvas").bounding_box()
        scale, left, top = self.get("[page.view.scale, page.view.x, page.view.y]")
        return box["x"] + left + x * scale, box["y"] + top + y * scale

    def stroke(self, *points, steps: int = 4):
        """Draw with the mouse from point to point of the picture."""
        mouse = self.page.mouse
        mouse.move(*self.at(*points[0]))
        mouse.down()
        for point in points[1:]:
            mouse.move(*self.at(*point), steps=steps)
        mouse.up()

    def clean(self):
        """Start with one region in which nothing is painted."""
        self.page.click("#add")
        self.get("page.painting.remove(page.painting.state.regions[0])")
        self.tool("Brush")

    def tool(self, name: str):
        self.page.get_by_role("button", name=name, exact=True).click()

    def set(self, id: str, value):
        """Give a field a value, as typing or sliding does."""
        self.page.locator(f"#{id}").evaluate(
            "(field, value) => { field.value = value; field.dispatchEvent(new Event('input', {bubbles: true})); }",
            str(value),
        )

    def unfold(self, name: str):
        self.page.locator("summary", has_text=name).click()

    def drop(self, name: str, data: bytes, kind: str = "image/png", onto: str = "#canvas", count: int = 1):
        """Drop a file, or several of the same."""
        transfer = self.page.evaluate_handle(
            """([name, text, kind, count]) => {
                const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                for (let i = 0; i < count; i++) transfer.items.add(new File([bytes], name, {type: kind}));
                return transfer;
            }""",
            [name, base64.b64encode(data).decode(), kind, count],
        )
        self.page.dispatch_event(onto, "drop", {"dataTransfer": transfer})

    def choose(self, button: str, path):
        """Click a button and choose a file."""
        with self.page.expect_file_chooser() as chooser:
            self.page.click(button)
        chooser.value.set_files(path)

    def download(self, button: str) -> tuple[str, bytes]:
        """Click a button; return the name and the bytes of the file it saves."""
        with self.page.expect_download() as download:
            self.page.click(button)
        with open(download.value.path(), "rb") as file:
            return download.value.suggested_filename, file.read()

    def touch(self, kind: str, *points):
        """Touch the picture with fingers. kind: touchStart, touchMove, touchEnd."""
        fingers = [dict(zip("xy", self.at(x, y), strict=True), id=i) for i, (x, y) in enumerate(points)]
        self.protocol().send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    def pen(self, kind: str, x: float, y: float, pressure: float):
        """Move a pen. kind: mousePressed, mouseMoved, mouseReleased."""
        left, top = self.at(x, y)
        about = {
            "button": "left",
            "buttons": int(kind != "mouseReleased"),
            "clickCount": 1,
            "pointerType": "pen",
        }
        self.protocol().send(
            "Input.dispatchMouseEvent", {"type": kind, "x": left, "y": top, "force": pressure} | about
        )

    def protocol(self):
        """The tab's DevTools session."""
        if not hasattr(self, "session"):
            self.session = self.context.new_cdp_session(self.page)
        return self.session

    def close(self):
        """Close the tab. Fails where anything went wrong in it."""
        self.context.close()
        assert not self.wrong, self.wrong


@contextmanager
def tab(on, port: int, *, expected=(), **options):
    """The page of a server on this machine, in a browser that has never seen it."""
    options = {"viewport": {"width": 1280, "height": 900}} | options
    made = Tab(on.new_context(**options), f"http://127.0.0.1:{port}/", expected)
    try:
        yield made
    except BaseException:
        made.context.close()
        raise
    made.close()
