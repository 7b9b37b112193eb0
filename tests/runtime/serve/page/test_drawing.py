"""From what is painted to the picture: drawn, live, cancelled, compared."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.locality import edge_scores
from runtime import LocalControlPipeline
from runtime.control.conditions import canny
from runtime.control.sheet import INSIDE, OUTSIDE
from tests.support.browser import embedded, tab
from tests.support.server import png, running
from tests.support.tiny import make_pipeline


def alone(page, **options):
    """What the pipeline draws of the page's settings, without control."""
    s = page.get("page.painting.settings")
    options = {"seed": s["seed"], "steps": s["steps"], "guidance": s["guidance"]} | options
    return np.asarray(embedded()(s["prompt"], width=s["width"], height=s["height"], **options).images[0])


def test_a_sketch_in_a_region_has_its_edges_there_and_no_pixel_outside_changes(drawn):
    page = drawn
    page.clean()
    page.page.keyboard.press("r")
    page.stroke((8, 20), (70, 110))
    page.page.keyboard.press("x")
    page.page.keyboard.press("b")
    page.set("size", 2)
    page.stroke((20, 40), (56, 40), (56, 84), (20, 84), (20, 40), steps=12)
    page.page.check("#held")
    page.page.click("#draw")
    page.says("Drawn in")
    assert page.page.locator("#result-said").inner_text().endswith("seed 1 · 0 pixels changed outside")
    made, mask, ink = page.picture(), page.bitmap(), page.bitmap("ink")[..., 0]
    free = alone(page)
    outside = mask == 0
    assert (made[outside] == free[outside]).all()
    scores = [edge_scores(np.asarray(canny(picture)), ink, mask / 255) for picture in (made, free)]
    assert scores[0].recall > max(0.5, 3 * scores[1].recall), scores


def test_the_picture_is_the_one_the_pipeline_draws(page):
    page.clean()
    page.set("prompt", "a blue square on sand")
    page.page.click("#draw")
    page.says("Drawn in")
    assert (page.picture() == alone(page)).all()
    assert (
        page.page.locator("#result-said")
        .inner_text()
        .startswith("a blue square on sand · 128 x 128, 12 steps, seed 1")
    )


def test_live_draws_the_newest_and_keeps_what_a_pause_gives(drawn, server):
    page = drawn
    page.page.check("#live")
    page.ready(2)
    page.page.keyboard.press("e")
    page.set("size", 12)
    page.page.mouse.move(*page.at(10, 30))
    page.page.mouse.down()
    for i in range(60):  # two seconds of painting
        page.page.mouse.move(*page.at(10 + i, 30 + 20 * (i % 2)))
        page.page.wait_for_timeout(25)
    passing = page.get("page.pace.took.length")
    kept = page.page.locator("#results li").count()
    page.page.mouse.up()
    page.ready(kept + 1)
    assert passing >= 3 and kept == 2  # pictures came while it was painted, and only the last is a result
    first = page.picture()
    page.page.uncheck("#live")
    page.page.click("#draw")
    page.ready(kept + 2)
    assert (page.picture() == first).all()  # it was the newest state that was drawn


def test_live_waits_for_the_words_and_a_new_edit_takes_the_place_of_a_running_one(drawn, server):
    page = drawn
    page.page.check("#live")
    page.ready(2)
    page.unfold("Settings")
    page.page.fill("#steps", "100")
    page.page.wait_for_selector("#cancel:enabled")
    page.page.fill("#steps", "2")
    page.ready(3)
    assert page.get("page.results.kept.map((each) => each.packed.settings.steps)") == [12, 12, 2]
    page.page.locator("#prompt").press_sequentially(" with", delay=20)
    page.ready(4)
    assert page.page.locator("#results li").count() == 4  # one picture, not one a letter


def test_a_draft_is_smaller_and_the_release_is_whole(page):
    page.unfold("Settings")
    page.page.select_option("#draft-size", "0.5")
    page.page.fill("#draft-steps", "3")
    page.page.select_option("#draft-preset", "lcm4")
    page.page.check("#live")
    page.ready(1)
    page.page.mouse.move(*page.at(100, 30))
    page.page.mouse.down()
    page.page.mouse.move(*page.at(110, 60), steps=5)
    page.page.locator("#result-said", has_text="64 x 64, 3 steps").wait_for()
    about = page.get("page.results.current.about")
    assert (about["width"], about["height"]) == (64, 64) and page.get("page.results.current.id") == 0
    page.page.mouse.up()
    page.ready(2)
    assert page.get("page.results.current.about.width") == 128


