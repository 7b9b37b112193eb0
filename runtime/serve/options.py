"""The command line of `runtime.serve`: its options, and what they say of limits, access and the folder."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

from runtime.cli.cluster import add_ray
from runtime.cli.command import Parser
from runtime.cli.options import add_model, add_speed
from runtime.errors import InputError
from runtime.machine.cache import cache_folder
from runtime.machine.files import expand
from runtime.machine.lock import owned
from runtime.serve.limits import Limits

EXAMPLES = """\
examples:
  python -m runtime.serve
  curl -H 'Content-Type: application/json' -d '{"prompt": "a red star on sand"}' \\
      http://127.0.0.1:8000/v1/generate -o star.png
  LOCALCONTROL_API_KEYS=secret python -m runtime.serve --host 0.0.0.0 --model sdxl.safetensors
  python -m runtime.serve --ray auto --replicas 1:8 --model sdxl.safetensors
"""
KEYS = "LOCALCONTROL_API_KEYS"


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m runtime.serve",
        usage="%(prog)s [--model MODEL] [--host ADDRESS] [--port NUMBER] [options]",
        description="Draw for clients over HTTP; their requests share the model's steps. /docs lists the routes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_network(parser.add_argument_group("the network"))
    add_model(parser.add_argument_group("the model"))
    add_speed(parser.add_argument_group("speed and memory"))
    add_ray(parser.add_argument_group("several machines"))
    group = parser.add_argument_group("limits")
    for each in fields(Limits):
        about, kind = f"{each.metadata['help']} (default {each.default:g})", type(each.default)
        group.add_argument(
            f"--{each.name.replace('_', '-')}", type=kind, default=each.default, metavar="N", help=about
        )
    return parser


def _add_network(group) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help=f"another than this machine needs {KEYS}"
    )
    group.add_argument(
        "--port", type=int, default=8000, metavar="NUMBER", help="0: any that is free (default 8000)"
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that the server is called by",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="another site whose pages may use it",
    )
    group.add_argument(
        "--data", metavar="FOLDER", help="of files and jobs (default: serve in LOCALCONTROL_CACHE)"
    )
    group.add_argument("--log-prompts", action="store_true", help="have the log say them")


def limits_of(options: argparse.Namespace) -> Limits:
    """Return what is taken at most. Raises InputError."""
    return Limits(**{each.name: getattr(options, each.name) for each in fields(Limits)})


def access_of(options: argparse.Namespace):
    """Return who may ask. Raises InputError for an address of the network without a key."""
    from runtime.serve.web.guard import LOOPBACK, Access, name_of

    keys = [key for key in os.environ.get(KEYS, "").replace(",", " ").split() if key]
    if not _is_loopback(options.host) and not keys:
        raise InputError(
            f"--host {options.host}: others can reach it; expected keys in {KEYS}, or --host 127.0.0.1"
        )
    hosts = [_host(name, name_of) for name in options.allow_host]
    origins = [_site(site) for site in options.allow_origin]
    if _is_loopback(options.host):
        hosts = list(dict.fromkeys([*LOOPBACK, options.host, *hosts]))
    return Access(keys, hosts, origins)


def _host(given: str, name_of: Callable[[str], str]) -> str:
    """Return a name as it is compared. Raises InputError for what no request could be under."""
    name = given.lower() if _is_address(given) else _spelled(name_of(given))
    if not name or set(given) & set("*/@?# "):
        raise InputError(f"--allow-host {given}: expected a name, such as pictures.example.org")
    return name


def _site(given: str) -> str:
    """Return a site as browsers say it. Raises InputError for what no browser says."""
    site = given.rstrip("/").lower()
    try:
        parts = urlsplit(site)
        host, port = _spelled(parts.hostname or ""), parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    if site == "null":  # of pages that are files
        return site
    if not host or site != f"{parts.scheme}://{parts.netloc}" or set(site) & set("*@ "):
        raise InputError(f"--allow-origin {given}: expected a site, such as https://shop.example.org")
    usual = port in (None, {"http": 80, "https": 443}.get(parts.scheme))
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{'' if usual else f':{port}'}"


def _spelled(name: str) -> str:
    """Return a name as requests spell it, who have other letters for those beyond ASCII; "" where it is no name."""
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return ""


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def data_folder(given: str | None) -> AbstractContextManager[Path]:
    """Return a context with the folder of files and jobs, which no other process uses. Raises InputError."""
    return owned(expand(given, "--data") if given else cache_folder() / "serve", "--data")
