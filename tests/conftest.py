"""Shared set-up: no network, the same seeds and threads everywhere, `gpu` tests skipped without CUDA."""

import os

# huggingface_hub reads this once, when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# What somebody measured on this machine is nobody's expectation.
os.environ["LOCALCONTROL_CACHE"] = os.devnull

# Beside other workers a thread each: two threads that wait for a core take 10 times as long for a step of the UNet.
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ["OMP_NUM_THREADS"] = "1"  # in place of what the process inherited from the one that started it
os.environ.setdefault("OMP_NUM_THREADS", "2")

import random
import re
from functools import cache

import hypothesis
import numpy as np
import psutil
import pytest
import torch

# Triton reads this when it is first imported: without a GPU its interpreter runs the kernels, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The same examples in every run; the first call of an op can be slow, which is no failure.
hypothesis.settings.register_profile("localcontrol", derandomize=True, deadline=None)
hypothesis.settings.load_profile("localcontrol")

WORKER = 6 * 2**30  # bytes of memory: the most that one was seen to take, building an engine


def pytest_xdist_auto_num_workers(config):
    """Return how many workers `-n auto` means: one a core where the memory allows, at most 8; one beside a GPU."""
    if torch.cuda.is_available():
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // WORKER, 8))


def pytest_xdist_make_scheduler(config, log):
    """Have one worker run a file, for its fixtures; and all that shares the exported graphs, which are made once."""
    if torch.cuda.is_available():
        return None  # the default: tests there wait for Triton's compiler, and share no exported graphs

    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            if "cluster" in file:
                return "cluster"  # Ray's processes, one cluster at a time
            return "engines" if shares_graphs(config.rootpath / file) else file

    return ByFile(config, log)


@cache
def shares_graphs(file):
    """Return whether a test file uses the graphs of tests/support/engines.py."""
    return re.search(r"\bengines\.(folder|copy_folder|graph)\(", file.read_text("utf-8")) is not None


def pytest_configure():
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared as float32


def pytest_collection_modifyitems(items):
    for item in items:
        if torch.cuda.is_available():
            if "kernels" in item.path.parts:  # what is interpreted elsewhere runs on the GPU
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):  # "gpu" in its keywords would also be a folder of that name
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
