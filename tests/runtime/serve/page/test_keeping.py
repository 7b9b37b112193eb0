"""What is painted outlives a reload, a closed tab, a killed server; and goes out as a file and comes back."""

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.browser import Tab, tab
from tests.support.server import SMALL

ROOT = Path(__file__).parents[4]


def paint(page):
    """One region, a rectangle and a line in it."""
    page.clean()
    page.page.keyboard.press("r")
    page.stroke((20, 20), (80, 100))
    page.page.keyboard.press("x")
    page.page.keyboard.press("b")
    page.set("size", 2)
    page.stroke((30, 30), (70, 80))
    page.set("prompt", "a green square's edge on sand")
    page.page.fill("#r-words", "a red square on sand")
    page.set("r-scale", 0.8)


def painted(page):
    state = page.get(
        "({settings: page.painting.settings, regions: page.painting.state.regions.map("
        "({mask, ink, colour, id, ...rest}) => rest)})"
    )
    return state, page.bitmap("mask", 0).tobytes(), page.bitmap("ink", 0).tobytes()


def saved(page):
    """Wait until the browser has what is painted."""
    page.page.wait_for_timeout(350)
    page.get("page.saved.then(() => null)")


def test_a_reload_loses_nothing(page):
    paint(page)
    before = painted(page)
    saved(page)
    page.page.reload()
    page.page.wait_for_selector("#regions li")
    assert painted(page) == before


def test_a_reload_in_the_middle_of_a_picture_finds_it_again(drawn, server):
    page = drawn
    page.unfold("Settings")
    page.page.fill("#steps", "60")
    page.page.click("#draw")
    page.says("of 60")
    job = page.get("page.runner.job")
    page.page.reload()
    page.ready(2)
    assert server.job(job)["state"] == "done" and page.get("page.results.current.about.id") == job
    assert page.get("page.results.current.packed.settings.steps") == 60


def test_a_closed_tab_is_found_again_and_two_tabs_keep_their_own(chromium, server):
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    first = Tab(context, f"http://127.0.0.1:{server.port}/")
    first.ready()
    paint(first)
    before = painted(first)
    saved(first)
    first.page.close()
    second = Tab(context, first.url)
    second.page.wait_for_selector("#regions li")
    assert painted(second) == before
    third = Tab(context, first.url)  # beside the second: a copy of its own
    third.page.wait_for_selector("#regions li")
    third.set("prompt", "another")
    saved(third)
    second.page.reload()
    second.page.wait_for_selector("#regions li")
    assert painted(second) == before
    third.page.reload()
    third.page.wait_for_selector("#regions li")
    assert third.page.input_value("#prompt") == "another"
    third.close()
    assert not first.wrong and not second.wrong


@contextmanager
def process(port, data):
    """A server as somebody starts it, to be killed."""
    command = [sys.executable, "-m", "runtime.serve", "--port", str(port), "--data", str(data)]
    made = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5)
                break
            except OSError:
                assert made.poll() is None
                time.sleep(0.1)
        yield made
    finally:
        made.send_signal(signal.SIGKILL)
        made.wait()


def test_a_killed_server_comes_back_and_its_picture_too(chromium, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        process(port, tmp_path) as first,
        tab(chromium, port, expected=["net::ERR", "Failed to load"]) as page,
    ):
        page.ready()
        page.unfold("Settings")
        page.page.fill("#steps", "50")
        page.page.click("#draw")
        page.says("of 50")
        first.send_signal(signal.SIGKILL)
        first.wait()
        page.clean()
        page.stroke((30, 30), (80, 80))  # painting goes on
        mask = page.bitmap()
        with process(port, tmp_path):
            page.page.wait_for_selector("#results li:nth-child(2)", timeout=60_000)
            page.quiet()
        star = page.get("page.results.current.packed.regions[0].name")
        assert star == "A star" and page.get("page.results.current.packed.settings.steps") == 50
        assert (page.bitmap() == mask).all()


def test_a_server_that_is_away_is_said_and_waited_for(chromium, tmp_path, server):
    with tab(chromium, server.port, expected=["net::ERR", "Failed to load"]) as page:
        page.ready()
        page.context.set_offline(True)
        page.page.click("#draw")
        page.page.wait_for_timeout(600)
        page.context.set_offline(False)
        page.ready(2)


