"""A tiny SDXL with random weights, in diffusers' classes: every part there, nothing learned, made in a second."""

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)

from runtime.loading.load import EMBEDDED
from training.embedded.text import make_text_encoders, make_tokenizers

CHANNELS = (32, 64, 64)
TEXT_WIDTH = 16
CONTROLNET_OPTIONS = (  # that a ControlNet has from its UNet
    "in_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "norm_num_groups",
    "cross_attention_dim",
    "use_linear_projection",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


def make_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL's structure, latents of 8 x 8 (64 pixels), epsilon prediction."""
    torch.manual_seed(seed)
    tokenizers = make_tokenizers(
        EMBEDDED / "tokenizer"
    )  # a vocabulary made anew would differ from one to the next
    encoders = make_text_encoders(len(tokenizers[0]), width=TEXT_WIDTH, layers=2)
    pipe = StableDiffusionXLPipeline(
        vae=_make_vae().eval(),
        text_encoder=encoders[0].eval(),
        text_encoder_2=encoders[1].eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=_make_unet().eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_adapter(channels=(*CHANNELS, CHANNELS[-1]), in_channels: int = 1, seed: int = 0) -> T2IAdapter:
    torch.manual_seed(seed)
    return T2IAdapter(
        in_channels=in_channels,
        channels=list(channels),
        num_res_blocks=1,
        downscale_factor=16,
        adapter_type="full_adapter_xl",
    ).eval()


def make_controlnet(unet: UNet2DConditionModel, seed: int = 0, **options) -> ControlNetModel:
    """A ControlNet for a UNet, every parameter random: the layers that training starts at zero act, too."""
    torch.manual_seed(seed)
    config = {key: unet.config[key] for key in CONTROLNET_OPTIONS}
    small = {"conditioning_embedding_out_channels": (4, 4, 8, 8)}
    return randomized(ControlNetModel(**config | small | options))


def make_union(unet: UNet2DConditionModel, seed: int = 0, controls: int = 6) -> ControlNetUnionModel:
    """A ControlNet-Union for a UNet, likewise."""
    torch.manual_seed(seed)
    config = {key: unet.config[key] for key in CONTROLNET_OPTIONS}
    width = config["block_out_channels"][0]
    union = {"num_control_type": controls, "num_trans_channel": width, "num_proj_channel": width}
    small = {"conditioning_embedding_out_channels": (4, 4, 8, 8)}
    return randomized(ControlNetUnionModel(**config | small | union))


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """The model with noise on every parameter, frozen: zero biases would hide a mistake."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
    )
