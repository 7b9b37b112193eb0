"""One resumable training stage of the embedded model: a loop that can be stopped at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from runtime.machine.arithmetic import half_precision
from runtime.machine.files import replacing
from training.loop.learner import Learned, Learner
from training.loop.optimize import schedule
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
    """Trains ``model`` for ``steps`` steps and keeps its whole state in ``folder/<name>.safetensors``.

    Everything random in a step follows from (``seed``, step), so a run that was stopped and resumed takes the same
    steps as one that was not. The learning rate warms up, then falls to zero along a cosine.
    """

    def __init__(self, name: str, model: nn.Module, folder: Path, *, steps: int, lr: float, seed: int = 0):
        self.name, self.model, self.steps, self.lr, self.seed = name, model, steps, lr, seed
        self.path = folder / f"{name}.safetensors"
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.learner = Learner(parameters, optimizer, EMA_DECAY)
        self.seconds, self.stop = 0.0, Stop()
        if self.path.exists():
            self._load()

    @property
    def step(self) -> int:
        """Return how many steps were taken."""
        return self.learner.step

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
            for p, a in zip(self.learner.parameters, self.learner.final, strict=True):
                p.copy_(a)

    def _take_step(self, loss_of) -> dict[str, torch.Tensor]:
        torch.manual_seed(self.seed * 1_000_003 + self.step)

        def backward() -> dict[str, torch.Tensor]:
            losses = loss_of(self.step)
            sum(losses.values()).backward()
            return losses

        rate = self.lr * schedule(self.step, self.steps, WARM_UP_STEPS, "cosine")
        return self.learner.take_step(rate, backward, self._clip)

    def _clip(self) -> bool:
        nn.utils.clip_grad_norm_(self.learner.parameters, 1.0)
        return True

    def save(self) -> None:
        """Write the state, whole or not at all."""
        groups = self.learner.state()._asdict()
        tensors = {f"{group} {name}": t for group, named in groups.items() for name, t in named.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            save_file(tensors, partial, metadata={"step": str(self.step), "seconds": str(self.seconds)})

    def _load(self) -> None:
        groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in Learned._fields}
        with safe_open(self.path, "pt") as file:
            about = file.metadata()
            for key in file.keys():  # noqa: SIM118
                group, _, name = key.partition(" ")
                groups[group][name] = file.get_tensor(key)
        self.seconds = float(about["seconds"])
        self.learner.restore(int(about["step"]), Learned(**groups))
