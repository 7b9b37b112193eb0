"""The server as an application of Ray Serve: an ingress, which is the same app, and replicas that scale by their load.

`python -m runtime.serve --ray` runs it; a Serve config file names `runtime.serve.cluster.application:build`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from runtime.cli.cluster import HERE, connected, failure, replicas, share
from runtime.cli.command import heartbeat, say
from runtime.errors import InputError
from runtime.serve.admission import ROWS
from runtime.serve.cluster.remote import RemoteEngine
from runtime.serve.cluster.replica import Replica
from runtime.serve.limits import Limits
from runtime.serve.log import log_lines
from runtime.serve.options import KEYS, access_of, data_folder, limits_of, make_parser
from runtime.serve.service import Service
from runtime.serve.web.app import make_app
from runtime.serve.web.guard import Access
from runtime.serve.web.wire import listening

NAME = "localcontrol"
HEAD = "node:__internal_head__"  # a resource that Ray gives the head node
UPSCALE = 5.0  # seconds of load before another replica is started


@serve.ingress()
class Ingress:
    """Takes requests, keeps files and jobs, and has replicas draw."""

    async def __init__(
        self, options: argparse.Namespace, limits: Limits, access: Access, engine: DeploymentHandle
    ):
        log_lines()
        served = await engine.describe.remote()
        self._held = ExitStack()  # the folder, for as long as the process lives
        folder = await self._folder(options, limits)
        self.service = Service(served, folder, limits, lambda hearer: RemoteEngine(engine, limits, hearer))
        self._made = make_app(self.service, access, options.log_prompts)

    async def _folder(self, options: argparse.Namespace, limits: Limits) -> Path:
        """Return the folder of files and jobs; an ingress that ends has it still for a while."""
        until = time.monotonic() + limits.drain_seconds
        while True:
            try:
                return self._held.enter_context(data_folder(options.data))
            except InputError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.5)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._made

    async def drain(self) -> None:
        """Take no more, and wait until what runs has ended, jobs too."""
        self.service.engine.drain()
        until = time.monotonic() + self.service.limits.drain_seconds
        while self.service.unfinished and time.monotonic() < until:
            await asyncio.sleep(0.05)


def build(arguments: dict[str, str]) -> Application:
    """Return the application for a Serve config file, whose `args` have `options`: those of the command line.

    Raises InputError where these do not say on what the model runs: the nodes with GPUs may come later.
    """
    unknown = arguments.keys() - {"options"}
    if unknown:
        raise InputError(f"args {', '.join(sorted(unknown))}: expected options, as a command line has them")
    text = arguments.get("options", "")
    try:
        options = make_parser().parse_args(shlex.split(text))
    except SystemExit:  # the parser has said why, on stderr
        raise InputError(
            f"args options {text!r}: not those of python -m runtime.serve; see its --help"
        ) from None
    if options.device is None:
        raise InputError("args options: no --device; expected cuda, or cpu")
    made = application(options)
    if not access_of(options).keys:
        why = "no key, and others can reach the proxy of a cluster; expected one in runtime_env"
        raise InputError(f"{KEYS}: {why}")
    return made


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
    if options.port == 0:
        raise InputError("--port 0: Ray's proxy listens on a port that is said; expected one")
    if options.ray == HERE:
        listening(options.host, options.port).close()  # a port of another is said before a model is loaded
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with connected(options):
        check_alone(options)
        made = application(options)
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port})
        try:
            with heartbeat("starting: the ingress, and the first replica with its model"):
                deploy(made)
            host = f"[{options.host}]" if ":" in options.host else options.host
            say(
                f"serving  http://{host}:{options.port} on {'Ray' if options.ray == HERE else 'the head node'}"
            )
            wait_for_signal()
            say("ending: what runs is finished, nothing new is taken")
            serve.get_app_handle(NAME).drain.remote().result()
        finally:
            serve.delete(NAME)
            if options.ray == HERE:
                serve.shutdown()
    return 0


def check_alone(options: argparse.Namespace) -> None:
    """Raise InputError where the cluster has this application, or a proxy that listens elsewhere."""
    found = serve.status()
    if NAME in found.applications:
        raise InputError(
            f"--ray {options.ray}: it serves {NAME} already; end that first, or use serve deploy"
        )
    if found.proxies:  # what it was started with stays, whatever serve.start is told
        there = _get_global_client().http_config
        if (there.host, there.port) != (options.host, options.port):
            place = f"--host {there.host} --port {there.port}"
            raise InputError(
                f"--port {options.port}: the cluster's proxy listens elsewhere; expected {place}"
            )


def deploy(made: Application) -> None:
    """Deploy the application and wait until it serves. Raises InputError, with the replica's own line."""
    serve.run_many([serve.RunTarget(made, name=NAME)], wait_for_applications_running=False)
    while not is_running():
        time.sleep(0.2)
    _get_global_client().wait_for_proxies_serving()


def is_running() -> bool:
    """Return whether the application runs.

    Raises InputError where it never will: Ray has given up, or a replica has refused what it was given, which Ray
    would have two more replicas refuse, a model's loading time each.
    """
    status = serve.status().applications.get(NAME)
    if status is None:
        raise failure(f"{NAME} was deleted while it was starting")
    said = "\n".join([status.message, *(each.message for each in status.deployments.values())])
    if status.status == ApplicationStatus.DEPLOY_FAILED or "InputError: " in said:
        raise failure(said)
    return status.status == ApplicationStatus.RUNNING


def wait_for_signal() -> None:
    """Wait for SIGTERM or Ctrl-C: an application that is not deleted goes on without its command.

    A second one ends at once.
    """
    ended = threading.Event()

    def note(*_) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    while not ended.wait(1.0):  # not for ever, so that a signal is heard on every system
        pass
