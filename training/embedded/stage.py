"""One resumable training stage of the embedded model: a loop that can be stopped at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from runtime.machine.arithmetic import half_precision
from runtime.machine.files import replacing
from training.loop.optimize import Average, schedule
from training.loop.signals import Stop

EMA_DECAY = 0.999
WARM_UP_STEPS = 200
SAVE_EVERY_SECONDS = 60.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def autocast() -> Iterator[None]:
    """Do matrix work in bf16 where the machine is quick in it, and on a CPU attention as plain matrix products.

    The backward of PyTorch's fused attention took 41 % of a training step of the UNet (torch 2.13); with the products
    the whole step is 1.4 times as fast.
    """
    attention = [SDPBackend.MATH] if DEVICE.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    dtype = half_precision(DEVICE)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32), sdpa_kernel(attention):
        yield


class Stage:
    """Trains ``model`` for ``steps`` steps and keeps its whole state in ``folder/<name>.pt``.

    Everything random in a step follows from (``seed``, step), so a run that was stopped and resumed takes the same
    steps as one that was not. The learning rate warms up, then falls to zero along a cosine.
    """

    def __init__(self, name: str, model: nn.Module, folder: Path, *, steps: int, lr: float, seed: int = 0):
        self.name, self.model, self.steps, self.lr, self.seed = name, model, steps, lr, seed
        self.path = folder / f"{name}.pt"
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.average = Average(self.params, EMA_DECAY)
        self.step, self.seconds, self.stop = 0, 0.0, Stop()
        if self.path.exists():
            self._load()

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def run(self, loss_of: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """Take the steps that are left; ``loss_of(step)`` gives named scalar losses, of which the sum is minimised."""
        last = saved = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        with self.stop.listening(), closing(bar):
            while not self.done and not self.stop.signal:
                losses = self._take_step(loss_of)
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                if self.step % 20 == 0:
                    bar.set_postfix({k: f"{v.item():.4f}" for k, v in losses.items()}, refresh=False)
                bar.update()
                if now - saved > SAVE_EVERY_SECONDS:
                    self.save()
                    saved = now
        self.save()
        if not self.done:
            raise SystemExit(f"{self.name}: stopped at step {self.step} of {self.steps}; run again to go on")

    def use_average(self) -> None:
        """Put the averaged weights into the model."""
        with torch.no_grad():
            for p, a in zip(self.params, self.average.values, strict=True):
                p.copy_(a)

    def _take_step(self, loss_of) -> dict[str, torch.Tensor]:
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule(self.step, self.steps, WARM_UP_STEPS, "cosine")
        losses = loss_of(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.step)
        return losses

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "params": [p.detach() for p in self.params],
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            torch.save(state, partial)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        self.step, self.seconds = state["step"], state["seconds"]
        with torch.no_grad():
            for p, a, saved, average in zip(
                self.params, self.average.values, state["params"], state["average"], strict=True
            ):
                p.copy_(saved)
                a.copy_(average)
        self.optimizer.load_state_dict(state["optimizer"])
