"""The denoiser: what the sampling loop calls at every step, whatever runs underneath."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from runtime.control.features import Control
from runtime.engines.base import Binding, Engine
from runtime.errors import InputError
from runtime.model.unet import UNet
from runtime.sampling.deep_cache import DeepCache

# (sample (G*B, C, h, w), index of the step) -> prediction (G*B, C, h, w) float32; with B rows, those of the last B
Step = Callable[[Tensor, int], Tensor]


class TorchDenoiser:
    """SDXL's UNet in PyTorch."""

    def __init__(self, unet: UNet, device: torch.device | None = None):
        """device: where it computes, if its weights are not there all the time."""
        self.unet = unet
        self.device, self.dtype = device or unet.conv_in.weight.device, unet.conv_in.weight.dtype

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def control_channels(self) -> Sequence[int]:
        """Channels of the four feature maps that a control must have."""
        return self.unet.config.control_channels

    def check(self, images: int, guided: bool, height: int, width: int, cache_interval: int = 1) -> None:
        """Takes any size: see `EngineDenoiser.check`."""

    def prepare(
        self,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        control: Control | None,
        repeat: int,
        cache_interval: int = 1,
    ) -> Step:
        """Compute all that is the same at every step; the function returned runs one.

        timesteps: (T,). text (P, S, D), pooled (P, K) and time_ids (P, 6): one row for each prompt of the guidance
        batch, each of which serves `repeat` consecutive rows of the sample. cache_interval: how many steps in a row
        use the same deep features, see `DeepCache`.
        """
        dtype = self.dtype
        time = [_repeat(t, repeat, dim=1) for t in self.unet.embed_time(timesteps, pooled, time_ids)]
        keys_values = [
            (_repeat(k, repeat), _repeat(v, repeat)) for k, v in self.unet.project_text(text.to(dtype))
        ]

        cache = DeepCache(self.unet, cache_interval, control) if cache_interval > 1 else None

        def step(sample: Tensor, index: int) -> Tensor:
            levels, rows = control.gated(index) if control is not None else None, len(sample)
            text = [(k[-rows:], v[-rows:]) for k, v in keys_values]
            forward = self.unet if cache is None else partial(cache, index)
            return forward(sample.to(dtype), [t[index, -rows:] for t in time], text, levels).float()

        return step


def _repeat(tensor: Tensor, times: int, dim: int = 0) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=dim)


def constant_inputs(
    unet: UNet, timesteps: Tensor, text: Tensor, pooled: Tensor, time_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a compiled UNet takes that is known before the first step.

    Returns the time projections of all resnets side by side, (T, P, sum of C), of which a step takes one row, and the
    keys and values of every cross-attention by the names of their inputs. Arguments: see `TorchDenoiser.prepare`.
    """
    time = torch.cat(unet.embed_time(timesteps, pooled, time_ids), dim=-1)
    pairs = unet.project_text(text.to(unet.conv_in.weight.dtype))
    return time, {
        f"{kind}_{i}": x
        for i, pair in enumerate(pairs)
        for kind, x in zip(("key", "value"), pair, strict=True)
    }


class EngineDenoiser:
    """SDXL's UNet as a compiled engine: one call a step, its inputs filled in place."""

    def __init__(self, engine: Engine, unet: UNet):
        """unet: only its `once_per_image` parameters are used, in torch; the engine has the others."""
        self.engine, self.unet, self.device = engine, unet, engine.device
        self.dtype = unet.conv_in.weight.dtype
        self._ports = {port.name: port for port in engine.spec.inputs}
        self._levels = [name for name in self._ports if name.startswith("level_")]
        self._owners: dict[int, object] = {}  # of the tensors of each size: the run whose inputs are in them

    @property
    def latent_channels(self) -> int:
        return self._ports["sample"].shape[1]

    @property
    def control_channels(self) -> Sequence[int]:
        return tuple(self._ports[name].shape[1] for name in self._levels)

    def check(self, images: int, guided: bool, height: int, width: int, cache_interval: int = 1) -> None:
        """InputError where a call is of a size that the engine was not built for, or is to cache its features."""
        if cache_interval > 1:
            raise InputError(
                f"cache_interval {cache_interval}: a compiled UNet computes every step whole, expected 1"
            )
        self.engine.profile.check({"height": height, "width": width, "rows": images * (1 + guided)})

    def prepare(
        self,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        control: Control | None,
        repeat: int,
        cache_interval: int = 1,
    ) -> Step:
        """See `TorchDenoiser.prepare`; cache_interval is 1."""
        time, constant = constant_inputs(self.unet, timesteps, text, pooled, time_ids)
        time = _repeat(time, repeat, dim=1)
        constant = {name: _repeat(tensor, repeat) for name, tensor in constant.items()}
        segments = [0] * len(timesteps) if control is None else control.segments
        run, filled = object(), {}  # filled: which segment's control is in the inputs of each binding

        def step(sample: Tensor, index: int) -> Tensor:
            bound, rows = self._bind(sample), len(sample)
            if self._owners.get(id(bound)) is not run:  # the first step, or another run came in between
                self._owners[id(bound)], filled[id(bound)] = run, None
                for name, tensor in constant.items():
                    bound.inputs[name].copy_(tensor[-rows:])
            if filled[id(bound)] != segments[index]:
                levels = [torch.zeros(())] * len(self._levels) if control is None else control.gated(index)
                for name, level in zip(self._levels, levels, strict=True):
                    bound.inputs[name].copy_(level)
                filled[id(bound)] = segments[index]
            bound.inputs["sample"].copy_(sample)
            bound.inputs["time"].copy_(time[index, -rows:])
            bound.run()
            return bound.outputs["prediction"].clone()  # the next step writes the same memory

        return step

    def _bind(self, sample: Tensor) -> Binding:
        """The engine's tensors for latents of this shape."""
        divisor = self._ports["sample"].shape[2].divisor
        rows, _, height, width = sample.shape
        return self.engine.bind(rows=rows, height=height * divisor, width=width * divisor)
