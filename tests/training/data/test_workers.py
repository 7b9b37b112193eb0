"""training.data.workers: processes beside the training, and what they are not to inherit."""

import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from training.data import workers


class Facts(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        blurred = cv2.GaussianBlur(
            np.ones((256, 256), np.float32), (0, 0), 9
        )  # hangs on a forked thread pool
        ignored = [signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGINT, signal.SIGTERM)]
        return {
            "pid": os.getpid(),
            "threads": cv2.getNumThreads(),
            "ignored": all(ignored),
            "sum": float(blurred.sum()),
        }


def as_is(items):
    return items


def test_workers_start_clean_and_leave_signals_to_the_training():
    cv2.GaussianBlur(
        np.ones((2048, 2048, 3), np.float32), (0, 0), 9
    )  # starts OpenCV's threads in this process
    torch.ones(512, 512) @ torch.ones(512, 512)  # and OpenMP's
    (items,) = DataLoader(Facts(), batch_size=2, collate_fn=as_is, **workers.options(1))
    assert all(item["pid"] != os.getpid() for item in items)
    assert [(item["threads"], item["ignored"], round(item["sum"])) for item in items] == [
        (1, True, 256**2)
    ] * 2


def test_no_more_workers_than_processors():
    assert workers.options(10_000)["num_workers"] == len(os.sched_getaffinity(0))


def test_none_is_this_process():
    assert workers.options(0) == {"num_workers": 0}


RUN = """
import time
from torch.utils.data import DataLoader
from tests.training.data.test_workers import Pids, as_is
from training.data import workers

if __name__ == "__main__":
    loader = iter(DataLoader(Pids(), batch_size=1, collate_fn=as_is, **workers.options(1)))
    print(next(loader)[0], flush=True)
    time.sleep(60)
"""


class Pids(Facts):
    def __len__(self):
        return 10_000

    def __getitem__(self, i):
        return os.getpid()


def test_workers_end_with_a_training_that_is_killed(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    call = [sys.executable, tmp_path / "run.py"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, env=environment) as run:
        worker = int(run.stdout.readline())
        os.kill(worker, 0)
        run.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} is still there")
