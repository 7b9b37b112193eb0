"""The torch denoiser is the UNet with what is constant computed beforehand."""

import pytest
import torch

from runtime.loading.load import from_diffusers
from runtime.sampling.denoiser import TorchDenoiser
from tests.support.tiny import make_pipeline
from tests.support.tolerances import assert_close

PIPE = make_pipeline()
DENOISER = TorchDenoiser(from_diffusers(PIPE).unet)


@torch.no_grad()
@pytest.mark.parametrize("repeat", [1, 2])
def test_each_step_equals_diffusers_unet(repeat):
    timesteps = torch.tensor([981.0, 500.0, 1.0])
    text, pooled = torch.randn(2, 77, 32), torch.randn(2, 16)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64], [32.0, 64, 1, 2, 32, 64]])
    sample = torch.randn(2 * repeat, 4, 8, 8)
    step = DENOISER.prepare(timesteps, text, pooled, ids, None, repeat)
    for i, t in enumerate(timesteps):
        added = {
            name: x.repeat_interleave(repeat, 0) for name, x in (("text_embeds", pooled), ("time_ids", ids))
        }
        rows = text.repeat_interleave(repeat, 0)
        assert_close(
            f"step {i}", step(sample, i), PIPE.unet(sample, t, rows, added_cond_kwargs=added).sample, "unet"
        )


def test_it_says_what_fits_it():
    assert DENOISER.latent_channels == 4
    assert DENOISER.control_channels == (32, 64, 64, 64)
