"""A tiny depth model with random weights."""

from pathlib import Path

import torch
import transformers
from transformers import DepthAnythingForDepthEstimation


def make_depth_model() -> DepthAnythingForDepthEstimation:
    backbone = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"], apply_layernorm=True,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8, patch_size=14,
    )  # fmt: skip
    return DepthAnythingForDepthEstimation(config)


def save_depth_model(folder: Path, seed: int) -> Path:
    """Write one of that seed's weights, with what prepares its pictures."""
    torch.manual_seed(seed)
    make_depth_model().save_pretrained(folder)
    transformers.DPTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder
