"""What `benchmarks.kernels` times: every op at SDXL's shapes, by our kernel and by each way of doing without it.

A case makes its inputs once and names its providers. They are checked against the reference before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops, reference
from kernels.reference import Float8Rows

Inputs = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One op at one shape, and what tells it from others of that. `bytes_moved`: every input read once, every output
    written once, forward alone.
    """

    op: str
    shape: str
    inputs: Inputs
    differentiable: Sequence[str]  # inputs that get a gradient; none: no backward is timed
    bytes_moved: int

    def providers(self) -> dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]:
        """name -> the op: the kernel, plain PyTorch, PyTorch compiled, and kornia's Sobel where there is one."""
        plain = PLAIN[self.op]
        found = {"ours": _with_kernels(getattr(ops, self.op)), "eager": plain}
        found["compile"] = torch.compile(plain, dynamic=False)
        if self.op in KORNIA and find_spec("kornia") is not None:
            found["kornia"] = KORNIA[self.op]
        return found


def _with_kernels(op: Callable) -> Callable:
    def run(**inputs):
        with ops.use_backend("triton"):
            return op(**inputs)

    return run


def cases(device: torch.device, dtype: torch.dtype, batches: Sequence[int], size: int = 1024) -> list[Case]:
    """Return all cases for images of `size` x `size` pixels; batches are images, of which guidance makes two rows
    each.
    """
    latent = size // 8
    found = []
    for batch in batches:
        for channels, edge in ((320, latent // 2), (640, latent // 2), (1280, latent // 4)):
            found.append(inject_case(device, dtype, batch, channels, edge))
        for op in ("sobel_z0_loss", "noise_and_z0_loss"):
            found.append(loss_case(op, device, dtype, batch, latent))
        for channels, edge in ((320, latent), (640, latent // 2), (1280, latent // 4), (2560, latent // 4)):
            for offset in (False, True):
                found.append(norm_case(device, dtype, 2 * batch, channels, edge, offset))
        for channels, edge in ((640, latent // 2), (1280, latent // 4)):
            rows = 2 * batch * edge * edge
            for float8 in (False, True):
                found.append(geglu_case(device, dtype, rows, 4 * channels, float8))
                found.append(layer_norm_case(device, dtype, rows, channels, float8))
            found.append(float8_case(device, dtype, rows, channels))
        found.append(guidance_case(device, dtype, batch, latent))
    return found


def large_cases(device: torch.device, dtype: torch.dtype, images: int, size: int) -> Iterator[Case]:
    """Yield one case of each kernel that is bound by bandwidth: for 512 images of 1024 x 1024, 200 to 400 MB each."""
    latent, few = size // 8, max(1, images // 16)
    yield inject_case(device, dtype, few, 640, latent // 2)
    yield loss_case("sobel_z0_loss", device, dtype, images, latent)
    yield norm_case(device, dtype, few, 320, latent, offset=False)
    yield geglu_case(device, dtype, 4 * latent * latent, 2560)
    yield layer_norm_case(device, dtype, 4 * latent * latent, 1280, float8=False)
    yield guidance_case(device, dtype, max(1, images // 2), latent)


def inject_case(device, dtype, batch: int, channels: int, edge: int, regions: int = 1) -> Case:
    hidden = _image(2 * batch, channels, edge, device, dtype)
    features = [_image(batch, channels, edge, device, dtype) for _ in range(regions)]
    masks = [torch.rand(1, 1, edge, edge, device=device) for _ in range(regions)]
    inputs = {
        "hidden": hidden,
        "features": features,
        "masks": masks,
        "scales": torch.ones(regions, device=device),
    }
    moved = 2 * _bytes(hidden) + _bytes(*features, *masks)
    return Case("inject", _shape(hidden), inputs, ("hidden", "features"), moved)


def loss_case(op: str, device, dtype, batch: int, edge: int) -> Case:
    names = ("model_output", "noisy", "latents")
    inputs = {name: torch.randn(batch, 4, edge, edge, device=device).to(dtype) for name in names}
    inputs["mask"] = torch.rand(batch, 1, edge, edge, device=device).to(dtype)
    inputs["alpha"] = torch.linspace(0.3, 0.9, batch, device=device)
    inputs["sigma"] = (1 - inputs["alpha"] ** 2).sqrt()
    moved = _bytes(*inputs.values())
    return Case(op, _shape(inputs["latents"]), inputs, ("model_output",), moved)


def norm_case(device, dtype, batch: int, channels: int, edge: int, offset: bool) -> Case:
    x = _image(batch, channels, edge, device, dtype)
    weight, bias = torch.rand(2, channels, device=device).to(dtype).unbind()
    inputs = {"x": x, "weight": weight, "bias": bias, "num_groups": 32}
    if offset:
        inputs["offset"] = torch.randn(batch, channels, device=device).to(dtype)
    moved = 3 * _bytes(x)  # read twice: sums, then values
    return Case("group_norm_silu", _shape(x) + " offset" * offset, inputs, ("x",), moved)


def geglu_case(device, dtype, rows: int, channels: int, float8: bool = False) -> Case:
    """float8: without a bias and gradients, as in a picture."""
    x = torch.randn(rows, 2 * channels, device=device).to(dtype)
    if float8:
        moved = _bytes(x) + _float8_bytes(rows, channels)
        return Case("geglu", f"{_shape(x)} float8", {"x": x, "float8": True}, (), moved)
    bias = torch.randn(2 * channels, device=device).to(dtype)
    return Case("geglu", _shape(x), {"x": x, "bias": bias}, ("x",), _bytes(x) * 3 // 2)


def layer_norm_case(device, dtype, rows: int, channels: int, float8: bool) -> Case:
    x, residual = torch.randn(2, rows, channels, device=device).to(dtype).unbind()
    weight, bias = torch.rand(2, channels, device=device).to(dtype).unbind()
    inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias, "float8": float8}
    norm = _float8_bytes(rows, channels) if float8 else _bytes(x)
    moved = 3 * _bytes(x) + _bytes(weight, bias) + norm
    differentiable = () if float8 else ("x", "residual")
    return Case("add_layer_norm", _shape(x) + " float8" * float8, inputs, differentiable, moved)


def float8_case(device, dtype, rows: int, channels: int) -> Case:
    x = torch.randn(rows, channels, device=device).to(dtype)
    return Case("float8_rows", _shape(x), {"x": x}, (), _bytes(x) + _float8_bytes(rows, channels))


def guidance_case(device, dtype, batch: int, edge: int) -> Case:
    sample, previous = torch.randn(2, batch, 4, edge, edge, device=device).unbind()
    output = _image(2 * batch, 4, edge, device, dtype)
    coefficients = torch.tensor([5.0, 1.0, -0.7, 0.8, 0.3, -0.1], device=device)
    inputs = {"sample": sample, "output": output, "coefficients": coefficients, "previous": previous}
    return Case("guidance_step", _shape(output), inputs, (), 4 * _bytes(sample) + _bytes(output))


def _image(batch: int, channels: int, edge: int, device, dtype) -> Tensor:
    """Return channels last, as the UNet runs."""
    x = torch.randn(batch, channels, edge, edge, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _float8_bytes(rows: int, channels: int) -> int:
    """Return those of values and scales."""
    return rows * channels + 4 * rows


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def plain_inject(hidden, features, masks, scales) -> Tensor:
    """Compute it as one writes it in the tensors' own dtype, the features repeated for guidance as diffusers does."""
    halves = hidden.shape[0] // features[0].shape[0]
    for r, (feature, mask) in enumerate(zip(features, masks, strict=True)):
        hidden = hidden + (feature * (mask * scales[r]).to(feature.dtype)).repeat(halves, 1, 1, 1)
    return hidden


def plain_geglu(x, bias=None, float8=False) -> Tensor | Float8Rows:
    """Compute it as diffusers does, in the tensor's own dtype; there the bias is the linear layer's."""
    value, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    gated = value * F.gelu(gate)
    return reference.float8_rows(gated) if float8 else gated


def plain_layer_norm(x, residual, weight, bias, float8=False) -> tuple[Tensor, Tensor | Float8Rows]:
    total = x + residual
    norm = F.layer_norm(total, x.shape[-1:], weight, bias)
    return total, reference.float8_rows(norm) if float8 else norm


def kornia_loss(model_output, noisy, latents, mask, alpha, sigma) -> Tensor:
    from kornia.filters import sobel

    predicted = reference.predict_z0(model_output, noisy, alpha, sigma, "epsilon").float()
    difference = sobel(predicted) * mask - sobel(latents.float()) * mask
    return difference.square().mean(dim=(1, 2, 3))


def kornia_losses(model_output, noisy, latents, mask, alpha, sigma) -> tuple[Tensor, Tensor]:
    edge_loss = kornia_loss(model_output, noisy, latents, mask, alpha, sigma)
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    target = (noisy.float() - a * latents.float()) / s
    return F.mse_loss(model_output.float(), target, reduction="none").mean(dim=(1, 2, 3)), edge_loss


PLAIN = {
    "inject": plain_inject,
    "sobel_z0_loss": reference.sobel_z0_loss,
    "noise_and_z0_loss": reference.noise_and_z0_loss,
    "group_norm_silu": reference.group_norm_silu,
    "geglu": plain_geglu,
    "add_layer_norm": plain_layer_norm,
    "float8_rows": reference.float8_rows,
    "guidance_step": reference.guidance_step,
}
KORNIA = {"sobel_z0_loss": kornia_loss, "noise_and_z0_loss": kornia_losses}
