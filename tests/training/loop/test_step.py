"""training.loop.step: a whole training step against plain diffusers, kornia and autograd."""

import itertools

import kornia
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from runtime.control.masks import mask_pyramid
from runtime.loading.load import EMBEDDED, load_model
from tests.support.tolerances import RELATIVE_RMS, relative_rms
from training.config import TrainConfig, with_preset
from training.loop.controls import new_adapter
from training.loop.step import LossOf

SIDES = (8, 8, 4, 4)  # of the features at 128 x 128 pixels

EDGES = {
    "sobel": kornia.filters.sobel,
    "laplacian": lambda z: kornia.filters.laplacian(z, 3, "replicate"),
    "mse": lambda z: z,
}
V_ONLY = "masked-input", "masked-features", "masked-z0", "masked-laplacian", "paper"


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(3, 1, 128, 128)
    mask[0, :, 20:90, 10:77] = 1
    mask[1] = 1
    mask[2, :, 64:, :] = torch.rand(64, 128, generator=generator)
    return {
        "latents": torch.randn(3, 4, 16, 16, generator=generator),
        "noise": torch.randn(3, 4, 16, 16, generator=generator),
        "condition": (torch.rand(3, 1, 128, 128, generator=generator) > 0.9).float(),
        "mask": mask,
        "text": torch.randn(3, 77, 192, generator=generator),
        "pooled": torch.randn(3, 96, generator=generator),
        "time_ids": torch.tensor([[128, 128, 0, 0, 128, 128], [200, 256, 0, 36, 128, 128], [99, 99, 4, 0, 128, 128.0]]),
        "t": torch.tensor([999, 400, 12]),
    }  # fmt: skip


def plain_step(unet, adapter, batch, abar, prediction, config):
    """What diffusers' trainer does, with the gate, kornia's edges and autograd."""
    alpha, sigma = (x[:, None, None, None] for x in (abar.sqrt(), (1 - abar).sqrt()))
    z0, noise, mask = batch["latents"], batch["noise"], batch["mask"]
    noisy = alpha * z0 + sigma * noise
    sizes = [(s, s) for s in SIDES]
    *gates, latent_mask = mask_pyramid(mask, [*sizes, (16, 16)], config.mask_resize)
    condition = batch["condition"] * mask if config.control == "input" else batch["condition"]
    features = adapter(condition)
    if config.control == "features":
        features = [f * g for f, g in zip(features, gates, strict=True)]
    added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    output = unet(
        noisy,
        batch["t"],
        batch["text"],
        added_cond_kwargs=added,
        down_intrablock_additional_residuals=features,
    ).sample
    if prediction == "v_prediction":
        target, predicted = alpha * noise - sigma * z0, alpha * noisy - sigma * output
    else:
        target, predicted = noise, (noisy - sigma * output) / alpha
    loss = F.mse_loss(output, target)
    edges = {
        "sobel": kornia.filters.sobel,
        "laplacian": lambda z: kornia.filters.laplacian(z, 3, "replicate"),
        "mse": lambda z: z,
    }
    if config.z0_loss != "off":
        find = edges[config.z0_loss]
        loss = loss + config.z0_weight * F.mse_loss(find(predicted) * latent_mask, find(z0) * latent_mask)
    return loss


@pytest.fixture(scope="module")
def diffusers_unet():
    return UNet2DConditionModel.from_pretrained(EMBEDDED / "unet").requires_grad_(False)


@pytest.mark.parametrize(
    ("preset", "prediction"),
    [*itertools.product(["masked-sobel", "global"], ["epsilon", "v_prediction"])]
    + [
        (name, "v_prediction")
        for name in ("masked-input", "masked-features", "masked-z0", "masked-laplacian", "paper")
    ],
)
def test_step_and_gradients_are_those_of_plain_diffusers_and_kornia(
    preset, prediction, batch, diffusers_unet
):
    config = with_preset(preset, {"dtype": "fp32"})
    model = load_model("embedded")
    model.scheduler.register_to_config(prediction_type=prediction)
    adapter = new_adapter(model.unet.config.control_channels, 1, 1)
    names, parameters = zip(*adapter.named_parameters(), strict=True)

    loss_of = LossOf(model, config)
    given = dict(batch)
    if config.control == "input":  # the loader's work
        given["condition"] = given["condition"] * given["mask"]
    ours = sum(term.mean() for term in loss_of(adapter, given).values())
    gradients = torch.autograd.grad(ours, parameters)

    abar = model.scheduler.alphas_cumprod[batch["t"]]
    plain = plain_step(diffusers_unet, adapter, batch, abar, prediction, config)
    expected = torch.autograd.grad(plain, parameters)

    limit = RELATIVE_RMS["unet gradient"][torch.float32]
    assert relative_rms(ours, plain) <= limit
    whole = relative_rms(
        torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in expected])
    )
    assert whole <= limit
    worst = max(
        zip((relative_rms(g, e) for g, e in zip(gradients, expected, strict=True)), names, strict=True)
    )
    assert worst[0] <= limit, worst


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_gets_gradients(checkpointing, batch):
    model = load_model("embedded")
    adapter = new_adapter(model.unet.config.control_channels, 1, 1)
    loss_of = LossOf(model, TrainConfig(dtype="fp32"))
    loss_of.unet.checkpointing = checkpointing
    sum(term.mean() for term in loss_of(adapter, batch).values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.unet.parameters())


def test_recomputed_activations_give_the_same_gradients(batch):
    model = load_model("embedded")
    adapter = new_adapter(model.unet.config.control_channels, 1, 1)
    loss_of, found = LossOf(model, TrainConfig(dtype="fp32")), []
    for loss_of.unet.checkpointing in (False, True):
        loss = sum(term.mean() for term in loss_of(adapter, batch).values())
        found.append(torch.autograd.grad(loss, list(adapter.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_recorded_before_the_first_injection(batch):
    """Autograd keeps nothing of the first level's two layers, which the control does not reach."""
    model = load_model("embedded")
    adapter = new_adapter(model.unet.config.control_channels, 1, 1)
    reached = {}
    for name, module in model.unet.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: reached.update({name: out}))
    LossOf(model, TrainConfig(dtype="fp32"))(adapter, batch)
    recorded = {name: out.requires_grad for name, out in reached.items() if isinstance(out, torch.Tensor)}
    assert not any(
        recorded[n] for n in ("conv_in", "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0")
    )
    assert recorded["down_blocks.1.resnets.0"] and recorded["mid_block"]


def test_what_lies_outside_the_mask_gets_no_control(batch):
    """With gated features a condition far outside the mask changes nothing; the loss there is the noise's alone."""
    model = load_model("embedded")
    adapter = new_adapter(model.unet.config.control_channels, 1, 1)
    given = {**batch, "mask": torch.zeros_like(batch["mask"])}
    terms = LossOf(model, TrainConfig(dtype="fp32"))(adapter, given)
    assert terms["z0"].abs().max() == 0
    assert not torch.autograd.grad(terms["noise"].sum(), list(adapter.parameters()))[0].any()


@pytest.mark.parametrize("dtype", ["bf16"])
def test_half_precision_is_near(dtype, batch):
    adapter, found = None, {}
    for name in ("fp32", dtype):
        model = load_model("embedded", dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[name])
        adapter = adapter or new_adapter(model.unet.config.control_channels, 1, 1)
        loss = sum(t.mean() for t in LossOf(model, TrainConfig(dtype=name))(adapter, batch).values())
        found[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapter.parameters()))])
    assert relative_rms(found[dtype], found["fp32"]) < RELATIVE_RMS["training step"][torch.bfloat16]
