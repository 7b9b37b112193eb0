"""A Ray cluster on this machine: a head, and nodes that have the resource `engine`, for one replica each."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
STORE = 100 * 2**20  # bytes of each node's object store
ENGINE = "engine"
PLACED = ("--replicas", "2", "--replica-resource", ENGINE)


class Nodes:
    """The cluster, whose engine nodes come and go."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster, self.engines = Cluster(initialize_head=True, head_node_args=head), []

    def add(self):
        node = self.cluster.add_node(num_cpus=1, resources={ENGINE: 1}, object_store_memory=STORE)
        self.engines.append(node)

    def remove(self):
        """Take a node away, as a power cut does."""
        self.cluster.remove_node(self.engines.pop(0), allow_graceful=False)


@contextmanager
def nodes(engines=2):
    before = os.environ["OMP_NUM_THREADS"]
    os.environ["OMP_NUM_THREADS"] = "1"  # of what the nodes start
    made = Nodes()
    try:
        for _ in range(engines):
            made.add()
        yield made
    finally:
        made.cluster.shutdown()
        os.environ["OMP_NUM_THREADS"] = before


def command(module, *arguments, stderr):
    """One of our commands in a process of its own, a thread each as a replica has."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(call, cwd=ROOT, stderr=stderr, text=True, env=environment)


def kill_worker(name):
    """Kill a Ray worker by what it does. Returns whether there was one."""
    for process in psutil.process_iter(["cmdline"]):
        if name in " ".join(process.info["cmdline"] or []) and process.info["cmdline"][0].startswith("ray::"):
            process.send_signal(signal.SIGKILL)
            return True
    return False
