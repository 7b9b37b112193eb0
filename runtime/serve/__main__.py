"""python -m runtime.serve [--model MODEL ...] [--port 8000]

Draw for clients over HTTP: requests share the model's steps. --help lists the options.
"""

from __future__ import annotations

# isort: off
import runtime.cli.interrupt  # noqa: F401 -- before the seconds that the other imports take
# isort: on

import argparse
import ipaddress
import json
import logging
import os
import socket
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields
from pathlib import Path

from runtime.cli.cluster import add_ray, check_ray
from runtime.cli.command import Parser, exit_code, heartbeat, quick_imports, say
from runtime.cli.options import add_model, add_speed
from runtime.errors import InputError
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


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 after SIGTERM or Ctrl-C; 2 for bad input (one line on stderr)."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: serve(options))


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


def serve(options: argparse.Namespace) -> int:
    """Check, load, listen until a signal."""
    limits, access = limits_of(options), access_of(options)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"serve needs the package {error.name}; install it: pip install 'localcontrol[serve]'"
        ) from error
    check_ray(options)
    if options.ray:
        with quick_imports():
            from runtime.serve.cluster.application import run as run_on_ray
        return run_on_ray(options)
    from runtime.serve.wire import listening

    with ExitStack() as opened:
        listener = opened.enter_context(listening(options.host, options.port))
        folder = opened.enter_context(data_folder(options.data))
        with quick_imports():
            from runtime.serve.app import make_app
            from runtime.serve.identity import model_hash
            from runtime.serve.service import Service
        service = Service.of(load(options), folder, options, limits, model_hash(options))
        app = make_app(service, access, options.log_prompts)
        return run(app, listener, service, limits)


def limits_of(options: argparse.Namespace) -> Limits:
    """Return what is taken at most. Raises InputError."""
    return Limits(**{each.name: getattr(options, each.name) for each in fields(Limits)})


def access_of(options: argparse.Namespace):
    """Return who may ask. Raises InputError for an address of the network without a key."""
    from runtime.serve.guard import LOOPBACK, Access

    keys = [key for key in os.environ.get(KEYS, "").replace(",", " ").split() if key]
    if not _is_loopback(options.host) and not keys:
        raise InputError(
            f"--host {options.host}: others can reach it; expected keys in {KEYS}, or --host 127.0.0.1"
        )
    hosts = [name.lower() for name in options.allow_host]
    origins = [site.rstrip("/").lower() for site in options.allow_origin]  # as browsers say them
    if _is_loopback(options.host):
        hosts = list(dict.fromkeys([*LOOPBACK, options.host, *hosts]))
    return Access(keys, hosts, origins)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def data_folder(given: str | None) -> AbstractContextManager[Path]:
    """Return a context with the folder of files and jobs, which no other process uses. Raises InputError."""
    from runtime.fastest import cache_folder
    from runtime.machine.files import expand
    from runtime.machine.lock import owned

    return owned(expand(given, "--data") if given else cache_folder() / "serve", "--data")


def load(options: argparse.Namespace):
    """Return the pipeline that the options ask for."""
    from runtime.generate import load as load_pipeline

    start = time.perf_counter()
    pipe = load_pipeline(options)
    if options.compile or options.cuda_graph:
        pipe.compile(compiler="inductor" if options.compile else None, cuda_graph=options.cuda_graph)
        with heartbeat("compiling: minutes the first time, later from the cache on disk"):
            pipe.warm_up()
    say(f"model    {time.perf_counter() - start:6.2f} s")
    return pipe


class Lines(logging.Formatter):
    """Every record as a line of JSON; the requests' are such already."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "runtime.serve.requests":
            return record.getMessage()
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_lines() -> None:
    """Have this process's log be lines of JSON on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    logging.getLogger("python_multipart").setLevel(
        logging.CRITICAL
    )  # what is wrong with a form, the client is told


def run(app, listener: socket.socket, service, limits: Limits) -> int:
    """Serve until a signal: then take no more work, let what runs end, and stop."""
    from runtime.serve.wire import Server, config_of

    log_lines()
    host, port = listener.getsockname()[:2]
    say(f"serving  http://{f'[{host}]' if ':' in host else host}:{port}")
    Server(config_of(app, limits), service).run(sockets=[listener])
    if service.engine.alive:  # in a step that goes on: its jobs are interrupted, and nothing waits for it
        say("ended within a step")
        sys.stderr.flush()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
