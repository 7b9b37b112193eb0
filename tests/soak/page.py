"""python -m tests.soak.page [--engine folder] [--strokes 60] [--seconds 20] [--minutes 10] [--out folder]

The server's page in Chromium, live, with hands that are played: how long from the last brush event to the new picture
on the screen, and where that time goes; how many pictures a second come while one paints; how long a brush event takes
on a mask of 2048 x 2048; with --minutes, whether the memory of tab and server stays flat at 60 strokes a minute.
Server and browser are processes of their own on the same machine. Writes <out>/page.csv, a row for each measure, and
prints them. Needs Chromium and Playwright (extra dev).
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from benchmarks.measure import check_counts, check_out, environment, results_folder, write_rows
from runtime.cli.command import Parser, exit_code
from tests.soak.process import Server
from tests.support.browser import Tab, browser, require_chromium, tab

MIB = 2**20
EVENTS = 60  # a second, of a mouse that paints on and on
STAGES = ("quiet", "prepare", "submit", "server", "fetch", "show")
# Notes the time at which each part of a picture's way begins, in the page itself
WATCH = """() => {
    const page = window.localcontrol, asked = window.fetch, marks = window.marks = { now: {}, done: [] };
    const clock = () => performance.now();
    window.fetch = async (path, options) => {
        const submits = options?.method === "POST" && path === "/v1/jobs", start = clock();
        if (submits) marks.now.submit = start;
        const answer = await asked(path, options);
        if (submits) marks.now.server = clock();
        if (/images/.test(path)) marks.now.fetch = start;
        return answer;
    };
    const { begun, done } = page.runner.page, paint = page.scene.paint.bind(page.scene);
    page.runner.page.begun = () => {
        marks.now = { quiet: page.pace.changed, prepare: clock() };
        begun();
    };
    page.runner.page.done = async (picture, about, painted) => {
        const now = { ...marks.now, show: clock(), drawing: 1000 * about.timings.running, passing: painted.passing };
        await done(picture, about, painted);
        paint();
        marks.done.push({ ...now, end: clock() });
    };
}"""
# A stroke a second, by the page's own clock: two of the brush, one of the eraser
PLAYED = """() => {
    const { canvas } = localcontrol.scene, { view, hands } = localcontrol, box = canvas.getBoundingClientRect();
    window.played = 0;
    const send = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type, {
        pointerId: 1, pointerType: "mouse", isPrimary: true, bubbles: true, cancelable: true,
        button: type === "pointermove" ? -1 : 0, buttons: type === "pointerup" ? 0 : 1,
        clientX: box.left + view.x + x * view.scale, clientY: box.top + view.y + y * view.scale,
    }));
    canvas.setPointerCapture = () => {};
    setInterval(() => {
        const [x, y, to] = [10 + 108 * Math.random(), 10 + 108 * Math.random(), 10 + 108 * Math.random()];
        localcontrol.tool(window.played % 3 === 2 ? "eraser" : "brush");
        hands.resize(8);
        send("pointerdown", x, y);
        for (let i = 1; i <= 8; i++) setTimeout(() => send("pointermove", x + ((to - x) * i) / 8, y), 16 * i);
        setTimeout(() => send("pointerup", to, y), 160);
        window.played++;
    }, 1000);
}"""
# Times each brush event and each frame, in the page itself
TIMED = """() => {
    const { hands, scene } = window.localcontrol;
    window.took = { extend: [], paint: [] };
    for (const [owner, name] of [[hands, "extend"], [scene, "paint"]]) {
        const act = owner[name].bind(owner);
        owner[name] = (...given) => {
            const start = performance.now();
            act(...given);
            window.took[name].push(performance.now() - start);
        };
    }
}"""


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for bad input (one line on stderr); 130 after Ctrl-C."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: run(options))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m tests.soak.page", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "--engine", metavar="FOLDER", action="append", default=[], help="also on engines; may be repeated"
    )
    parser.add_argument(
        "--strokes", type=int, default=60, help="whose latency is measured (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=int, default=20, help="of painting without a pause (default %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=int, default=0, help="of 60 strokes each, with memory (default: none)"
    )
    parser.add_argument("--out", type=Path, default=results_folder(), help="default %(default)s")
    return parser


def run(options: argparse.Namespace) -> None:
    check_counts(strokes=options.strokes, seconds=options.seconds)
    check_out(options.out)
    rows = []
    for engine in [None, *options.engine]:
        name, given = (Path(engine).name, ("--engine", engine)) if engine else ("torch", ())
        with serving(*given) as page:
            for row in (*latency(page, options.strokes), pace(page, options.seconds)):
                rows.append({"backend": name, **row})
            if engine is None:
                rows += [{"backend": "", **row} for row in brush(page)]
    if options.minutes:
        rows += [{"backend": "torch", **row} for row in soak(options.minutes)]
    write_rows(options.out / "page.csv", [{**row, **environment()} for row in rows])


@contextmanager
def serving(*options: str) -> Iterator[Tab]:
    """A server of the embedded model in its process, and the page of it, live, one region with a line in it."""
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        server = Server(Path(folder), *options)
        try:
            with tab(chromium, server.client.port) as page:
                page.ready()
                page.page.evaluate(WATCH)
                page.page.check("#live")
                page.ready(2)
                page.set("size", 8)
                yield page
        finally:
            server.kill()


def latency(page: Tab, strokes: int) -> Iterator[dict]:
    """Measure from a stroke's last event to its picture, of strokes one after the other."""
    page.page.evaluate("() => (window.marks.done = [])")
    choose = random.Random(0)
    for i in range(strokes):
        x, y = choose.uniform(10, 118), choose.uniform(10, 118)
        page.stroke((x, y), (min(120, x + 20), y), steps=6)
        page.page.wait_for_timeout(400)
        page.quiet()
        assert len(marks(page)) >= i + 1
    found = [each for each in marks(page) if not each["passing"]]
    yield figure("from the last event to the picture", [each["end"] - each["quiet"] for each in found])
    for name, after in zip(STAGES, (*STAGES[1:], "end"), strict=True):
        yield figure(f"of it: {name}", [each[after] - each[name] for each in found])
    yield figure("of the server: drawing", [each["drawing"] for each in found])