def test_a_saved_png_restores_all_of_it_and_undo_brings_the_other_back(page):
    paint(page)
    before = painted(page)
    page.page.click("#draw")
    page.says("Drawn in")
    drawn = page.picture()
    name, data = page.download("#save")
    assert name == "a green square_s edge on sand 1-1.png"
    page.clean()
    page.set("prompt", "something else")
    other = painted(page)
    page.drop("any name.png", data)
    page.says("Opened any name.png")
    assert painted(page) == before and (page.picture() == drawn).all()
    page.page.keyboard.press("Control+z")
    assert painted(page) == other


def test_a_picture_of_the_server_restores_its_settings_and_its_masks(page, server):
    paint(page)
    (state, mask, ink), size = painted(page), {"height": 128, "width": 128}
    page.page.click("#draw")
    page.says("Drawn in")
    job = page.get("page.results.current.about.id")
    data = server.get(f"/v1/jobs/{job}/images/0")[2]
    page.clean()
    page.drop("from the server.png", data, onto="aside")
    page.says("Opened from the server.png")
    found, found_mask, found_ink = painted(page)
    assert found_mask == mask and found_ink == ink
    assert {**found["settings"], "strength": 0} == {**state["settings"], "strength": 0}
    assert found["regions"][0]["words"] == "a red square on sand" and found["regions"][0]["scale"] == 0.8
    status, _, data = server.post("/v1/generate", {**SMALL, **size, "guidance_range": [0, 0.5]})
    assert status == 200
    page.drop("other.png", data)
    page.says("Opened, but without guidance_range")
    assert page.page.input_value("#prompt") == SMALL["prompt"]


def test_an_exported_project_draws_the_same_picture_from_the_command_line(page, tmp_path):
    paint(page)
    page.page.check("#held")
    page.page.click("#draw")
    page.says("Drawn in")
    before, drawn = painted(page), page.picture()
    name, data = page.download("#export")
    assert name == "a green square_s edge on sand.zip"
    zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path)
    assert json.loads((tmp_path / "regions.json").read_text())[0]["prompt"] == "a red square on sand"
    python, *command = shlex.split((tmp_path / "command.txt").read_text())
    assert python == "python"
    with ThreadPoolExecutor(
        1
    ) as pool:  # the server's threads are not told how many OpenMP threads this one has
        threads = pool.submit(torch.get_num_threads).result()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True, env=environment)
    other = np.asarray(Image.open(tmp_path / "picture.png")).astype(int) - page.picture()
    assert not other.any(), (np.abs(other).max(), (other != 0).mean())
    page.clean()
    (tmp_path / "mine.zip").write_bytes(data)
    page.choose("#import", tmp_path / "mine.zip")
    page.says("Opened mine.zip")
    assert painted(page) == before and (page.picture() == drawn).all()


def test_the_settings_of_a_result_come_back(drawn):
    page = drawn
    before = painted(page)
    paint(page)
    page.page.click("#again")
    page.page.locator("#regions li", has_text="A star").wait_for()
    assert painted(page) == before


def test_fifty_results_are_kept(page):
    page.page.evaluate(
        """async () => {
            const { results } = window.localcontrol, packed = {settings: {prompt: "", width: 1, height: 1, steps: 1}};
            for (let i = 0; i < 53; i++) await results.add(new Blob(["x"]), {seed: i}, packed);
        }"""
    )
    assert page.page.locator("#results li").count() == 50
    page.page.reload()
    page.page.wait_for_selector("#results li")
    assert page.get("page.results.kept.map((each) => each.about.seed)") == list(range(3, 53))
    page.wrong.clear()  # those pictures are none


@pytest.mark.parametrize("what", ["start", "size"])
def test_undone_as_one_step(page, what):
    before = painted(page)
    page.unfold("Settings")
    if what == "start":
        picture = io.BytesIO()
        Image.new("RGB", (64, 32), "red").save(picture, "PNG")
        page.page.set_input_files("#file", [])
        with page.page.expect_file_chooser() as chooser:
            page.page.click("#start")
        chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": picture.getvalue()})
        page.says("starts from that picture, stretched from 64 x 32")
    else:
        page.page.fill("#height", "192")
        page.page.keyboard.press("Tab")
        assert page.bitmap().shape == (192, 128)
    page.page.locator("#canvas").focus()
    page.page.keyboard.press("Control+z")
    assert painted(page) == before
