"""runtime.sampling.pixels: pictures of latents, a few at a time, and what is not finite."""

import numpy as np
import pytest
import torch

from runtime.errors import InputError
from runtime.sampling import pixels
from tests.support.tiny import make_pipeline


@torch.inference_mode()
def test_a_batch_in_parts_is_the_same(monkeypatch):
    vae, latents = make_pipeline().vae, torch.randn(5, 4, 4, 6)
    whole = pixels.decode(vae, latents)
    assert whole.shape == (5, 3, 32, 48) and whole.dtype == torch.float32
    assert 0 <= whole.min() < whole.max() <= 1
    sizes = []
    original = vae.decode
    monkeypatch.setattr(vae, "decode", lambda x, **options: sizes.append(len(x)) or original(x, **options))
    monkeypatch.setattr(pixels, "DECODE_PIXELS", 2 * 32 * 48)
    assert torch.allclose(pixels.decode(vae, latents), whole, atol=1e-5)
    assert sizes == [2, 2, 1]


@torch.inference_mode()
def test_latents_are_scaled_as_the_vae_was_trained():
    vae, latents = make_pipeline().vae, torch.randn(1, 4, 4, 4)
    expected = vae.decode(latents / vae.config.scaling_factor).sample
    assert torch.allclose(pixels.decode(vae, latents), (expected / 2 + 0.5).clamp(0, 1), atol=1e-6)
    vae.register_to_config(latents_mean=[1.0, 0, 0, 0], latents_std=[2.0, 1, 1, 1])
    scaled = latents / vae.config.scaling_factor
    scaled[:, 0] = scaled[:, 0] * 2 + 1
    expected = vae.decode(scaled).sample
    assert torch.allclose(pixels.decode(vae, latents), (expected / 2 + 0.5).clamp(0, 1), atol=1e-6)


@torch.inference_mode()
def test_what_is_not_finite_is_said():
    with pytest.raises(InputError, match="decode: the result has NaN or infinite values"):
        pixels.decode(make_pipeline().vae, torch.full((1, 4, 4, 4), float("nan")))


def test_pixels_are_rounded():
    shades = torch.tensor([0.0, 1.0, 0.5, 0.4999 / 255]).view(1, 1, 2, 2).expand(2, 3, 2, 2)
    images = pixels.to_images(shades)
    assert len(images) == 2 and np.asarray(images[1])[..., 0].tolist() == [[0, 255], [128, 0]]
