"""One browser and one server of the embedded model for a module; a tab for a test."""

import pytest

from tests.support.browser import browser, embedded, require_chromium, tab
from tests.support.server import running


@pytest.fixture(scope="package", autouse=True)
def needed():
    require_chromium()


@pytest.fixture(scope="module")
def chromium(needed):
    with browser() as made:
        yield made


@pytest.fixture(scope="module")
def server(needed, tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve"), on=embedded()) as client:
        yield client


@pytest.fixture
def page(chromium, server):
    """The page at its first visit, its example's drawing cancelled."""
    with tab(chromium, server.port) as made:
        made.page.click("#cancel")
        yield made


@pytest.fixture
def drawn(chromium, server):
    """The page at its first visit, its example drawn."""
    with tab(chromium, server.port) as made:
        made.ready()
        yield made
