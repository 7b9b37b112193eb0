"""The training loss: noise, and edges of the predicted z0 inside the mask; and how timesteps are drawn.

Notation of kernels.reference: z_t = alpha z0 + sigma eps, abar = alpha^2.
"""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from kernels import ops
from runtime.errors import InputError
from runtime.loading.zero_snr import spelled_out
from training.config import TrainConfig

EDGES = {"mse": "none", "sobel": "sobel", "laplacian": "laplacian"}  # z0_loss -> the op's name for it
PREDICTIONS = ("epsilon", "v_prediction", "sample")
PURE_NOISE = 1e-7  # abar that counts as 0: diffusers' Euler, which divides by it, puts 2^-24 there


def add_noise(latents: Tensor, noise: Tensor, abar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents (B, C, h, w), and alpha and sigma (B,), of the latents' dtype; abar (B,) float32."""
    alpha, sigma = abar.sqrt().to(latents.dtype), (1 - abar).sqrt().to(latents.dtype)
    return _rows(alpha) * latents + _rows(sigma) * noise, alpha, sigma


def v_target(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha eps - sigma z0, (B, C, h, w)."""
    return _rows(alpha) * noise - _rows(sigma) * latents


def training_loss(
    output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    noise: Tensor,
    mask: Tensor,
    t: Tensor,
    abar: Tensor,
    prediction: str,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """Return each weighted term of every sample, (B,) float32: "noise", and "z0" where that loss is on.

    output, noisy, latents, noise: (B, C, h, w). mask (B or 1, 1, h, w), at the latents' size. t, abar: (B,).
    Both terms come from one kernel where both are wanted (design: L = w_s mean((o - target)^2) + w(t) mean(...)).
    """
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    w_noise = config.noise_weight * noise_weight(abar, prediction, config.min_snr)
    if config.z0_loss == "off":
        target = {"epsilon": lambda: noise, "v_prediction": lambda: v_target(latents, noise, alpha, sigma)}
        target = target.get(prediction, lambda: latents)()
        return {"noise": w_noise * (output - target).square().mean(dim=(1, 2, 3))}
    noise_loss, z0_loss = ops.noise_and_z0_loss(
        output, noisy, latents, mask, alpha, sigma, prediction, edges=EDGES[config.z0_loss]
    )
    return {"noise": w_noise * noise_loss, "z0": z0_weight(t, abar, config) * z0_loss}


def noise_weight(abar: Tensor, prediction: str, gamma: float) -> Tensor:
    """Min-SNR weights (Hang et al. 2023), (B,): min(SNR, gamma) over SNR, SNR + 1 or 1, by what is predicted."""
    if gamma == 0:
        return torch.ones_like(abar)
    snr = (abar / (1 - abar)).clamp(min=1e-12)  # at pure noise the weight is its limit, not 0 / 0
    scale = {"epsilon": snr, "v_prediction": snr + 1}.get(prediction, torch.ones_like(snr))
    return snr.clamp(max=gamma) / scale


def z0_weight(t: Tensor, abar: Tensor, config: TrainConfig) -> Tensor:
    """w(t) of the loss on the predicted z0, (B,)."""
    if config.z0_schedule == "time":
        return config.z0_weight * (1 - abar)
    weight = torch.full_like(abar, config.z0_weight)
    if config.z0_schedule == "step_range":
        weight = weight * ((t >= config.z0_from) & (t <= config.z0_to))
    return weight


def schedule_of(scheduler: SchedulerMixin) -> Tensor:
    """Return abar at every timestep, (T,) float32, as is drawn with. Raises InputError where a model was trained on
    another process.
    """
    kind = type(scheduler)
    abar = getattr(kind.from_config(spelled_out(kind, scheduler.config)), "alphas_cumprod", None)
    if abar is None:
        raise InputError(
            f"model: its {kind.__name__} has no alphas_cumprod, the noise schedule that is trained on; "
            "expected SDXL's, such as EulerDiscreteScheduler"
        )
    return abar.float()


def check_schedule(abar: Tensor, prediction: str, config: TrainConfig) -> None:
    """Raise InputError where the model's noise schedule cannot give the loss that is asked for."""
    if prediction not in PREDICTIONS:
        raise InputError(f"the model predicts {prediction!r}; expected one of {', '.join(PREDICTIONS)}")
    if prediction == "epsilon" and config.z0_loss != "off" and float(abar.min()) < PURE_NOISE:
        raise InputError(
            "z0_loss: the model's noise schedule ends in pure noise, where epsilon says nothing of z0; "
            "expected a v_prediction model, or --z0-loss off"
        )


def _rows(x: Tensor) -> Tensor:
    return x[:, None, None, None]
