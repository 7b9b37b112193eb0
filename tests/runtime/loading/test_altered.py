"""runtime.loading.altered: what a diffusers UNet does besides what its weights say is refused, and nothing else."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from runtime import LocalControlPipeline
from runtime.errors import InputError
from tests.support.tiny import make_pipeline


class Processor:
    def __call__(self, attn, hidden_states, *args, **options):
        return hidden_states


def free_u(pipe):
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)


def fused(pipe):
    pipe.fuse_qkv_projections()


def processor(pipe):
    pipe.unet.set_attn_processor(Processor())


def seamless(pipe):
    for module in pipe.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def hook(pipe):
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)


def patched(pipe):
    pipe.unet.conv_in.forward = lambda x: x


def lora_left(pipe):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    pipe.delete_adapters("style")


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lora_left, "layers of a deleted LoRA"),
        (free_u, "FreeU"),
        (fused, "fused projections"),
        (processor, "the attention processor Processor"),
        (seamless, "convolutions with padding_mode 'circular'"),
        (hook, "a hook on a UNetMidBlock2DCrossAttn"),
        (patched, "a forward of its own on a Conv2d"),
    ],
)
def test_what_ours_would_not_do_is_refused_by_name(alter, said):
    pipe = make_pipeline()
    alter(pipe)
    with pytest.raises(InputError, match=f"its UNet has {said}, which would not be in the picture; expected"):
        LocalControlPipeline.from_diffusers(pipe)


def test_a_compiled_unet_is_taken_for_what_it_is():
    pipe = make_pipeline()
    plain = pipe.unet
    pipe.unet = torch.compile(plain)
    LocalControlPipeline.from_diffusers(pipe)
    pipe = make_pipeline()
    pipe.unet.set_default_attn_processor()
    pipe.enable_attention_slicing()
    LocalControlPipeline.from_diffusers(pipe)


@pytest.mark.parametrize("given", [None, 5, "x", {}])
def test_no_pipeline(given):
    with pytest.raises(InputError, match=r"from_diffusers: a \w+; expected a diffusers SDXL pipeline"):
        LocalControlPipeline.from_diffusers(given)
