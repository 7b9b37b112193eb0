"""The training loop: batches in, checkpoints, logs and sheets out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kernels import ops
from runtime.errors import InputError
from runtime.loading.load import Model
from runtime.loading.weights import weights_digest
from training.config import TrainConfig
from training.data.cache import digest
from training.data.held_out import split
from training.data.rows import Plan, Rows, make_loader
from training.data.stores import Entry, Stores
from training.loop import checkpoint
from training.loop.checkpoint import State
from training.loop.controls import condition_channels, trains_controlnet, with_weights
from training.loop.gradients import Gradients, largest, recompute
from training.loop.learner import Learner, whole
from training.loop.optimize import learning_rate, make_optimizer
from training.loop.progress import Progress
from training.loop.signals import Stop
from training.loop.step import LossOf
from training.loop.validate import Validation


class Stopped(Exception):
    """A signal ended the run, after its checkpoint was written."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped at step {step}; --resume auto goes on from there")
        self.number = number


class NotFinite(Exception):
    """A run's last steps were skipped: its adapter is that of the steps before."""


class Trainer:
    """A run: `run` takes the steps that are left and leaves the finished adapter in `config.out`.

    entries: of all samples; the last `validation_samples` of them, in an order of their own, are only drawn.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: Model,
        adapter: nn.Module,
        entries: list[Entry],
        stores: Stores,
    ):
        self.config, self.accelerator, self.model = config, accelerator, model
        self.adapter_config = {k: v for k, v in adapter.config.items() if not k.startswith("_")}
        names = [name for name, _ in adapter.named_parameters()]
        sharded = (
            getattr(accelerator.state, "fsdp_plugin", None) is not None
        )  # FSDP takes contiguous weights only
        layout = torch.contiguous_format if sharded else torch.channels_last
        adapter = adapter.float().to(memory_format=layout).train()
        held_out, training = split(entries, config.validation_samples, accelerator.print)
        vae = model.vae.config.scaling_factor
        # as they are loaded: what trains on them puts them together in other ways
        self.weights = weights_digest(model.unet, model.vae, *model.text_encoders)
        self.loss_of = LossOf(model, config)
        if config.checkpointing == "on":
            recompute(self.loss_of, adapter, config)
        self.rows = Rows(training, stores, config, len(self.loss_of.abar), vae, condition_channels(adapter))
        self.validation = Validation(model, self.rows, held_out, config) if held_out else None
        adapter = accelerator.prepare(adapter)
        parameters = list(adapter.parameters())
        optimizer = accelerator.prepare(make_optimizer(parameters, config))
        self.learner = Learner(dict(zip(names, parameters, strict=True)), optimizer, config.ema)
        self.gradients = Gradients(config, accelerator, self.loss_of, adapter, optimizer)
        world = accelerator.num_processes
        self.samples = config.batch * config.accumulate * world  # of a step
        self.plan = Plan([e.bucket for e in training], self.samples, config.seed)
        depth = filter(None, [stores.conditions.settings.get("model")])  # which sees them otherwise
        self.data = digest(*(f"{e.key} {e.caption}" for e in training), *depth)
        self.bad_steps, self.stop = 0, Stop()

    @property
    def step(self) -> int:
        """Return how many steps were taken."""
        return self.learner.step

    def run(self) -> None:
        """Take the steps that are left, and write the adapter.

        Raises InputError where training cannot go on, Stopped after a signal, NotFinite where the last steps were
        skipped; all leave a checkpoint.
        """
        self._resume()
        batches = iter(self._loader())
        with self.stop.listening(), ops.use_backend(self.config.backend):
            bar = Progress(self.accelerator, self.step, self.config.steps, self.samples)
            while self.step < self.config.steps and not self._asked_to_stop():
                terms = self._take_step(batches)
                bar.update(self.step, terms, self.learner.optimizer.param_groups[0]["lr"])
                done = self.step == self.config.steps
                if self.step % self.config.save_every == 0 or done:
                    self.save()
                every = self.config.validate_every
                if self.validation and every and (self.step % every == 0 or done):
                    self.validate()
            bar.close()
            if self.step < self.config.steps:
                self.save()
                raise Stopped(self.stop.signal, self.step)
        self._finish()
        if self.bad_steps:
            raise NotFinite(
                f"the last {self.bad_steps} of {self.step} steps had no finite gradient and were skipped"
            )

    def _take_step(self, batches: Iterator[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Take one optimizer step, skipped but counted where the gradient is not finite; return the mean terms."""
        rate = learning_rate(self.step, self.config, self.samples)
        parts = list(islice(batches, self.config.accumulate))
        return self.learner.take_step(rate, lambda: self.gradients.of(parts), self._clip)

    def _clip(self) -> bool:
        norm = self.accelerator.clip_grad_norm_(self.learner.parameters, self.config.clip or math.inf)
        finite = self._is_finite(norm)
        return finite or bool(self.accelerator.scaler)  # float16's scaler skips by itself, and then adapts

    def _is_finite(self, norm: Tensor) -> bool:
        """Return whether to take the step; the norm is of all processes' gradients, so that they agree."""
        if bool(torch.isfinite(torch.as_tensor(whole(norm)))):
            self.bad_steps = 0
            return True
        self.bad_steps += 1
        self.accelerator.print(f"step {self.step + 1}: loss or gradient not finite; step skipped")
        if self.bad_steps >= self.config.nan_limit:
            last = checkpoint.newest(self.config.out)
            raise InputError(
                f"{self.bad_steps} steps in a row without a finite gradient, up to step {self.step + 1}; "
                f"last checkpoint: {last[-1] if last else 'none'}; try a lower --lr, or --dtype fp32"
            )
        return False

    def save(self) -> None:
        """Write a checkpoint; all processes take part."""
        state = self._state()
        if self.accelerator.is_main_process:
            checkpoint.save(state, self.config, self.adapter_config, self.config.keep)
        self.accelerator.wait_for_everyone()

    def validate(self) -> None:
        """Draw the sheet and log the LFMSE of the weights that would be saved now."""
        weights = self.learner.named(self.learner.final)
        if self.accelerator.is_main_process:
            adapter = with_weights(self.adapter_config, weights, trains_controlnet(self.config))
            path = Path(self.config.out) / "validation" / f"{self.step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            with self._whole_model():
                errors = self.validation.run(adapter, path)
            self.accelerator.log(errors, step=self.step)
        self.accelerator.wait_for_everyone()

    def offload(self) -> None:
        """Leave the device to the UNet: the text encoders and the VAE are only needed for drawing."""
        for part in (self.model.vae, *self.model.text_encoders):
            part.to("cpu")

    @contextmanager
    def _whole_model(self) -> Iterator[None]:
        for part in (self.model.vae, *self.model.text_encoders):
            part.to(self.accelerator.device)
        yield
        self.offload()

    def _state(self) -> State:
        return State(self.step, self.learner.state(), self.samples, self.data, self.weights)

    def _resume(self) -> None:
        found = checkpoint.find(self.config, self.samples, self.data, self.accelerator.print, self.weights)
        if not found:
            return
        path, state = found
        self.learner.check_fits(state.learned, f"resume {path}")
        self.learner.restore(state.step, state.learned)
        self.accelerator.print(f"resuming at step {self.step} from {path}")

    def _loader(self):
        part, parts = self.accelerator.process_index, self.accelerator.num_processes
        return make_loader(
            self.rows, self.plan, self.step, part, parts, self.accelerator.device.type == "cuda"
        )

    def _finish(self) -> None:
        weights = self.learner.named(self.learner.final)
        if self.accelerator.is_main_process:
            checkpoint.save_result(weights, self.config, self.adapter_config, self.step)
        self.accelerator.wait_for_everyone()

    def _asked_to_stop(self) -> bool:
        """Return whether any process was; all of them stop after the same step."""
        self.stop.signal = largest(self.accelerator, self.stop.signal)
        return self.stop.signal != 0
