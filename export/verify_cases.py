"""The inputs on which graphs are compared: at the sizes of a profile, at early and late timesteps, with and without
control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from runtime.engines.manifest import ADAPTER, EngineSpec
from runtime.engines.ports import (
    CONDITION,
    KEY,
    LEVEL,
    MASK,
    SHARES,
    STRENGTHS,
    TIME,
    Axis,
    Port,
    Profile,
    numbered,
)

TIMESTEPS = (999.0, 500.0, 1.0)


def cases_of(
    profile: Profile, spec: EngineSpec, name: str, module: nn.Module, smallest: bool
) -> Iterator[tuple[dict[str, int], str, dict[str, Tensor]]]:
    """Yield inputs at each size of the profile: timesteps, masks and strengths vary from one to the next."""
    axes = dict.fromkeys(size.name for port in spec.inputs for size in port.shape if isinstance(size, Axis))
    sizes = [{axis: profile.range(axis)[i] for axis in axes} for i in range(1 if smallest else 3)]
    for i, size in enumerate(sizes):
        if size not in sizes[:i]:
            for label, inputs in _variants(spec, name, module, size, seed=i):
                yield size, label, inputs


def _variants(
    spec: EngineSpec, name: str, module: nn.Module, sizes: Mapping[str, int], seed: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {port.name: _random(port, sizes, generator) for port in spec.inputs}
    if name == "unet":
        times, constant = _constant_inputs(module.unet, inputs[numbered(KEY, 0)].shape, generator)
        inputs |= constant
        inputs |= {name: x.softmax(1) for name, x in inputs.items() if name.startswith(SHARES)}
        for timestep, time in zip(TIMESTEPS, times, strict=True):
            inputs[TIME] = time
            yield f"timestep {timestep:.0f}", inputs
        quiet = {key: torch.zeros_like(t) if key.startswith(LEVEL) else t for key, t in inputs.items()}
        yield "no control", quiet
    elif name.startswith(ADAPTER):
        yield "soft masks", inputs
        half = {key: t.round() if key.startswith(MASK) else t for key, t in inputs.items()}
        yield "hard masks", {**half, STRENGTHS: torch.tensor([1.0, 0.5, 0.0, 2.0])}
    else:
        yield "", inputs


@torch.inference_mode()
def _constant_inputs(unet: nn.Module, key: Sequence[int], generator: torch.Generator) -> tuple[Tensor, dict]:
    """Return, for random prompts, what the UNet takes at each of `TIMESTEPS`, and at all.

    key: the shape of a cross-attention's, (rows, heads, tokens, D) or (rows, texts, heads, tokens, D).
    """
    from runtime.engines.denoiser import constant_inputs

    config, device = unet.config, unet.conv_in.weight.device
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    rows, texts, tokens = key[0], key[1:-3], key[-2]
    text = torch.randn(rows, *texts, tokens, config.cross_attention_dim, generator=generator)
    ids = torch.tensor([[512.0, 768.0, 0.0, 16.0, 1024.0, 1024.0]]).expand(rows, -1)
    given = torch.tensor(TIMESTEPS), text, torch.randn(rows, pooled, generator=generator), ids
    times, constant = constant_inputs(unet, *(x.to(device) for x in given))
    return times.cpu(), {name: x.cpu() for name, x in constant.items()}


def _random(port: Port, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = port.sized(sizes)
    if port.dtype == torch.int64:
        return torch.randint(0, 40, shape, generator=generator)  # token ids of any vocabulary
    unit = port.name.startswith((MASK, CONDITION, STRENGTHS))
    draw = torch.rand if unit else torch.randn
    return draw(shape, generator=generator).to(port.dtype)