def test_cancelled_within_a_step(drawn, server):
    page = drawn
    before = page.picture()
    page.unfold("Settings")
    page.page.fill("#steps", "100")
    page.page.keyboard.press("Control+Enter")
    page.says("of 100")
    job = page.get("page.runner.job")
    page.page.keyboard.press("Escape")
    page.says("Cancelled.")
    assert server.job(job)["state"] == "cancelled"
    assert page.page.locator("#results li").count() == 1 and (page.picture() == before).all()


def test_what_the_server_refuses_is_said(page):
    page.get("page.painting.change({adapter: 'depth'}, 'Adapter')")
    page.page.click("#draw")
    page.page.locator("#status.wrong", has_text="A star: adapter 'depth' is unknown").wait_for()
    assert page.page.locator("#r-adapter option:checked").inner_text() == "depth (not here)"
    page.wrong = [each for each in page.wrong if "422" not in each]  # the browser logs what was refused


def test_a_number_out_of_bounds_is_said_and_not_taken(page):
    page.unfold("Settings")
    page.page.fill("#steps", "1000")
    page.says("Steps: expected a whole number from 1 to 100")
    page.page.fill("#width", "100")
    page.says("Width: expected")
    page.page.click("#draw")
    assert page.get("[page.painting.settings.steps, page.painting.settings.width]") == [12, 128]
    assert page.page.input_value("#steps") == "12" and page.page.input_value("#width") == "128"


def test_warnings_are_where_they_belong(page):
    page.clean()
    region = page.page.locator("#regions li")
    region.get_by_text("its mask is empty").wait_for()
    page.page.check("#held")
    page.page.locator("#nowhere", has_text="nothing is painted").wait_for()
    page.page.keyboard.press("r")
    page.stroke((20, 20), (60, 60))
    region.get_by_text("it has no words and no condition").wait_for()
    page.page.fill("#r-words", "a blue square")
    assert region.get_by_text("▲").count() == 0 and page.page.locator(".warning:visible").count() == 0
    page.set("r-start", 0.95)
    page.set("r-end", 1)
    region.get_by_text("less than one step reaches it").wait_for()
    page.set("r-end", 0.3)
    region.get_by_text("it begins to act after it stops").wait_for()


def test_words_act_inside_alone(page):
    page.clean()
    page.set("prompt", "sand")
    page.page.keyboard.press("r")
    page.stroke((10, 10), (118, 118))
    page.page.fill("#r-words", "a blue circle on sand")
    page.page.click("#draw")
    page.says("Drawn in")
    blue = page.picture().astype(int)
    assert ((blue[..., 2] - blue[..., 0]) > 60).mean() > 0.05
    assert page.get("page.results.current.packed.regions[0].words") == "a blue circle on sand"


def test_compared_with_the_same_without_control_and_with_its_edges(drawn):
    page = drawn
    read = """() => {
        const { before } = window.localcontrol.scene, canvas = new OffscreenCanvas(before.width, before.height);
        const context = canvas.getContext("2d");
        context.drawImage(before, 0, 0);
        return Array.from(context.getImageData(0, 0, before.width, before.height).data);
    }"""

    def shown():
        return np.array(page.page.evaluate(read), np.uint8).reshape(128, 128, 4)[..., :3]

    def against(value):
        page.get("page.scene.before = null")
        page.page.select_option("#against", value)
        page.page.wait_for_selector("#split:visible")
        page.until("page.scene.before !== null")

    against("free")
    assert (shown() == alone(page)).all()
    against("edges")
    edges, mask, lines = shown(), page.bitmap() > 0, np.asarray(canny(page.picture())) > 0
    assert (
        (edges[lines & mask] == INSIDE).all()
        and (edges[lines & ~mask] == OUTSIDE).all()
        and not edges[~lines].any()
    )
    page.set("prompt", "a blue circle on sand")
    page.page.click("#draw")
    page.ready(2)
    first = page.get("page.results.kept[0].id")
    against("previous")
    assert page.get("page.compare.previous.id") == first
    page.page.select_option("#against", "")
    page.page.wait_for_selector("#split", state="hidden")


