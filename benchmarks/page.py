"""python -m benchmarks.page [--engine folder] [--strokes 60] [--seconds 20] [--minutes 10] [--out folder]

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
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from benchmarks.measure import check_counts, check_out, environment, results_folder, write_rows
from runtime.cli.command import Parser, exit_code
from tests.soak.process import Server
from tests.support.browser import Tab, browser, tab

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
    parser = Parser(prog="python -m benchmarks.page", description=__doc__.partition("\n\n")[2])
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
        with serving(*given) as (server, page):
            for row in (*latency(page, options.strokes), pace(page, options.seconds)):
                rows.append({"backend": name, **row})
            if engine is None:
                rows += [{"backend": "", **row} for row in brush(page)]
    if options.minutes:
        with serving() as (server, page):
            rows += [{"backend": "torch", **row} for row in soak(page, server, options.minutes)]
    write_rows(options.out / "page.csv", [{**row, **environment()} for row in rows])


@contextmanager
def serving(*options: str) -> Iterator[tuple[Server, Tab]]:
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
                yield server, page
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


def soak(page: Tab, server: Server, minutes: int) -> Iterator[dict]:
    """Paint 60 strokes a minute; measure memory every half minute, after garbage collection."""
    choose, notes, start = random.Random(1), [], time.perf_counter()
    for i in range(60 * minutes):
        x, y = choose.uniform(10, 118), choose.uniform(10, 118)
        page.tool("Eraser" if i % 3 == 2 else "Brush")
        page.stroke((x, y), (choose.uniform(10, 118), y), steps=5)
        page.page.wait_for_timeout(max(0, 1000 * (start + i + 1 - time.perf_counter())))
        if i % 30 == 29:
            notes.append(memory(page, server))
            print(f"{(i + 1) / 60:5.1f} min", notes[-1], flush=True)
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
        yield {
            "measure": f"memory, {name}, in the second half",
            "count": len(half),
            "p50": round(slope, 2),
            "unit": "MiB/min",
        }


def memory(page: Tab, server: Server) -> dict[str, float]:
    """MiB of the tab's heap, of its process, and of the server's."""
    session = page.protocol()
    session.send("HeapProfiler.collectGarbage")
    heap = session.send("Runtime.getHeapUsage")["usedSize"]
    tabs = [
        each for each in psutil.process_iter(["cmdline"]) if "--type=renderer" in (each.info["cmdline"] or [])
    ]
    largest = max((each.memory_info().rss for each in tabs), default=0)
    return {"heap": round(heap / MIB, 1), "tab": round(largest / MIB, 1), "server": server.state()["MiB"]}


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
