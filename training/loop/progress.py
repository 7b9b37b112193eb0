"""The bar and the logs of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

LOG_STEPS = 10  # between updates: the same steps in all processes, which share their losses


class Progress:
    """Loss terms, samples a second and the time left; means since the last update go to the accelerator's trackers."""

    def __init__(self, accelerator: Accelerator, step: int, steps: int, samples: int):
        """step: the first one's number. samples: of a step, over all processes."""
        self.accelerator, self.last_step, self.samples = accelerator, steps, samples
        shown = accelerator.is_main_process
        self.bar = tqdm(total=steps, initial=step, desc="training", unit=" steps", disable=not shown)
        self._start()

    def update(self, step: int, terms: Mapping[str, Tensor], lr: float) -> None:
        """After a step: `step` steps are done. Every LOG_STEPS it reads the losses, which waits for the device."""
        self.bar.update()
        self.steps += 1
        self.total = {name: self.total.get(name, 0) + value for name, value in terms.items()}
        if step % LOG_STEPS and step != self.last_step:
            return
        means = self.accelerator.reduce(self.total, "mean")
        losses = {name: float(value) / self.steps for name, value in means.items()}
        rate = self.steps * self.samples / (time.monotonic() - self.since)
        logged = {f"loss/{name}": value for name, value in losses.items()}
        self.accelerator.log(logged | {"lr": lr, "samples_per_second": rate}, step=step)
        shown = {name: f"{value:.4f}" for name, value in losses.items()}
        self.bar.set_postfix(shown | {"samples/s": f"{rate:.1f}"}, refresh=False)
        self._start()

    def close(self) -> None:
        self.bar.close()

    def _start(self) -> None:
        self.steps, self.total, self.since = 0, {}, time.monotonic()
