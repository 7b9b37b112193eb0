"""benchmarks.quality.distribution: FID, CLIPScore and the feature distance, each against its formula, offline."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.image.fid
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from benchmarks.quality.distribution import clip_score, feature_distance, fid, inception, vae_features
from runtime.loading.load import EMBEDDED
from runtime.loading.quiet import quiet
from tests.support.refusals import refusal
from training.embedded.text import make_tokenizers, write_vocabulary

RED_STAR = "a red star on sand"


def pictures(count, size=16, seed=0, low=0, high=256):
    return list(np.random.default_rng(seed).integers(low, high, (count, size, size, 3), dtype=np.uint8))


class Network(nn.Module):
    """(B, 3, H, W) uint8 -> (B, 6) float64 of a small random convolution."""

    num_features = 6

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 5, stride=2, dtype=torch.float64)

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        assert len(pixels) <= 32
        return self.conv(pixels.double() / 255).relu().mean((2, 3))


class Pixel(nn.Module):
    """The colour of a picture of one pixel, (B, 3) float64, is its features."""

    num_features = 3

    def forward(self, pixels):
        return pixels.flatten(1).double()


def frechet(real, generated, network):
    """The formula of Heusel et al. (2017) by numpy and scipy, in float64."""
    features = [
        network(torch.from_numpy(p[None]).permute(0, 3, 1, 2))[0].detach().numpy() for p in real + generated
    ]
    one, other = np.split(np.array(features), [len(real)])
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1])
    return ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root.real)


@pytest.mark.parametrize("counts", [(40, 40), (33, 70)])
def test_fid_is_the_formula(counts):
    real, generated = pictures(counts[0]), pictures(counts[1], seed=1, high=200)
    expected = frechet(real, generated, Network())
    assert fid(real, generated, Network()) == pytest.approx(
        expected, rel=1e-8
    )  # float64, another square root


def test_fid_of_known_gaussians():
    """Means 5, 3 and 0 apart, deviations 10 and 14: 34 + 3 * 16. The samples' own deviation is 3 % of that."""
    draw = np.random.default_rng(0)
    real = draw.normal((100, 120, 140), 10, (10_000, 3))
    generated = draw.normal((105, 123, 140), 14, (10_000, 3))
    sets = [np.rint(colours).astype(np.uint8).reshape(-1, 1, 1, 3) for colours in (real, generated)]
    assert fid(*sets, Pixel()) == pytest.approx(82, rel=0.1)


def test_fid_is_zero_for_equal_sets_and_grows_with_a_shift():
    real = pictures(64, high=150)
    values = [fid(real, [p + np.uint8(shift) for p in real], Network()) for shift in (0, 20, 40, 80)]
    assert 0 <= values[0] < 1e-9 < values[1] < values[2] < values[3]


def test_fid_names_what_is_wrong():
    good, network = pictures(3), Network()
    assert refusal(fid, good, good[:1], network) == "fid: 1 generated pictures; expected two or more"
    assert refusal(fid, [good[0], good[1][..., 0]], good, network) == (
        "fid: real picture 1 is (16, 16) uint8; expected an array (H, W, 3) uint8"
    )
    assert "generated picture 0 is (16, 16, 3) float32" in refusal(
        fid, good, [g.astype(np.float32) for g in good], network
    )
    assert "real picture 0 is Image" in refusal(fid, [Image.fromarray(g) for g in good], good, network)
    assert "real picture 2 is (8, 8, 3), others (16, 16, 3); expected one size" in refusal(
        fid, [*good[:2], *pictures(1, 8)], good, network
    )
    assert "picture 35 is" in refusal(fid, [*pictures(35), None], good, network)


def test_fid_says_what_to_install_and_download(monkeypatch, tmp_path):
    good, weights = pictures(2), tmp_path / "weights.pth"
    text = refusal(fid, good, good, weights)
    assert f"{weights} is not a file" in text
    assert "pip install torch-fidelity" in text
    assert "weights-inception-2015-12-05-6726825d.pth" in text
    torch.save({}, weights)
    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    assert "pip install torchmetrics torch-fidelity" in refusal(fid, good, good, weights)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    assert "pip install torchmetrics" in refusal(fid, good, good, weights)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_inception_gets_plain_tensors_only(monkeypatch, tmp_path):
    class Reader(Network):  # as torch-fidelity loads
        def __init__(self, name, features, file):
            super().__init__()
            self.load_state_dict(torch.load(file, weights_only=False))

    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", Reader)
    weights, harm = tmp_path / "weights.pth", tmp_path / "harm"
    torch.save({name: value + 1 for name, value in Network().state_dict().items()}, weights)
    assert torch.equal(inception(weights).conv.bias, Network().conv.bias + 1)
    assert inception(weights).num_features == 2048
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))):
        save({"conv.bias": Harm(harm)}, weights)
        assert f"{weights} holds no Inception weights" in refusal(inception, weights)
        assert not harm.exists()
    torch.save({"conv.bias": torch.zeros(6)}, weights)
    assert "Missing key" in refusal(inception, weights)