def test_the_seed_is_fixed_or_drawn(drawn):
    page = drawn
    first = page.picture()
    page.page.click("#draw")
    page.ready(2)
    assert (page.picture() == first).all()
    page.unfold("Settings")
    page.page.uncheck("#fixed")
    page.page.click("#draw")
    page.ready(3)
    seeds = page.get("page.results.kept.map((each) => each.about.seed)")
    assert seeds[:2] == [1, 1] and seeds[2] == int(page.page.input_value("#seed")) != 1


@pytest.mark.parametrize("button", ["#as-start", "#as-condition"])
def test_a_result_begins_another(drawn, button):
    page = drawn
    page.page.click(button)
    if button == "#as-condition":
        page.page.wait_for_selector("#photo-yes:enabled")
        page.page.click("#photo-yes")
        page.until("page.painting.history.done.length === 1")
        assert (page.bitmap("ink")[..., 0] == np.asarray(canny(page.picture()))).all()
    else:
        page.page.locator("#start-said", has_text="from a picture").wait_for(state="attached")
        page.unfold("Settings")
        page.set("strength", 0.3)
        first = page.picture().astype(int)
        page.set("seed", 5)
        page.page.click("#draw")
        page.ready(2)
        assert np.abs(page.picture().astype(int) - first).mean() < 12  # most of it stays


def test_a_server_without_adapters_draws_words_in_regions(chromium, tmp_path):
    pipe = LocalControlPipeline.from_diffusers(make_pipeline())
    with running(tmp_path, on=pipe) as client, tab(chromium, client.port) as page:
        page.ready()
        assert page.get("page.painting.chosen.words") == "a red star"
        assert page.page.locator("#r-adapter").inner_text() == "no adapter is loaded"
        assert page.page.locator("#r-control").is_disabled()
        page.page.click("#add")
        page.stroke((8, 20), (30, 40))
        page.page.fill("#r-words", "a blue circle")
        page.page.click("#draw")
        page.ready(2)


def test_the_first_picture_is_one_that_the_server_takes(chromium, tmp_path):
    bounds = {"steps": 3, "side": 100, "megapixels": 0.0065}  # 80 x 80
    with running(tmp_path, on=embedded(), **bounds) as client, tab(chromium, client.port) as page:
        page.ready()
        assert page.get("[page.painting.settings.width, page.painting.settings.steps]") == [80, 3]


def test_words_of_any_length_are_taken_and_what_is_too_long_is_said(page):
    page.page.evaluate("""() => {
        document.getElementById("prompt").select();
        document.execCommand("insertText", false, "a red star ".repeat(400));  // as pasting does
    }""")
    page.page.click("#draw")
    page.page.locator("#status.wrong", has_text="prompt: 4,400 characters; expected at most 4,000").wait_for()
    page.wrong = [each for each in page.wrong if "422" not in each]


def test_a_picture_of_another_shape_is_cropped_to_start_from(page):
    photo = Image.new("RGB", (400, 200), "red")
    photo.paste("lime", (100, 0, 300, 200))  # its middle
    page.unfold("Settings")
    page.choose("#start", {"name": "photo.png", "mimeType": "image/png", "buffer": png(photo)})
    page.says("starts from that picture, cropped from 400 x 200")
    page.page.click("#draw")
    page.ready()  # the server refuses another shape
    _, project = page.download("#export")
    start = Image.open(io.BytesIO(zipfile.ZipFile(io.BytesIO(project)).read("start.png")))
    assert start.convert("RGB").getcolors() == [(200 * 200, (0, 255, 0))]  # which runtime.generate takes too
    page.choose("#import", {"name": "mine.zip", "mimeType": "application/zip", "buffer": project})
    page.says("Opened mine.zip")
    _, again = page.download("#export")
    whole = Image.open(io.BytesIO(zipfile.ZipFile(io.BytesIO(again)).read("start-whole.png")))
    assert whole.size == (400, 200)  # of which another size takes more
