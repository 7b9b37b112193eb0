"""What the command lines that can run on Ray share: their options, the cluster, and what a replica takes of it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.cli.command import say
from runtime.errors import InputError, first_line

HERE = "local"  # a cluster of this machine alone, that ends with the command


def add_ray(group) -> None:
    group.add_argument(
        "--ray",
        nargs="?",
        const=HERE,
        metavar="ADDRESS",
        help="draw on a Ray cluster: 'auto' for the one that this machine belongs to (default: this machine alone)",
    )
    group.add_argument(
        "--replicas", metavar="MIN:MAX", help="of the model (default: one, up to one for each GPU)"
    )
    group.add_argument(
        "--replica-resource",
        metavar="NAME",
        help="put a replica only where ray start --resources='{\"NAME\": 1}' says so",
    )


def check_ray(options: argparse.Namespace) -> None:
    """Raise InputError where options are Ray's alone, or there is no Ray."""
    if options.ray is None:
        for name in ("replicas", "replica_resource"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}: it is of --ray; expected both, or neither")
        return
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--ray needs the package ray; install it: pip install 'localcontrol[ray]'"
        ) from error
    replicas(options)
    if re.fullmatch(r"cuda:\d+", options.device or ""):
        raise InputError(f"--device {options.device}: Ray gives each replica a GPU of its own; expected cuda")


@contextmanager
def connected(options: argparse.Namespace) -> Iterator[None]:
    """Be a driver of the cluster. Raises InputError where there is no such cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes as an exception
    import ray

    # A cluster of this machine is nobody else's: who reaches its ports could run anything.
    own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if options.ray == HERE else {}
    try:
        ray.init(options.ray, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"--ray {options.ray}: {first_line(error)}; expected a cluster's address") from error
    try:
        yield
    finally:
        ray.shutdown()


def failure(text: str) -> InputError:
    """Return what went wrong in a replica, from Ray's text of it: our own line where there is one."""
    own = re.findall(r"InputError: (.+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return InputError(
        own[-1] if own else f"--ray: {lines[-1] if lines else 'a replica failed'}; see Ray's logs"
    )


def replicas(options: argparse.Namespace, gpus: float = 1) -> tuple[int, int]:
    """Return how many replicas there are at least and at most. Raises InputError."""
    if options.replicas is None:
        return 1, max(1, int(gpus))
    found = re.fullmatch(r"(\d+)(?::(\d+))?", options.replicas)
    least, most = (int(each or found[1]) for each in found.groups()) if found else (0, 0)
    if not 1 <= least <= most:
        raise InputError(f"--replicas {options.replicas}: expected a number, or MIN:MAX, from 1 on")
    return least, most


def share(options: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Return what a replica takes of the cluster, as an actor's options, and how many GPUs there are for them.

    A GPU with --device cuda, or where none is said and there are some; else a core. Raises InputError where a cluster
    of this machine has too little; says so where nodes may come.
    """
    import ray

    found = ray.cluster_resources()
    gpus = found.get("GPU", 0.0)
    on_gpu = options.device == "cuda" if options.device else gpus > 0
    taken: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    if options.replica_resource:
        taken["resources"] = {options.replica_resource: 1}
    least = replicas(options, gpus)[0]
    for name in ("GPU" if on_gpu else "CPU", *taken.get("resources", ())):
        if found.get(name, 0) < least:
            text = f"{least} replicas take {least} of {name!r}, and the cluster has {found.get(name, 0):g}"
            if options.ray == HERE:
                raise InputError(f"--ray: {text}; expected fewer --replicas")
            say(f"warning: {text}: they wait for nodes that have more")
    return taken, gpus if on_gpu else 0
