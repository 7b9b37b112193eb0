"""runtime.sampling.progress: what `on_step` is shown, previews of every kind of scheduler, and stopping."""

import threading
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from runtime import Cancelled, InputError, LocalControlPipeline, Progress, Region
from runtime.loading.load import load_model
from runtime.model.latent_rgb import FILE, SDXL, fit
from runtime.optimize.offload import Offload
from runtime.sampling.progress import projection_of
from runtime.sampling.schedulers import SCHEDULERS, make_scheduler, set_timesteps
from tests.support import engines
from tests.support.tiny import make_adapter, make_pipeline

PROMPT = "a yellow star"


@cache
def pipe():
    return LocalControlPipeline.from_pretrained("embedded")


def test_it_is_told_every_step():
    seen = []
    result = pipe()(PROMPT, steps=3, seed=0, images_per_prompt=2, on_step=seen.append, output_type="latent")
    assert [(at.step, at.steps) for at in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(isinstance(at, Progress) and at.latents.shape == (2, 4, 16, 16) for at in seen)
    assert torch.equal(seen[-1].latents, result.latents)


def test_watching_changes_nothing():
    call = {"steps": 4, "seed": 0, "scheduler": "heun", "output_type": "latent"}
    watched = pipe()(PROMPT, on_step=lambda at: at.preview(), **call).latents
    assert torch.equal(watched, pipe()(PROMPT, **call).latents)


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_the_last_preview_is_the_picture_in_small(scheduler):
    if scheduler == "dpm++2m_sde":
        pytest.importorskip("torchsde")
    shown = []
    call = {"steps": 12, "guidance": 2.0, "seed": 0, "scheduler": scheduler}
    result = pipe()(PROMPT, on_step=lambda at: shown.append(at.preview()), **call)
    assert all(len(pictures) == 1 and pictures[0].size == (16, 16) for pictures in shown)
    small = np.asarray(result.images[0].resize((16, 16), Image.Resampling.BOX), float)
    off = [np.abs(np.asarray(pictures[0], float) - small).mean() for pictures in shown]
    assert off[-1] < 10 < off[0]  # grey levels


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", ["euler", "heun", "unipc"])
def test_the_denoised_latents_are_those_the_output_says(prediction, scheduler):
    """A UNet that always predicts the same z0 is previewed as that z0 at every step."""
    tiny = make_pipeline()
    tiny.scheduler.register_to_config(prediction_type=prediction)
    watched = LocalControlPipeline.from_diffusers(tiny)
    z0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    made = make_scheduler(scheduler, tiny.scheduler)
    set_timesteps(made, 5, torch.device("cpu"))
    sigmas = made.sigmas.tolist()  # over alpha

    def prepare(timesteps, *_):
        def step(sample, index):
            spread = (1 + sigmas[index] ** 2) ** 0.5
            alpha, sigma = 1 / spread, sigmas[index] / spread  # of the sample, which the scheduler has scaled
            eps = (sample - alpha * z0) / sigma
            return {"epsilon": eps, "sample": z0.expand_as(sample)}.get(prediction, alpha * eps - sigma * z0)

        return step

    watched.denoiser.prepare = prepare
    found = []
    watched(PROMPT, steps=5, seed=0, scheduler=scheduler, on_step=lambda at: found.append(at.denoised()))
    assert len(found) >= 5 and all((latents - z0).abs().max() < 1e-2 for latents in found)


@pytest.mark.parametrize("outside", ["free", "held"])
def test_cancelled_it_runs_no_further_step(outside):
    steps = []

    def on_step(at):
        steps.append(at.step)
        if at.step == 2:
            at.cancel()

    with pytest.raises(Cancelled, match="cancelled after step 2 of"):
        pipe()(PROMPT, steps=5, seed=0, on_step=on_step, outside=outside)
    assert steps == [1, 2]
    assert len(pipe()(PROMPT, steps=1, seed=0).images) == 1


def test_a_kept_one_is_of_its_own_step():
    kept, shown = [], []

    def on_step(at):
        kept.append(at)
        shown.append(np.asarray(at.preview()[0]))

    for scheduler in ("euler", "heun"):
        pipe()(PROMPT, steps=4, seed=0, scheduler=scheduler, on_step=on_step)
    assert all(
        np.array_equal(np.asarray(at.preview()[0]), then) for at, then in zip(kept, shown, strict=True)
    )


def test_it_may_be_cancelled_later_and_from_elsewhere():
    kept = []

    def on_step(at):
        kept.append(at)
        if at.step == 3:
            thread = threading.Thread(target=kept[0].cancel)
            thread.start()
            thread.join()

    with pytest.raises(Cancelled, match="cancelled after step 3 of 5"):
        pipe()(PROMPT, steps=5, seed=0, on_step=on_step)
    assert len(kept) == 3


def test_a_schedulers_own_z0_is_shown():
    """DDIM by its class clips what it predicts, unless it is told not to."""
    shown = []
    scheduler = DDIMScheduler.from_config(pipe().model.scheduler.config, clip_sample=True)
    call = {"steps": 6, "seed": 0, "scheduler": scheduler, "output_type": "latent"}
    pipe()(PROMPT, on_step=lambda at: shown.append(at.denoised()), **call)
    assert len(shown) == 6 and all(z0.abs().max() <= 1 for z0 in shown)


def test_its_latents_can_be_decoded_where_parts_wait():
    model = load_model("embedded")
    waiting = LocalControlPipeline(model, {}, offload=Offload(model, torch.device("cpu"), "model"))
    shown = []
    waiting(PROMPT, steps=2, seed=0, on_step=lambda at: shown.append(waiting.decode(at.latents)))
    assert [tuple(pixels.shape) for pixels in shown] == [(1, 3, 128, 128)] * 2


@pytest.mark.parametrize("on_step", [5, "x"])
def test_what_cannot_be_called_is_refused(on_step):
    with pytest.raises(InputError, match="on_step: a (int|str); expected a function"):
        pipe()(PROMPT, steps=2, on_step=on_step)


def test_what_it_raises_comes_out():
    with pytest.raises(ZeroDivisionError):
        pipe()(PROMPT, steps=3, seed=0, on_step=lambda at: 1 // 0)


def test_a_vae_that_is_not_known_is_fitted_once(monkeypatch):
    tiny = make_pipeline()
    assert LocalControlPipeline.from_diffusers(tiny).model.latent_rgb is SDXL  # by its scaling factor
    tiny.vae.register_to_config(scaling_factor=0.5)
    other, calls = LocalControlPipeline.from_diffusers(tiny), []
    monkeypatch.setattr("runtime.sampling.progress.fit", lambda vae: calls.append(vae) or fit(vae))
    shown = []
    other(PROMPT, steps=2, seed=0, on_step=lambda at: shown.extend(at.preview()))
    assert len(shown) == 2 and calls == [other.model.vae]


def test_engines_have_their_vaes(tmp_path):
    folder = engines.copy_folder("onnxruntime", tmp_path / "engines")
    found = LocalControlPipeline.from_engine(folder).model
    assert torch.equal(projection_of(found).factors, projection_of(engines.model()).factors)
    found.latent_rgb = None
    with pytest.raises(InputError, match=f"preview: the engines have no {FILE}; rebuild them"):
        projection_of(found)


def test_adapters_do_not_mind():
    watched = LocalControlPipeline.from_diffusers(make_pipeline(), {"canny": make_adapter()})
    regions = [Region(torch.rand(1, 1, 64, 64))]
    assert watched(PROMPT, regions, steps=2, seed=0, on_step=lambda at: at.preview()).images
