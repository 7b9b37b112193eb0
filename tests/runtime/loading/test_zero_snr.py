"""runtime.loading.zero_snr: a schedule that ends at zero SNR is the same for every class of scheduler."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from runtime.errors import InputError
from runtime.loading.load import set_schedule
from runtime.loading.zero_snr import OPTION, spelled_out
from runtime.sampling.schedulers import make_scheduler

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", OPTION: True}


@pytest.mark.parametrize("kind", [LMSDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("more", [{}, {"num_train_timesteps": 500}, {"trained_betas": [0.004] * 1000}])
def test_a_class_without_the_option_has_the_alphas_of_one_that_has_it(kind, more):
    made = kind.from_config(spelled_out(kind, CONFIG | more))
    expected = EulerDiscreteScheduler(**CONFIG | more).alphas_cumprod
    torch.testing.assert_close(made.alphas_cumprod, expected, rtol=1e-3, atol=1e-9)


def test_what_needs_nothing_spelled_out_is_left_alone():
    assert spelled_out(DDIMScheduler, CONFIG) == CONFIG
    assert spelled_out(LMSDiscreteScheduler, CONFIG | {OPTION: False}) == CONFIG | {OPTION: False}


def test_betas_of_an_unknown_kind_are_said():
    with pytest.raises(InputError, match=f"scheduler PNDMScheduler: without {OPTION}: sigmoid is not impl"):
        spelled_out(PNDMScheduler, CONFIG | {"beta_schedule": "sigmoid"})


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_what_is_said_of_a_model_wins_where_its_own_file_says_nothing(tmp_path, kind):
    own = {
        "_class_name": kind.__name__,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(own))  # diffusers notes all others as defaults
    pipe = SimpleNamespace(scheduler=kind.from_pretrained(tmp_path))
    set_schedule(pipe, "v_prediction", True)
    config = pipe.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert float(pipe.scheduler.alphas_cumprod[-1]) < 1e-7


def test_a_file_that_says_zero_snr_and_no_betas_is_drawn_so(tmp_path):
    own = {"_class_name": "HeunDiscreteScheduler", "rescale_betas_zero_snr": True}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(own))
    scheduler = make_scheduler(None, HeunDiscreteScheduler.from_pretrained(tmp_path))
    assert float(scheduler.alphas_cumprod[-1]) < 1e-7
