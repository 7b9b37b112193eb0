"""runtime.model.latent_rgb: latents to colours by one matrix."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from runtime.errors import InputError
from runtime.loading.load import EMBEDDED, load_model
from runtime.model.latent_rgb import FILE, SDXL, LatentRGB, fit, known_projection
from runtime.model.vae import scaled
from training.embedded.vae import fit_preview


def vae_of(scaling, channels=4):
    return SimpleNamespace(config=SimpleNamespace(latent_channels=channels, scaling_factor=scaling))


def test_a_projection_is_a_matrix_and_a_bias():
    projection = LatentRGB(torch.tensor([[1.0, 0, 0], [0, 2.0, 0]]), torch.tensor([0.0, 0.0, 0.5]))
    pixels = projection.pixels(torch.tensor([0.5, -0.25]).view(1, 2, 1, 1).expand(3, 2, 4, 5))
    assert pixels.shape == (3, 3, 4, 5)
    assert torch.allclose(pixels[1, :, 2, 3], torch.tensor([0.75, 0.25, 0.75]))
    assert LatentRGB(torch.full((2, 3), 9.0), torch.zeros(3)).pixels(torch.ones(1, 2, 1, 1)).max() == 1


def test_the_embedded_one_is_what_its_build_fits():
    vae = load_model("embedded").vae
    kept, found = known_projection(vae, EMBEDDED / "vae"), fit_preview(vae)
    assert torch.allclose(kept.factors, found.factors, atol=1e-3)
    assert torch.allclose(kept.bias, found.bias, atol=1e-3)


def test_a_fit_is_the_best_there_is():
    """Of pictures whose colours are a linear function of the latents it finds that function."""
    vae = load_model("embedded").vae
    pictures = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = F.interpolate(pictures, (128, 128), mode="nearest")
    with torch.inference_mode():
        latents = scaled(vae.encode(2 * pictures - 1).latent_dist.mode(), vae)
    small = F.interpolate(pictures, latents.shape[2:], mode="area")
    error = (fit(vae, pictures).pixels(latents) - small).square().mean()
    for other in (fit(vae), known_projection(vae, EMBEDDED / "vae")):
        assert error <= (other.pixels(latents) - small).square().mean()
    assert error < 0.01


def test_which_vae_is_known():
    assert known_projection(vae_of(0.13025)) is SDXL
    assert known_projection(vae_of(0.18215)) is None
    assert known_projection(vae_of(0.13025, channels=16)) is None


def test_it_is_read_as_it_was_written(tmp_path):
    SDXL.write(tmp_path)
    found = LatentRGB.read(tmp_path, 4)
    assert torch.equal(found.factors, SDXL.factors) and torch.equal(found.bias, SDXL.bias)
    assert LatentRGB.read(tmp_path / "none", 4) is None


@pytest.mark.parametrize(
    "change",
    [
        {"factors": [[1, 2, 3]]},
        {"bias": [1, 2]},
        {"bias": [1, 2, "three"]},
        {"bias": None},
        {"bias": [1, 2, 10**400]},
        {"factors": [[1, 2, 3]] * 3 + [[1, 2]]},
        {"bias": [1, 2, float("nan")]},
    ],
)
def test_a_file_that_is_none_is_one_line(change, tmp_path):
    SDXL.write(tmp_path)
    given = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(given | change))
    with pytest.raises(InputError, match=FILE) as caught:
        LatentRGB.read(tmp_path, 4)
    assert "\n" not in str(caught.value)
