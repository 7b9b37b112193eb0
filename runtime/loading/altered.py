"""What was done to a diffusers UNet that ours, which takes only its weights, would not do: refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from runtime.errors import InputError

PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)  # the same sums


def unaltered(unet: nn.Module, name: str) -> nn.Module:
    """Return the UNet, without torch.compile's cover. Raises InputError where it computes more than its weights say."""
    unet = getattr(unet, "_orig_mod", unet)
    for module in unet.modules():
        for what, instead in alterations(module):
            raise InputError(f"{name}: its UNet has {what}, which would not be in the picture; {instead}")
    return unet


def alterations(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what a layer does besides, and what to do about it."""
    kind = type(module).__name__
    if getattr(module, "s1", None) is not None:  # diffusers' free_u sets s1, s2, b1 and b2 on the up blocks
        yield "FreeU", "expected pipe.disable_freeu()"
    if getattr(module, "fused_projections", False):
        yield "fused projections", "expected pipe.unfuse_qkv_projections()"
    processor = getattr(module, "processor", None)
    if processor is not None and type(processor).__name__ not in PROCESSORS:
        yield (
            f"the attention processor {type(processor).__name__}",
            "expected pipe.unet.set_default_attn_processor()",
        )
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        yield f"convolutions with padding_mode {module.padding_mode!r}", "expected 'zeros'"
    if hasattr(module, "base_layer"):  # peft's layers stay where an adapter was deleted
        yield "layers of a deleted LoRA", "expected pipe.unload_lora_weights()"
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
    if hooks:
        yield f"a hook on a {kind}", "expected it removed"
    elif "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's moves weights, no more
        yield f"a forward of its own on a {kind}", "expected it as its class has it"
