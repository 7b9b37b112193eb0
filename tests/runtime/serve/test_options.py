"""runtime.serve.options: what its command line says of who may ask."""

import pytest
from starlette.datastructures import Headers

from runtime.errors import InputError
from runtime.serve.options import access_of, make_parser


def test_names_and_sites_are_taken_as_browsers_say_them(monkeypatch):
    monkeypatch.setenv("LOCALCONTROL_API_KEYS", "one")
    given = ["--host", "0.0.0.0", "--allow-host", "Pictures.Example"]
    given += ["--allow-origin", "https://Shop.example/"]
    access = access_of(make_parser().parse_args(given))
    headers = {"host": "pictures.example", "origin": "https://shop.example", "authorization": "Bearer one"}
    assert access.check("/v1/generate", Headers(headers))


@pytest.mark.parametrize(
    ("option", "given", "taken"),
    [
        ("--allow-host", "Pictures.example:8000", "pictures.example"),
        ("--allow-host", "[::2]:8000", "::2"),
        ("--allow-host", "::2", "::2"),
        ("--allow-host", "münchen.example", "xn--mnchen-3ya.example"),
        ("--allow-origin", "https://shop.example:443", "https://shop.example"),
        ("--allow-origin", "http://shop.example:080", "http://shop.example"),
        ("--allow-origin", "https://shop.example:", "https://shop.example"),
        ("--allow-origin", "https://MÜNCHEN.example:8443/", "https://xn--mnchen-3ya.example:8443"),
        ("--allow-origin", "http://[::1]:3000", "http://[::1]:3000"),
        ("--allow-origin", "chrome-extension://abc", "chrome-extension://abc"),
        ("--allow-origin", "http://shop.example:8080/", "http://shop.example:8080"),
        ("--allow-origin", "null", "null"),
    ],
)
def test_ports_that_are_never_compared_are_left_out(option, given, taken):
    access = access_of(make_parser().parse_args([option, given]))
    assert (access.origins if option == "--allow-origin" else access.hosts)[-1] == taken


@pytest.mark.parametrize("given", ["*", "https://shop.example", "*.shop.example", ":8000", "ü..example"])
def test_a_host_that_is_no_name_is_refused(given):
    with pytest.raises(InputError, match="^--allow-host .*expected a name"):
        access_of(make_parser().parse_args(["--allow-host", given]))


@pytest.mark.parametrize(
    "given",
    ["*", "shop.example", "https://shop.example/page", "https://*", "http://a:b", "https://me@shop.example"],
)
def test_an_origin_that_no_browser_says_is_refused(given):
    with pytest.raises(InputError, match="^--allow-origin .*expected a site"):
        access_of(make_parser().parse_args(["--allow-origin", given]))
