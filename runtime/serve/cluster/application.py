"""The server as an application of Ray Serve: an ingress, which is the same app, and replicas that scale by their load.

`python -m runtime.serve --ray` runs it; a Serve config file names `runtime.serve.cluster.application:build`.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import threading
from contextlib import ExitStack

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from runtime.cli.cluster import connected, replicas, share
from runtime.cli.command import heartbeat, say
from runtime.errors import InputError
from runtime.serve.__main__ import access_of, data_folder, limits_of, make_parser
from runtime.serve.app import make_app
from runtime.serve.cluster.remote import RemoteEngine
from runtime.serve.cluster.replica import Replica
from runtime.serve.engine import ROWS
from runtime.serve.guard import Access
from runtime.serve.limits import Limits
from runtime.serve.service import Service
from runtime.serve.wire import listening

NAME = "localcontrol"
HEAD = "node:__internal_head__"  # a resource that Ray gives the head node
UPSCALE = 5.0  # seconds of load before another replica is started


@serve.ingress()
class Ingress:
    """Takes requests, keeps files and jobs, and has replicas draw."""

    async def __init__(
        self, options: argparse.Namespace, limits: Limits, access: Access, engine: DeploymentHandle
    ):
        served = await engine.describe.remote()
        self._held = ExitStack()  # the folder, for as long as the process lives
        folder = self._held.enter_context(data_folder(options.data))
        service = Service(served, folder, limits, lambda hearer: RemoteEngine(engine, limits, hearer))
        self._made = make_app(service, access, options.log_prompts)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._made


def build(arguments: dict[str, str]) -> Application:
    """Return the application for a Serve config file, whose `args` have `options`: those of the command line.

    Raises InputError where these do not say on what the model runs: the nodes with GPUs may come later.
    """
    unknown = arguments.keys() - {"options"}
    if unknown:
        raise InputError(f"args {', '.join(sorted(unknown))}: expected options, as a command line has them")
    options = make_parser().parse_args(shlex.split(arguments.get("options", "")))
    if options.device is None:
        raise InputError("args options: no --device; expected cuda, or cpu")
    return application(options)


def application(options: argparse.Namespace) -> Application:
    """Return the application that the options ask for. Raises InputError."""
    limits, (taken, gpus) = limits_of(options), share(options)
    least, most = replicas(options, gpus)
    rows = limits.rows or ROWS
    engine = serve.deployment(Replica, name="engine").options(
        ray_actor_options=taken,
        max_ongoing_requests=2 * rows,
        max_queued_requests=limits.queue,
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "initial_replicas": least,
            "target_ongoing_requests": max(1, rows // 2),  # two rows each, with guidance
            "upscale_delay_s": UPSCALE,
        },
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=limits.running_seconds + 10,  # longer than any request runs
    )
    ingress = serve.deployment(Ingress, name="ingress").options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},  # where files and jobs are
        max_ongoing_requests=2 * limits.connections,
        graceful_shutdown_timeout_s=limits.drain_seconds,
    )
    return ingress.bind(options, limits, access_of(options), engine.bind(options, limits))


def run(options: argparse.Namespace) -> int:
    """Serve on the cluster until a signal."""
    listening(options.host, options.port).close()  # a port of another is said before a model is loaded
    with connected(options):
        made = application(options)
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port})
        try:
            with heartbeat("starting: the ingress, and the first replica with its model"):
                serve.run(made, name=NAME, route_prefix="/")
            host = f"[{options.host}]" if ":" in options.host else options.host
            say(f"serving  http://{host}:{options.port} on Ray")
            wait_for_signal()
            say("ending: what runs is finished, nothing new is taken")
        finally:
            serve.shutdown()
    return 0


def wait_for_signal() -> None:
    """Wait for SIGTERM or Ctrl-C: an application that is not shut down goes on without its command."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1.0):  # not for ever, so that a signal is heard on every system
        pass
