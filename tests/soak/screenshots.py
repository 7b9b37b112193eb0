"""python -m tests.soak.screenshots [--out docs/page]

Takes the pictures of the server's page that the documentation shows, in Chromium, with the embedded model: light, dark,
on a tablet; at the first visit, while one paints, while it draws, with nothing, with an error; and a strip of ten
frames of a sketch that is drawn live. Needs Chromium and Playwright (extra dev).
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from benchmarks.measure import check_out
from runtime.cli.command import Parser, exit_code
from runtime.machine.files import replacing
from tests.soak.process import Server
from tests.support.browser import Tab, browser, tab

FRAMES = 10
FRAME = 240  # px, of the strip
WIDE, TABLET = {"width": 1280, "height": 800}, {"width": 820, "height": 1180}


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    parser = Parser(prog="python -m tests.soak.screenshots", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--out", type=Path, default=Path("docs/page"), help="default %(default)s")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    check_out(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        server = Server(Path(folder))
        try:
            for name, (act, looks) in SCENES.items():
                with tab(
                    chromium, server.client.port, expected=["422"], **{"viewport": WIDE} | looks
                ) as page:
                    page.ready()
                    made = act(page)
                    save(made or Image.open(io.BytesIO(page.page.screenshot())), options.out / f"{name}.png")
                    page.page.keyboard.press("Escape")
        finally:
            server.kill()


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG of at most 256 colours a screen, which keeps text sharp and the repository small."""
    small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with replacing(path) as unfinished:
        small.save(unfinished, format="PNG", optimize=True)
    print(path, path.stat().st_size // 1024, "KiB", flush=True)


def two_regions(page: Tab) -> None:
    """Beside the star a second region: painted by brush, a square drawn in it; each with its words."""
    page.page.fill("#r-words", "a red star on sand")
    page.page.click("#add")
    page.page.fill("#r-name", "A square")
    page.page.fill("#r-words", "a blue square on sand")
    page.set("prompt", "a red star and a blue square on sand")
    page.set("size", 26)
    page.tool("Brush")
    page.stroke((84, 30), (110, 30), (110, 54), (84, 54), (84, 42), (110, 42), steps=8)
    page.page.click("#on-ink")
    page.tool("Rectangle")
    page.stroke((84, 29), (110, 55), steps=8)
    page.tool("Brush")
    page.page.click("#on-mask")
    page.page.click("#draw")
    page.ready(2)


def painting(page: Tab) -> None:
    two_regions(page)
    page.set("size", 26)
    page.page.mouse.move(*page.at(84, 60))
    page.page.mouse.down()
    page.page.mouse.move(*page.at(106, 66), steps=6)


def result(page: Tab) -> None:
    two_regions(page)
    page.page.select_option("#against", "edges")
    page.page.wait_for_timeout(500)
    page.unfold("Settings")
    page.page.locator("#settings").scroll_into_view_if_needed()


def running(page: Tab) -> None:
    two_regions(page)
    page.unfold("Settings")
    page.page.fill("#steps", "100")
    page.page.click("#draw")
    page.says("Step 3")
    page.page.evaluate("() => scrollTo(0, 0)")


def empty(page: Tab) -> None:
    page.page.get_by_role("button", name="Delete A star").click()
    page.get("(page.scene.picture = null, page.scene.draw())")


def error(page: Tab) -> None:
    page.get("page.painting.change({adapter: 'depth'}, 'Adapter')")
    page.page.click("#draw")
    page.page.wait_for_selector("#status.wrong")


def photo(page: Tab) -> None:
    page.page.click("#on-ink")
    with open("examples/photo.jpg", "rb") as file:
        page.drop("photo.jpg", file.read(), "image/jpeg")
    page.page.wait_for_selector("#photo-yes:enabled")
    page.page.wait_for_timeout(300)


def strip(page: Tab) -> Image.Image:
    """Ten frames of a star that is drawn live, line by line."""
    page.page.click("#on-ink")
    page.page.click("#do-clear")
    page.page.check("#live")
    page.set("size", 2)
    page.set("prompt", "a red star on sand")
    page.page.wait_for_timeout(300)
    page.quiet()
    frames = []
    for i in range(FRAMES):
        page.stroke(corner(i), corner(i + 1), steps=6)
        page.page.wait_for_timeout(350)
        page.quiet()
        frames.append(canvas(page))
    made = Image.new("RGB", (5 * FRAME, FRAMES // 5 * FRAME))
    for i, frame in enumerate(frames):
        made.paste(frame.resize((FRAME, FRAME), Image.Resampling.LANCZOS), (i % 5 * FRAME, i // 5 * FRAME))
    return made


def corner(i: int) -> tuple[float, float]:
    """Where a corner of the example's star is, in the picture."""
    angle, radius = math.pi * (i % 10) / 5 - math.pi / 2, 14 if i % 2 else 28
    return 36 + radius * math.cos(angle), 64 + radius * math.sin(angle)


def canvas(page: Tab) -> Image.Image:
    """The picture as the canvas shows it."""
    (left, top), (right, bottom) = page.at(0, 0), page.at(128, 128)
    clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")


SCENES: dict[str, tuple[Callable[[Tab], Image.Image | None], dict]] = {
    "first": (lambda page: None, {}),
    "painting": (painting, {}),
    "result-dark": (result, {"color_scheme": "dark"}),
    "running-tablet": (running, {"viewport": TABLET}),
    "empty": (empty, {}),
    "error": (error, {"color_scheme": "dark"}),
    "photo": (photo, {}),
    "live": (strip, {}),
}


if __name__ == "__main__":
    sys.exit(main())
