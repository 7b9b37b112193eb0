"""The frozen UNet as training runs it, and what makes its way back quick.

No weight takes a gradient, and nothing before the first injection is recorded: autograd keeps what the control
reaches, and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.ops import current_backend, use_backend
from runtime.model.attention import use_attention
from runtime.model.blocks import Injection, Resnet, TransformerBlock
from runtime.model.unet import UNet
from runtime.optimize.fused import fuse_unet, fuses_here
from runtime.optimize.fused_qkv import fuse_qkv
from training.loop.group_norm import use_quick_group_norm


class FrozenUNet:
    """A UNet of `runtime` that is differentiated for its control only. The UNet itself keeps its weights and values.

    compiled: compile its layers one by one. That takes a fraction of the time that the whole graph takes, and on a CPU
    the gradient of the whole graph is wrong (torch 2.13: inductor's, not autograd's; the layers' are right).
    """

    def __init__(self, unet: UNet, *, compiled: bool = False):
        self.unet = unet.requires_grad_(False)
        self.device, self.dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
        self.checkpointing = False
        if fuses_here(current_backend(), self.device):
            fuse_unet(fuse_qkv(unet))
        elif self.device.type == "cpu":
            use_quick_group_norm(unet)
        for module in unet.modules():
            if isinstance(module, (Resnet, TransformerBlock)):
                forward = torch.compile(module.forward, dynamic=False) if compiled else module.forward
                module.forward = functools.partial(self._maybe_recompute, forward)
        if compiled:  # layers of one class share their code, and differ in width and size
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def __call__(
        self,
        noisy: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        control: Sequence[Injection] | None,
        residuals: Sequence[Injection] | None = None,
    ) -> Tensor:
        """Return the prediction (B, 4, h, w) float32, every row at its own timestep t (B,). control, residuals: see
        `UNet.forward`."""
        with torch.no_grad():
            pooled, text = pooled.to(self.dtype), text.to(self.dtype)
            time = [projection[0] for projection in self.unet.embed_time(t[None], pooled, time_ids)]
            text = self.unet.project_text(text)
        with quick_attention(self.device):
            return self.unet(noisy.to(self.dtype), time, text, control, residuals).float()

    def _maybe_recompute(self, forward, x: Tensor, *args):
        """Activation checkpointing, of the layers that are recorded at all."""
        if self.checkpointing and torch.is_grad_enabled() and x.requires_grad:
            contexts = functools.partial(_recompute_contexts, self.device)
            return checkpoint(forward, x, *args, use_reentrant=False, context_fn=contexts)
        return forward(x, *args)


@contextmanager
def quick_attention(device: torch.device) -> Iterator[None]:
    """On a CPU attention as plain matrix products: the backward of its fused attention took 41 % of a training step of
    the embedded UNet (torch 2.13); with the products the whole step was 1.4 times as fast."""
    if device.type != "cpu":
        yield
        return
    with use_attention("math"):
        yield


def _recompute_contexts(device: torch.device):
    """Around the forward pass and around computing it again, which happens outside of `FrozenUNet.__call__`, and on a
    GPU in autograd's own thread, which does not know the backend.
    """
    return nullcontext(), _entered(current_backend(), device)


@contextmanager
def _entered(backend: str, device: torch.device) -> Iterator[None]:
    with use_backend(backend), quick_attention(device):
        yield
