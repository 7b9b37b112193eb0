"""Shared set-up: no network, the same seeds and threads everywhere, `gpu` tests skipped without CUDA."""

import os

# huggingface_hub reads this once, when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# What somebody measured on this machine is nobody's expectation.
os.environ["LOCALCONTROL_CACHE"] = os.devnull

import random

import hypothesis
import numpy as np
import pytest
import torch

# Triton reads this when it is first imported: without a GPU its interpreter runs the kernels, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How sums are split over threads changes their last bits: two, as on the smallest machine that runs these.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# The same examples in every run; the first call of an op can be slow, which is no failure.
hypothesis.settings.register_profile("localcontrol", derandomize=True, deadline=None)
hypothesis.settings.load_profile("localcontrol")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
