"""runtime.serve.web.docs: the page of the routes."""

from html.parser import HTMLParser

import pytest

from runtime.serve.options import make_parser
from runtime.serve.service import Service
from runtime.serve.web import docs
from runtime.serve.web.app import document, make_app
from tests.support.server import pipe


@pytest.fixture
def page(tmp_path):
    service = Service.of(pipe(), tmp_path, make_parser().parse_args([]))
    return docs.page(document(make_app(service)))


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data):
        self.text.append(data)


def test_every_route_and_field_is_there_and_no_other_host_is_asked(page):
    parsed = Links()
    parsed.feed(page)
    text = "".join(parsed.text)
    for route in ("/v1/generate", "/v1/jobs/{id}/events", "/v1/files", "/v1/images/edits", "/readyz"):
        assert route in text
    for field in ("guidance_range", "mask_condition", "deterministic", "uncond_scale"):
        assert field in text
    assert all(link.startswith("/") for link in parsed.found)