def pace(page: Tab, seconds: int) -> dict:
    """Measure how many pictures come while somebody paints on and on."""
    page.page.evaluate("() => (window.marks.done = [])")
    (left, top), (right, bottom) = page.at(20, 20), page.at(100, 100)
    page.page.mouse.move(left, top)
    page.page.mouse.down()
    start, i = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        i += 1
        down = abs(i % 80 / 40 - 1)
        page.page.mouse.move(left + (right - left) * (i // 80 % 10) / 10, top + (bottom - top) * down)
        time.sleep(max(0, start + i / EVENTS - time.perf_counter()))
    took = time.perf_counter() - start
    count = len(marks(page))
    page.page.mouse.up()
    page.page.wait_for_timeout(400)
    page.quiet()
    return {
        "measure": "pictures a second while painting",
        "count": count,
        "p50": round(count / took, 2),
        "unit": "1/s",
    }


def brush(page: Tab) -> Iterator[dict]:
    """Measure brush events and frames on a mask of 2048 x 2048."""
    page.page.uncheck("#live")
    page.unfold("Settings")
    for side in ("width", "height"):
        page.page.fill(f"#{side}", "2048")
        page.page.keyboard.press("Tab")
    page.set("size", 60)
    page.page.evaluate(TIMED)
    for i in range(5):
        page.stroke((200, 200 + 300 * i), (1800, 300 + 300 * i), (300, 500 + 300 * i), steps=40)
    took = page.page.evaluate("() => window.took")
    yield figure("brush event, 2048 x 2048", took["extend"])
    yield figure("frame, 2048 x 2048", took["paint"])


def soak(minutes: int) -> Iterator[dict]:
    """Paint 60 strokes a minute; measure memory every half minute.

    Nothing is attached to the tab meanwhile, since DevTools keep what a page fetches: the page's own clock plays the
    hand.
    """
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder) / "profile") as (attach, tabs):
        server, notes = Server(Path(folder)), []
        try:
            with attach() as page:
                page.goto(f"http://127.0.0.1:{server.client.port}/")
                page.wait_for_selector("#results li")
                page.check("#live")
                page.evaluate(PLAYED)
            for i in range(2 * minutes):
                time.sleep(30)
                rss = max((each.memory_info().rss for each in tabs()), default=0)
                notes.append({"tab": round(rss / MIB, 1), "server": server.state()["MiB"]})
                print(f"{(i + 1) / 2:5.1f} min", notes[-1], flush=True)
            with attach() as page:
                strokes, pictures = page.evaluate("() => [window.played, localcontrol.pace.took.length]")
        finally:
            server.kill()
    yield {
        "measure": "strokes, pictures of the soak",
        "count": minutes,
        "p50": strokes,
        "p95": pictures,
        "unit": "",
    }
    half = notes[len(notes) // 2 :]
    for name in notes[0]:
        values = [note[name] for note in half]
        slope = 2 * np.polyfit(range(len(half)), values, 1)[0] if len(half) > 2 else 0.0
        yield {
            "measure": f"memory, {name}",
            "count": len(notes),
            "p50": notes[0][name],
            "p95": values[-1],
            "unit": "MiB",
        }
        about = {"measure": f"memory, {name}, in the second half", "count": len(half), "p50": round(slope, 2)}
        yield about | {"unit": "MiB/min"}


@contextmanager
def alone(profile: Path) -> Iterator[tuple[Callable, Callable]]:
    """Chromium by itself: what attaches to its page for a while, and what finds its tabs' processes."""
    from playwright.sync_api import sync_playwright

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    options += [
        "--remote-debugging-port=0",
        "--disable-background-timer-throttling",
        "--window-size=1280,900",
    ]
    process = subprocess.Popen([require_chromium(), *options, "about:blank"], stderr=subprocess.DEVNULL)

    @contextmanager
    def attach():
        port = profile / "DevToolsActivePort"
        while not port.exists():
            time.sleep(0.1)
        with sync_playwright() as driver:
            made = driver.chromium.connect_over_cdp(f"http://127.0.0.1:{port.read_text().split()[0]}")
            yield made.contexts[0].pages[0]
            made.close()

    def tabs() -> list[psutil.Process]:
        own = psutil.Process(process.pid).children(recursive=True)
        return [each for each in own if "--type=renderer" in " ".join(each.cmdline())]

    try:
        yield attach, tabs
    finally:
        process.terminate()
        process.wait()


def marks(page: Tab) -> list[dict]:
    return page.page.evaluate("() => window.marks.done")


def figure(name: str, values: Sequence[float]) -> dict:
    """A row of a measure in milliseconds."""
    row = {"measure": name, "count": len(values), "p50": round(statistics.median(values), 2)}
    row |= {"p95": round(float(np.percentile(values, 95)), 2), "unit": "ms"}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
