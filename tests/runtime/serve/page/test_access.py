"""The page for everybody: axe-core, the keyboard alone, a server with keys, a window of any size."""

import pytest

from runtime.serve.web.guard import Access
from tests.support.browser import embedded, tab
from tests.support.server import running

pytest.importorskip("axe_playwright_python", reason="axe-core is missing: pip install axe-playwright-python")


def faults(page):
    """What axe-core finds that is serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page.page).response["violations"]
    return [
        (each["id"], node["html"][:100])
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(chromium, server, scheme):
    # axe is put into the page as text, which the page's own policy forbids everybody else
    with tab(chromium, server.port, color_scheme=scheme, bypass_csp=True) as page:
        page.ready()
        for name in ("Settings", "Rectangle by numbers", "Strength of each level"):
            page.unfold(name)
        assert faults(page) == []
        page.page.click("#on-ink")
        page.page.click("#help")
        assert faults(page) == []
        page.page.keyboard.press("Escape")
        page.page.click("#as-condition")
        page.page.wait_for_selector("#photo-yes:enabled")
        assert faults(page) == []
        page.page.click("#photo-no")
        page.page.get_by_role("button", name="Delete A star").click()
        assert faults(page) == []


def test_all_but_freehand_by_keyboard(page):
    keyboard = page.page.keyboard

    def to(name, role="button"):
        """Tab on until an element has the focus."""
        for _ in range(150):
            keyboard.press("Tab")
            if page.page.get_by_role(role, name=name, exact=True).evaluate_all(
                "(all) => all.includes(document.activeElement)"
            ):
                return
        raise AssertionError(f"{name} is not reached")

    page.page.locator("body").press("n")
    assert page.get("page.painting.state.regions.length") == 2
    to("Words inside it", "textbox")
    keyboard.type("a blue square on sand")
    page.unfold("Rectangle by numbers")
    to("x", "spinbutton")
    for value in ("10", "20", "50", "60"):
        keyboard.press("Control+a")
        keyboard.type(value)
        keyboard.press("Tab")
    keyboard.press("Enter")
    mask = page.bitmap()
    assert (mask[20:80, 10:60] == 255).all() and mask.sum() == 60 * 50 * 255
    to("Up Region 2")
    keyboard.press("Enter")
    assert page.get("page.painting.state.regions.map((each) => each.name)") == ["Region 2", "A star"]
    # "Up" is of no use now: the focus is on the region's name
    assert page.page.evaluate("() => document.activeElement.innerText").strip().endswith("Region 2")
    keyboard.press("Control+Enter")
    page.says("Drawn in")


def test_the_focus_stays_where_it_is_while_the_list_changes(page):
    button = page.page.get_by_role("button", name="On: A star")
    button.focus()
    for pressed in ("false", "true"):
        page.page.keyboard.press("Enter")
        assert page.page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "On: A star"
        assert button.get_attribute("aria-pressed") == pressed


def test_a_server_with_keys_is_asked_with_one(chromium, tmp_path):
    with (
        running(
            tmp_path,
            on=embedded(),
            access=Access(keys=("open-sesame",)),
            headers={"Authorization": "Bearer open-sesame"},
        ) as client,
        tab(chromium, client.port, expected=["401"]) as page,
    ):
        page.page.fill("#unlock-key", "wrong")
        page.page.keyboard.press("Enter")
        page.page.locator("#unlock-said", has_text="does not know that key").wait_for()
        page.page.fill("#unlock-key", "open-sesame")
        page.page.keyboard.press("Enter")
        page.ready()
        page.page.reload()
        page.page.wait_for_selector("#regions li")
        assert not page.page.locator("#unlock").is_visible()


@pytest.mark.parametrize("size", [(1024, 700), (820, 1180), (390, 800)])
def test_nothing_is_cut_off(chromium, server, size):
    with tab(chromium, server.port, viewport=dict(zip(("width", "height"), size, strict=True))) as page:
        page.ready()
        wide = page.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]
        box = page.page.locator("#canvas").bounding_box()
        assert box["width"] > 250 and box["height"] > 250
        for name in ("#draw", "#add", "#undo", "#r-words"):
            page.page.locator(name).scroll_into_view_if_needed()
            assert page.page.locator(name).is_visible()


def test_motion_is_reduced_where_that_is_wanted(chromium, server):
    with tab(chromium, server.port, reduced_motion="reduce") as page:
        page.ready()
        style = "(element) => getComputedStyle(element).transitionDuration"
        assert page.page.locator("#live").evaluate(style) == "0s"


def test_what_stands_in_a_row_is_in_line_and_the_round_button_is_round(chromium, server):
    with tab(chromium, server.port, viewport={"width": 820, "height": 1180}, has_touch=True) as page:
        page.page.click("#cancel")
        page.unfold("Settings")
        box = "(id) => document.getElementById(id).getBoundingClientRect()"
        help = page.page.evaluate(box, "help")
        assert help["width"] == help["height"]
        label = "(id) => document.getElementById(id).closest('label').getBoundingClientRect().top"
        tops = [page.page.evaluate(label, id) for id in ("draft-size", "draft-steps")]
        assert tops[0] == tops[1]
