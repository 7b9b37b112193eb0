"""python -m tests.support.short_of_memory [options of training.train_adapter]

Trains as the command does, on a machine where the second process runs out of memory once, in its fourth batch.
"""

import os
import sys

import torch

from training import train_adapter
from training.loop.step import LossOf

FAILS = 4


def main() -> int:
    right, calls = LossOf.terms, []

    def terms(self, features, batch):
        calls.append(0)
        if os.environ["RANK"] == "1" and len(calls) == FAILS:
            raise torch.OutOfMemoryError("no memory")
        return right(self, features, batch)

    LossOf.terms = terms
    return train_adapter.main()


if __name__ == "__main__":
    sys.exit(main())
