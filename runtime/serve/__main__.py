"""python -m runtime.serve [--model MODEL ...] [--port 8000]

Draw for clients over HTTP: requests share the model's steps. --help lists the options.
"""

from __future__ import annotations

# isort: off
import runtime.cli.interrupt  # noqa: F401 -- before the seconds that the other imports take
# isort: on

import argparse
import os
import socket
import sys
from contextlib import ExitStack

from runtime.cli.cluster import check_ray
from runtime.cli.command import exit_code, need, quick_imports, say
from runtime.cli.load import load
from runtime.serve.limits import Limits
from runtime.serve.log import log_lines
from runtime.serve.options import access_of, data_folder, limits_of, make_parser

# Of the extra "serve". All are asked for before the first is used, and before a model is loaded.
PACKAGES = ("anyio", "fastapi", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 after SIGTERM or Ctrl-C; 2 for bad input (one line on stderr)."""
    options = make_parser().parse_args(arguments)
    return exit_code(lambda: serve(options))


def serve(options: argparse.Namespace) -> int:
    """Check, load, listen until a signal."""
    need("serve", "serve", PACKAGES)
    limits, access = limits_of(options), access_of(options)
    check_ray(options)
    if options.ray:
        with quick_imports():
            from runtime.serve.cluster.application import run as run_on_ray
        return run_on_ray(options)
    from runtime.serve.web.wire import listening

    with ExitStack() as opened:
        listener = opened.enter_context(listening(options.host, options.port))
        folder = opened.enter_context(data_folder(options.data))
        with quick_imports():
            from runtime.serve.identity import model_hash
            from runtime.serve.service import Service
            from runtime.serve.web.app import make_app
        service = Service.of(load(options), folder, options, limits, model_hash(options))
        app = make_app(service, access, options.log_prompts)
        return run(app, listener, service, limits)


def run(app, listener: socket.socket, service, limits: Limits) -> int:
    """Serve until a signal: then take no more work, let what runs end, and stop."""
    from runtime.serve.web.wire import Server, config_of

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