@pytest.fixture
def clip(tmp_path):
    """A folder with a random CLIP of 32 pixels and the embedded model's vocabulary."""
    tokenizer = make_tokenizers(write_vocabulary(tmp_path / "vocabulary"))[0]
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    last = len(tokenizer) - 1
    text = {
        **size,
        "vocab_size": last + 1,
        "bos_token_id": last - 1,
        "eos_token_id": last,
        "pad_token_id": last,
    }
    vision = {**size, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    with quiet():
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
            tmp_path / "clip"
        )
    return tmp_path / "clip"


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def cosine(image, caption, folder):
    """By CLIP's parts, not by its forward."""
    with quiet():
        model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=[caption], images=[image], return_tensors="pt")
    seen = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)[0].double()
    read = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)[0].double()
    return float(seen @ read / seen.norm() / read.norm())


def test_clip_score_is_the_cosine(clip):
    images = [
        *pictures(1, 48, high=100),
        np.random.default_rng(1).integers(0, 256, (40, 64, 3), dtype=np.uint8),
    ]
    captions = [RED_STAR, "a blue square"]
    expected = [100 * max(cosine(*pair, clip), 0) for pair in zip(images, captions, strict=True)]
    assert clip_score(images, captions, clip) == pytest.approx(expected, rel=1e-5)  # float32
    assert expected[0] > 0
    assert clip_score([], [], clip) == []


def test_clip_score_of_opposites_is_zero(clip):
    image = pictures(1)[0]
    assert cosine(image, RED_STAR, clip) > 0
    change_weights(clip, lambda w: {**w, "text_projection.weight": -w["text_projection.weight"]})
    assert cosine(image, RED_STAR, clip) < 0
    assert clip_score([image], [RED_STAR], clip) == [0]


def test_clip_score_cuts_long_texts(clip):
    images = pictures(1) * 3
    cut, long, other = clip_score(images, ["red " * 75, "red " * 200, "red " * 60], clip)
    assert cut == long != other


def test_clip_score_names_what_is_wrong(clip):
    images = pictures(2)
    assert "2 pictures, 1 captions" in refusal(clip_score, images, [RED_STAR], clip)
    assert "caption 1 is None" in refusal(clip_score, images, [RED_STAR, None], clip)
    assert "picture 0 is (16, 16) uint8" in refusal(clip_score, [images[0][..., 0]], [RED_STAR], clip)


def test_clip_score_says_what_the_folder_lacks(clip, tmp_path):
    def refused(folder):
        return refusal(clip_score, pictures(1), [RED_STAR], folder)

    assert f"{tmp_path / 'none'} is not a folder; download openai/clip" in refused(tmp_path / "none")
    assert "holds no CLIP model" in refused(tmp_path)
    assert "holds no CLIP model" in refused(EMBEDDED / "text_encoder")
    change_weights(clip, lambda w: {key: w[key] for key in w if not key.startswith("vision")})
    assert "holds no whole CLIP: lacks vision_model." in refused(clip)
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    assert "holds no CLIP model" in refused(clip)  # a pickle is not read


def noisy(images, amount):
    noise = np.random.default_rng(9).normal(0, amount, np.shape(images))
    return [np.clip(image + n, 0, 255).astype(np.uint8) for image, n in zip(images, noise, strict=True)]


def test_feature_distance_in_the_embedded_vae_grows_with_noise():
    features = vae_features(AutoencoderKL.from_pretrained(EMBEDDED / "vae").eval())
    images = pictures(2, 64, low=100, high=110)
    few, many = (feature_distance(images, noisy(images, amount), features) for amount in (10, 60))
    assert feature_distance(images, images, features) == [0, 0]
    assert feature_distance(noisy(images, 60), images, features) == many
    assert all(0 < a < b < 4 for a, b in zip(few, many, strict=True))


def test_vae_features_follow_the_down_blocks():
    vae = AutoencoderKL.from_pretrained(EMBEDDED / "vae").eval()
    layers = vae_features(vae)(torch.zeros(2, 3, 64, 64))
    assert [tuple(layer.shape) for layer in layers] == [
        (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8), (2, 96, 8, 8)
    ]  # fmt: skip
    encoder = vae.encoder
    out = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(layers[-1]))))
    assert torch.equal(out, encoder(torch.zeros(2, 3, 64, 64)))


def test_feature_distance_is_the_mean_of_squared_distances_of_unit_vectors():
    """Colours as features: black (-1, -1, -1) is opposite to white, 4 away, and red (1, -1, -1) a third of that."""
    black, white, red = (np.full((4, 4, 3), colour, np.uint8) for colour in (0, 255, (255, 0, 0)))

    def twice(pixels):
        return pixels, pixels.abs()[..., ::2]  # the second layer cannot tell them apart

    assert feature_distance([black], [white], lambda pixels: [pixels]) == pytest.approx([4])
    assert feature_distance([black, black], [red, black], twice) == pytest.approx([4 / 3 / 2, 0])


def test_feature_distance_names_what_is_wrong():
    one, two = pictures(2)
    assert "1 and 2 pictures" in refusal(feature_distance, [one], [one, two], lambda pixels: [pixels])
    text = refusal(feature_distance, [one, one], [two, two[:8]], lambda pixels: [pixels])
    assert text == "feature_distance: pair 1, picture 1 is (8, 16, 3), others (16, 16, 3); expected one size"
