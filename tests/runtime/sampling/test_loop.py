"""The denoising loop: exact where the answer is known, diffusers' schedulers by name, noise from each image's seed."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from runtime.errors import InputError
from runtime.sampling.loop import denoise
from runtime.sampling.request import guided_steps
from runtime.sampling.schedulers import SCHEDULERS, make_scheduler, set_timesteps

DEFAULT = EulerDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample"
)


def run(scheduler, output, guidance=1.0, seeds=(0,)):
    """Denoise with a model whose output is a fixed tensor, or a function of (sample, index)."""
    set_timesteps(scheduler, 8, torch.device("cpu"))
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    noise = torch.cat([torch.randn(1, 4, 3, 5, generator=g) for g in generators])
    step = output if callable(output) else lambda sample, i: output.expand_as(sample)
    return denoise(step, scheduler, noise, guidance, generators)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n != "lcm" and not n.startswith("euler_a")])
def test_a_model_that_knows_the_answer_arrives_at_it(name):
    """Prediction type "sample": whatever the scheduler, the last step gives what the model says.

    LCM ends elsewhere by design; diffusers' Euler ancestral does not have that prediction type.
    """
    scheduler = make_scheduler(name, DEFAULT)
    assert scheduler.config.prediction_type == "sample"
    answer = torch.linspace(-1, 1, 60).view(1, 4, 3, 5)
    assert (run(scheduler, answer) - answer).abs().max() < 0.05


@pytest.mark.parametrize("name", SCHEDULERS)
def test_names_give_diffusers_classes_with_the_models_noise_schedule(name):
    scheduler = make_scheduler(name, DEFAULT)
    assert type(scheduler) is getattr(diffusers, SCHEDULERS[name][0])
    assert scheduler.config.beta_start == 0.00085
    assert scheduler.config.beta_schedule == "scaled_linear"


def test_a_class_name_an_instance_and_none_are_schedulers():
    assert type(make_scheduler("PNDMScheduler", DEFAULT)).__name__ == "PNDMScheduler"
    given = DDIMScheduler(num_train_timesteps=500)
    made = make_scheduler(given, DEFAULT)
    assert made is not given  # its state is one run's
    assert made.config.num_train_timesteps == 500
    assert type(make_scheduler(None, DEFAULT)) is EulerDiscreteScheduler


@pytest.mark.parametrize("name", ["eulr", "Scheduler", "UNet2DConditionModel", "__class__Scheduler", ""])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(InputError, match=r"is unknown; expected one of euler, "):
        make_scheduler(name, DEFAULT)


def test_guidance_extrapolates_from_the_negative_rows():
    negative, positive = torch.full((1, 4, 3, 5), 1.0), torch.full((1, 4, 3, 5), 2.0)
    seen = []

    def model(sample, i):
        seen.append(len(sample))
        assert torch.equal(*sample.chunk(2))
        return torch.cat([negative, positive])

    result = run(make_scheduler("ddim", DEFAULT), model, guidance=3.0)
    assert seen == [2] * 8
    assert torch.allclose(result, run(make_scheduler("ddim", DEFAULT), torch.tensor(1 + 3.0 * (2 - 1))))


def test_guidance_acts_in_its_range_only():
    seen = []

    def model(sample, i):
        seen.append(len(sample))
        return torch.zeros_like(sample)

    scheduler = make_scheduler("ddim", DEFAULT)
    set_timesteps(scheduler, 8, torch.device("cpu"))
    denoise(model, scheduler, torch.randn(3, 4, 3, 5), 5.0, [], guidance_range=(0.25, 0.7))
    assert seen == [3, 3, 6, 6, 6, 3, 3, 3]  # 0.7 is within the sixth of eight steps, which it leaves out


def test_which_steps_are_guided():
    assert guided_steps(5.0, (0, 1), 3) == [True] * 3
    assert guided_steps(1.0, (0, 1), 3) == [False] * 3
    assert guided_steps(5.0, (0, 0.5), 4) == [True, True, False, False]
    assert guided_steps(5.0, (0.9, 1.0), 3) == [False] * 3


@pytest.mark.parametrize("name", ["euler_a", "euler_a_trailing", "lcm", "dpm++2m_sde", "ddpm"])
def test_schedulers_that_draw_noise_draw_it_from_each_images_generator(name):
    output = torch.zeros(1)

    def middle(seeds):  # before the last step, where the noise still shows
        states = []

        def model(sample, i):
            states.append(sample.clone())
            return output.expand_as(sample)

        epsilon = EulerDiscreteScheduler.from_config(DEFAULT.config, prediction_type="epsilon")
        run(make_scheduler(name, epsilon), model, seeds=seeds)
        return states[-1]

    both, first, second = middle((1, 2)), middle((1,)), middle((2,))
    assert torch.equal(both, torch.cat([first, second]))
    assert not torch.equal(first, second)


def test_steps_that_a_scheduler_refuses_are_bad_input():
    with pytest.raises(InputError, match="steps 2000: "):
        set_timesteps(make_scheduler("ddpm", DEFAULT), 2000, torch.device("cpu"))
