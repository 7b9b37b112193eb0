"""runtime.serve.options: what its command line says of who may ask."""

from starlette.datastructures import Headers

from runtime.serve.options import access_of, make_parser


def test_names_and_sites_are_taken_as_browsers_say_them(monkeypatch):
    monkeypatch.setenv("LOCALCONTROL_API_KEYS", "one")
    given = ["--host", "0.0.0.0", "--allow-host", "Pictures.Example"]
    given += ["--allow-origin", "https://Shop.example/"]
    access = access_of(make_parser().parse_args(given))
    headers = {"host": "pictures.example", "origin": "https://shop.example", "authorization": "Bearer one"}
    assert access.check("/v1/generate", Headers(headers))
