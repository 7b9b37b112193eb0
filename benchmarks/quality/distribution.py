"""Measures of pictures that need a learned network: FID, CLIPScore, and a distance in a network's features.

Pictures are arrays (H, W, 3) uint8 and weights local files; anything else, or a missing package, raises InputError.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from runtime.errors import InputError, first_line
from runtime.loading.quiet import quiet
from runtime.loading.weights import LOAD_ERRORS

BATCH = 32
INCEPTION = "https://github.com/toshas/torch-fidelity/releases: weights-inception-2015-12-05-6726825d.pth"


@torch.inference_mode()
def fid(real: Sequence[np.ndarray], generated: Sequence[np.ndarray], weights: Path | nn.Module) -> float:
    """Fréchet Inception distance (Heusel et al. 2017) of real and generated pictures, not conditions; lower is nearer.

    `weights`: the file that `inception` reads, or a network of `num_features` D, (B, 3, H, W) uint8 -> (B, D), which
    runs in its own mode on its own device. Inception resizes to 299 x 299 with antialiasing, the original without.
    Few pictures give too large a distance, by about 1 / their number (Chong and Forsyth 2020), and fewer than D a
    singular covariance: tens of thousands are usual, two the least, and only equal numbers compare.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise InputError("fid: needs the package torchmetrics; pip install torchmetrics") from error
    network = weights if isinstance(weights, nn.Module) else inception(weights)
    device = next(network.parameters(), torch.empty(0)).device
    metric = FrechetInceptionDistance(network).to(device)
    for name, pictures in (("real", real), ("generated", generated)):
        if len(pictures) < 2:
            raise InputError(f"fid: {len(pictures)} {name} pictures; expected two or more")
        for start in range(0, len(pictures), BATCH):
            batch = _stack(pictures[start : start + BATCH], f"fid: {name} picture", start)
            metric.update(batch.to(device), real=name == "real")
    return max(float(metric.compute()), 0.0)  # of equal sets, rounding leaves either sign


def inception(path: Path) -> nn.Module:
    """Inception v3 of 2015 by torch-fidelity with the weights in `path`: (B, 3, H, W) uint8 -> (B, 2048) float32."""
    if not path.is_file():
        raise InputError(f"fid: {path} is not a file; pip install torch-fidelity and download {INCEPTION}")
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        # torch-fidelity would unpickle whatever the file holds: it gets a copy of the plain tensors instead.
        torch.save(torch.load(path, map_location="cpu", weights_only=True), plain := io.BytesIO())
        plain.seek(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], plain)
    except ImportError as error:
        raise InputError("fid: packages missing; pip install torchmetrics torch-fidelity") from error
    except (*LOAD_ERRORS, EOFError) as error:
        raise InputError(f"fid: {path} holds no Inception weights: {first_line(error)}") from error
    network.num_features = 2048
    return network


@torch.inference_mode()
def clip_score(images: Sequence[np.ndarray], captions: Sequence[str], folder: Path) -> list[float]:
    """CLIPScore of each picture with its caption: 100 * max(cosine, 0), as in torchmetrics; higher is nearer.

    Hessel et al. (2021) scale by 2.5. `folder` is a CLIP for transformers, in safetensors: of a picture it sees the
    middle square, of a text the first 77 tokens.
    """
    if len(images) != len(captions):
        raise InputError(f"clip_score: {len(images)} pictures, {len(captions)} captions; expected one each")
    # Not torchmetrics' own: 1.9 fails on what transformers 5 returns as features, and cuts a text's end token.
    model, processor = _load_clip(folder)
    scores, cut = [], {"truncation": True, "max_length": model.config.text_config.max_position_embeddings}
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        if not isinstance(caption, str):
            raise InputError(f"clip_score: caption {i} is {caption!r}; expected a text")
        picture = Image.fromarray(_checked(image, f"clip_score: picture {i}"))
        output = model(**processor(text=[caption], images=[picture], return_tensors="pt", **cut))
        scores.append(100 * max(float((output.image_embeds * output.text_embeds).sum()), 0.0))  # unit vectors
    return scores


@functools.lru_cache(maxsize=1)
def _load_clip(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    if not folder.is_dir():
        raise InputError(
            f"clip_score: {folder} is not a folder; download openai/clip-vit-large-patch14 or such"
        )
    local = {"local_files_only": True, "trust_remote_code": False}
    options = {**local, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        with quiet():
            processor = CLIPProcessor.from_pretrained(folder, **local)
            model, report = CLIPModel.from_pretrained(folder, **options)
    except Exception as error:  # OSError, ValueError, KeyError ...: whatever the folder lacks
        raise InputError(f"clip_score: {folder} holds no CLIP model: {first_line(error)}") from error
    if report["missing_keys"]:
        raise InputError(f"clip_score: {folder} holds no whole CLIP: lacks {min(report['missing_keys'])}")
    return model, processor  # in evaluation mode


@torch.inference_mode()
def feature_distance(a: Sequence[np.ndarray], b: Sequence[np.ndarray], features: Callable) -> list[float]:
    """Return distance of each pair of pictures in a network's features: from 0, equal, to 4, opposite.

    LPIPS (Zhang et al. 2018) without learned weights: the squared distance of the two channel vectors of unit length,
    averaged over positions, then over layers. `features`, such as `vae_features`, maps (2, 3, H, W) float32 in [-1, 1]
    to a sequence of layers (2, C, h, w); distances of different networks do not compare.
    """
    if len(a) != len(b):
        raise InputError(f"feature_distance: {len(a)} and {len(b)} pictures; expected as many")
    distances = []
    for i, pair in enumerate(zip(a, b, strict=True)):
        layers = features(_stack(pair, f"feature_distance: pair {i}, picture") / 127.5 - 1)
        units = (nn.functional.normalize(layer.float(), dim=1) for layer in layers)
        squared = [float((one - other).square().sum(0).mean()) for one, other in units]
        distances.append(sum(squared) / len(squared))
    return distances


def vae_features(vae: AutoencoderKL) -> Callable[[Tensor], list[Tensor]]:
    """Return, for `feature_distance`, the VAE encoder's activations after each down block, in the VAE's device and
    dtype.
    """

    def features(pixels: Tensor) -> list[Tensor]:
        hidden = vae.encoder.conv_in(pixels.to(vae.device, vae.dtype))
        return [hidden := block(hidden) for block in vae.encoder.down_blocks]

    return features


def _stack(pictures: Sequence[np.ndarray], label: str, first: int = 0) -> Tensor:
    for i, picture in enumerate(pictures, first):
        if _checked(picture, f"{label} {i}").shape != pictures[0].shape:
            raise InputError(f"{label} {i} is {picture.shape}, others {pictures[0].shape}; expected one size")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _checked(picture: np.ndarray, label: str) -> np.ndarray:
    shape, dtype = getattr(picture, "shape", type(picture).__name__), getattr(picture, "dtype", "")
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise InputError(f"{label} is {shape} {dtype}; expected an array (H, W, 3) uint8")
    return picture
