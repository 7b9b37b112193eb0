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
from PIL import Image, PngImagePlugin

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


def test_a_reload_loses_nothing(page):
    paint(page)
    before = painted(page)
    page.page.reload()  # at once
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
    first.page.close()
    second = Tab(context, first.url)
    second.page.wait_for_selector("#regions li")
    assert painted(second) == before
    third = Tab(context, first.url)  # beside the second: a copy of its own
    third.page.wait_for_selector("#regions li")
    third.set("prompt", "another")
    second.page.reload()
    second.page.wait_for_selector("#regions li")
    assert painted(second) == before
    third.page.reload()
    third.page.wait_for_selector("#regions li")
    assert third.page.input_value("#prompt") == "another"
    third.close()
    assert not first.wrong and not second.wrong


def test_what_is_saved_is_committed_at_once(page):
    """A tab that is closed would never be asked whether that was all: one in twenty lost its last change."""
    committed = page.page.evaluate(
        """() => {
            const found = [], { commit } = IDBTransaction.prototype;
            IDBTransaction.prototype.commit = function () {
                found.push([...this.objectStoreNames]);
                return commit.call(this);
            };
            localcontrol.save();
            IDBTransaction.prototype.commit = commit;
            return found;
        }"""
    )
    assert committed == [["bitmaps", "paintings"]]


def test_a_region_that_was_removed_and_brought_back_outlives_a_reload(page):
    """Its masks go from the disk when nothing uses them, and come back with it; no other is left there."""
    paint(page)
    before = painted(page)
    count = """async () => {
        const opened = indexedDB.open("localcontrol");
        await new Promise((done) => (opened.onsuccess = done));
        const asked = opened.result.transaction("bitmaps").objectStore("bitmaps").count();
        await new Promise((done) => (asked.onsuccess = done));
        opened.result.close();
        return asked.result;
    }"""
    assert page.page.evaluate(count) == 2
    page.page.evaluate("localcontrol.painting.remove()")
    assert page.page.evaluate(count) == 0
    page.page.evaluate("localcontrol.step(false)")
    page.page.reload()
    page.page.wait_for_selector("#regions li")
    assert painted(page) == before
    page.page.evaluate("localcontrol.save()")
    assert page.page.evaluate(count) == 2


def test_a_crashed_tab_finds_its_painting_behind_newer_ones(page):
    """Nine tabs were saved since: one of them is forgotten, with what is drawn for it, but not the tab's own."""
    paint(page)
    before = painted(page)
    page.get("page.save()")
    page.page.evaluate(
        """async () => {
            window.localcontrol.save = async () => {}; // a crash saves nothing
            const opened = indexedDB.open("localcontrol");
            await new Promise((done) => (opened.onsuccess = done));
            const change = opened.result.transaction(["paintings", "pending"], "readwrite");
            const paintings = change.objectStore("paintings"), own = sessionStorage.getItem("localcontrol.tab");
            paintings.get(own).onsuccess = ({ target }) => {
                const when = Date.now() + 1e6;
                for (let i = 0; i < 9; i++) paintings.put({ ...target.result, tab: `other${i}`, when: when - i });
            };
            for (const tab of ["other0", "other8"]) change.objectStore("pending").put({ tab, key: "k", sent: null });
            await new Promise((done) => (change.oncomplete = done));
            opened.result.close();
        }"""
    )
    page.page.reload()
    page.page.wait_for_selector("#regions li")
    assert painted(page) == before
    page.until(
        """new Promise((resolve) => (indexedDB.open("localcontrol").onsuccess = ({ target }) => {
            const read = target.result.transaction("pending").objectStore("pending").getAllKeys();
            read.onsuccess = () => (target.result.close(), resolve(read.result.join() === "other0"));
        }))"""
    )


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
    before = painted(page)
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
    assert painted(page) == before and page.get("page.shown !== null && page.results.current === null")


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


def test_pinned_results_stay_and_deleted_ones_come_back(drawn):
    page, seeds = drawn, "page.results.kept.map((each) => each.about.seed)"
    page.set("prompt", "sand")  # no first visit any more, which draws
    page.page.click("#pin")
    page.says("Result 1 is pinned")
    assert page.page.locator("#results li.pinned").count() == 1
    page.page.evaluate(
        """async () => {
            const { results } = window.localcontrol, { picture, about, packed } = results.current;
            for (let i = 100; i < 150; i++) await results.add(picture, {...about, seed: i}, packed);
        }"""
    )
    assert page.get(seeds) == [1, *range(101, 150)]
    page.page.locator("#results button").nth(1).click()  # 148
    page.page.click("#discard")
    page.says("Result 50 is deleted")
    assert (
        page.get("page.results.current.about.seed") == 149 and page.page.locator("#results li").count() == 49
    )
    assert page.get("page.shown !== null")
    page.page.click("#bring-back")
    page.until("page.results.current.about.seed === 148")
    assert page.page.locator("#results button").nth(1).get_attribute("aria-current") == "true"
    assert page.page.locator("#bring-back").is_hidden()
    page.page.locator("#results button").last.click()  # the pinned one
    page.page.click("#discard")
    page.says("Result 1 is deleted")
    page.page.reload()
    page.ready(49)
    assert page.get(seeds) == list(range(101, 150))


def test_all_results_may_be_deleted(drawn):
    page = drawn
    page.set("prompt", "sand")
    page.page.click("#discard")
    page.says("Result 1 is deleted")
    assert page.page.locator("#of-result").is_hidden() and page.get("page.shown === null")
    page.page.click("#bring-back")
    page.until("page.shown !== null")
    assert page.page.locator("#results li").count() == 1
    page.page.click("#pin")
    page.says("Result 1 is pinned")
    page.page.reload()
    page.ready()
    assert page.page.locator("#results li.pinned").count() == 1
    assert page.page.locator("#pin").get_attribute("aria-pressed") == "true"


def test_too_many_are_not_pinned(drawn):
    page = drawn
    page.page.evaluate(
        """async () => {
            const { results } = window.localcontrol, { picture, about, packed } = results.current;
            for (let i = 0; i < 25; i++) await results.pin(await results.add(picture, about, packed));
            await results.add(picture, about, packed);
        }"""
    )
    page.page.click("#pin")
    page.says("25 pictures are pinned")
    assert page.page.locator("#results li.pinned").count() == 25


def test_no_preset_is_what_was_set_before(page):
    page.unfold("Settings")
    chosen = "(({scheduler, steps, guidance, preset}) => [scheduler, steps, guidance, preset])(page.painting.settings)"
    page.page.fill("#steps", "17")
    before = page.get(chosen)
    for preset in ("lcm4", "turbo1"):
        page.page.select_option("#preset", preset)
    assert page.get(chosen) != before
    page.page.select_option("#preset", "")
    assert page.get(chosen) == before
    page.page.select_option("#preset", "lcm4")
    page.page.fill("#steps", "9")  # no preset any more: what is set is one's own
    page.page.select_option("#preset", "turbo1")
    page.page.select_option("#preset", "")
    assert page.get(chosen)[1] == 9


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
        page.says("starts from that picture, cropped from 64 x 32")
    else:
        page.page.fill("#height", "192")
        page.page.keyboard.press("Tab")
        assert page.bitmap().shape == (192, 128)
    page.page.locator("#canvas").focus()
    page.page.keyboard.press("Control+z")
    assert painted(page) == before


def test_a_strangers_picture_neither_breaks_the_page_nor_what_is_kept(page, server):
    text = PngImagePlugin.PngInfo()
    said = {
        "software": "localcontrol 1",
        "prompt": "a",
        "regions": json.dumps([{"colour": 99, "prompt": "x", "levels": None}]),
    }
    said |= dict.fromkeys(("steps", "guidance", "width", "height", "seed", "strength"), "64")
    for name, value in said.items():
        text.add_text(name, value)
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG", pnginfo=text)
    page.drop("strange.png", file.getvalue())
    page.says("Opened, but without region 1's colour")
    assert page.page.input_value("#r-words") == "x"
    before = painted(page)
    file = io.BytesIO()
    text.add_text("width", "-5")
    Image.new("RGB", (64, 64)).save(file, "PNG", pnginfo=text)
    page.drop("stranger.png", file.getvalue())
    page.says("stranger.png: settings.width: -5; expected 16 to 8192")
    page.page.reload()
    page.page.wait_for_selector("#regions li")
    assert painted(page) == before


def test_what_cannot_be_opened_is_said_and_stays(page):
    paint(page)
    page.page.evaluate(
        """() => new Promise((resolve) => {
            const asked = indexedDB.open("localcontrol");
            asked.onsuccess = () => {
                const transaction = asked.result.transaction("bitmaps", "readwrite");
                transaction.objectStore("bitmaps").clear();
                transaction.oncomplete = () => resolve(null);
            };
        })"""
    )
    page.page.evaluate("() => (window.localcontrol.save = () => Promise.resolve())")
    page.page.reload()
    page.says("What was kept here cannot be opened")
    assert page.page.locator("#regions li", has_text="A star").is_visible()


def failing(status):
    """What answers a request with this status."""
    return lambda route: route.fulfill(status=status)


def test_an_answer_that_fails_in_passing_is_asked_for_again(chromium, server):
    with tab(chromium, server.port, expected=["503", "502"]) as page:
        page.ready()
        for path, status in (("events", 503), ("images/0", 502)):
            count = page.page.locator("#results li").count()
            page.page.route(f"**/{path}", failing(status), times=1)
            page.page.click("#draw")
            page.ready(count + 1)
        page.page.route("**/v1/capabilities", failing(503), times=1)
        page.page.reload()
        page.page.wait_for_selector("#regions li")


def test_a_picture_is_kept_with_what_it_was_drawn_of(drawn):
    page = drawn
    page.page.route("**/v1/files", lambda route: (time.sleep(0.4), route.continue_()))
    page.clean()
    page.page.keyboard.press("r")
    page.stroke((10, 10), (60, 60))
    page.page.fill("#r-words", "a blue square")
    page.page.click("#draw")
    page.set("prompt", "second words")
    page.set("r-scale", 0.2)
    page.ready(2)
    settings = page.get("page.results.current.packed.settings")
    job = page.get("page.results.current.about.id")
    assert settings["prompt"] != "second words" and job
    read = (
        ".then((answer) => answer.arrayBuffer()).then((data) => String.fromCharCode(...new Uint8Array(data)))"
    )
    data = page.get(f"fetch('/v1/jobs/{job}/images/0'){read}")
    assert f"prompt\0{settings['prompt']}" in data


def test_cancelled_while_it_is_sent(drawn, server):
    page = drawn
    sent = []
    page.page.on(
        "response",
        lambda answer: (
            sent.append(answer)
            if answer.request.method == "POST" and answer.url.endswith("/v1/jobs")
            else None
        ),
    )
    page.page.route("**/v1/jobs", lambda route: (time.sleep(0.4), route.continue_()))
    page.unfold("Settings")
    page.page.fill("#steps", "100")
    page.page.click("#draw")
    page.page.wait_for_timeout(100)
    page.page.click("#cancel")
    page.says("Cancelled.")
    while not sent:
        page.page.wait_for_timeout(20)
    assert server.job(sent[0].json()["id"])["state"] == "cancelled"
