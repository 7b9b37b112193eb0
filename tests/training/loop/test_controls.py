"""training.loop.controls: ControlNets trained as adapters are: against plain diffusers, saved, gone on with, drawn."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file

from runtime import LocalControlPipeline, Region
from runtime.control.masks import mask_pyramid
from runtime.loading.load import EMBEDDED, load_model
from tests.support.tiny import make_adapter, make_pipeline, make_union
from tests.support.tolerances import RELATIVE_RMS, relative_rms
from tests.support.training_runs import make_scenes, train
from training.config import METHODS, with_preset
from training.loop.checkpoint import WEIGHTS, newest
from training.loop.controls import condition_channels, new_controlnet
from training.loop.step import LossOf

CONFIG = {"dtype": "fp32"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert train(scenes, out, "--preset=masked-controlnet", "--steps=2") == 0
    return out


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 1, 128, 128)
    mask[0, :, 20:90, 10:77] = 1
    mask[1, :, 64:, :] = torch.rand(64, 128, generator=generator)
    return {
        "latents": torch.randn(2, 4, 16, 16, generator=generator),
        "noise": torch.randn(2, 4, 16, 16, generator=generator),
        "condition": torch.rand(2, 3, 128, 128, generator=generator),
        "mask": mask,
        "text": torch.randn(2, 77, 192, generator=generator),
        "pooled": torch.randn(2, 96, generator=generator),
        "time_ids": torch.full((2, 6), 128.0),
        "t": torch.tensor([400, 12]),
    }


def acting(net):
    """A new ControlNet whose layers that start at zero add something."""
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_"):
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def test_step_and_gradients_are_those_of_plain_diffusers(batch):
    torch.manual_seed(0)
    model, config = load_model("embedded"), with_preset("masked-controlnet", CONFIG)
    net = acting(new_controlnet(model.unet))
    names, parameters = zip(*net.named_parameters(), strict=True)
    ours = sum(term.mean() for term in LossOf(model, config)(net, batch).values())
    gradients = torch.autograd.grad(ours, parameters)

    abar = model.scheduler.alphas_cumprod[batch["t"]][:, None, None, None]
    noisy = abar.sqrt() * batch["latents"] + (1 - abar).sqrt() * batch["noise"]
    added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    given = {"added_cond_kwargs": added, "return_dict": False}
    down, mid = net(noisy, batch["t"], batch["text"], batch["condition"], **given)
    gates = mask_pyramid(batch["mask"], [tuple(r.shape[2:]) for r in (*down, mid)])
    *down, mid = (r * gate for r, gate in zip((*down, mid), gates, strict=True))
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED / "unet").requires_grad_(False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    output = unet(noisy, batch["t"], batch["text"], **residuals, **given)[0]
    if model.scheduler.config.prediction_type == "v_prediction":
        target = abar.sqrt() * batch["noise"] - (1 - abar).sqrt() * batch["latents"]
    else:
        target = batch["noise"]
    plain = F.mse_loss(output, target)
    expected = torch.autograd.grad(plain, parameters)

    limit = RELATIVE_RMS["unet gradient"][torch.float32]
    assert relative_rms(ours, plain) <= limit
    assert (
        relative_rms(*(torch.cat([g.flatten() for g in found]) for found in (gradients, expected))) <= limit
    )
    assert all(g.abs().max() > 0 for name, g in zip(names, gradients, strict=True) if ".norm" not in name)


def test_a_new_one_is_the_unets_encoder_and_adds_nothing(batch):
    model = load_model("embedded")
    net = new_controlnet(model.unet)
    unet = dict(UNet2DConditionModel.from_pretrained(EMBEDDED / "unet").named_parameters())
    shared = [name for name, _ in net.named_parameters() if not name.startswith("controlnet_")]
    assert shared and all(torch.equal(net.get_parameter(name), unet[name].float()) for name in shared)
    assert condition_channels(net) == 3
    residuals = LossOf(model, with_preset("masked-controlnet", CONFIG)).features(net, batch)
    assert len(residuals) == 7 and not any(r.any() for r in residuals)


def test_recomputed_activations_give_the_same_gradients(batch):
    torch.manual_seed(0)
    model, config = load_model("embedded"), with_preset("masked-controlnet", CONFIG)
    loss_of, net, found = LossOf(model, config), acting(new_controlnet(model.unet)).train(), []
    for recomputed in (False, True):
        loss_of.unet.checkpointing = recomputed
        if recomputed:
            net.enable_gradient_checkpointing()
        loss = sum(term.mean() for term in loss_of(net, batch).values())
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    assert relative_rms(found[1], found[0]) <= RELATIVE_RMS["unet gradient"][torch.float32]


def test_the_result_loads_in_diffusers_and_draws_in_the_pipeline(finished):
    theirs = ControlNetModel.from_pretrained(finished)
    assert theirs.config.conditioning_channels == 3
    pipe = LocalControlPipeline.from_pretrained("embedded", {"edges": finished})
    assert list(pipe.controlnets) == ["edges"] and "edges" not in pipe.adapters
    call = {"steps": 2, "seed": 0, "output_type": "latent"}
    condition = torch.rand(1, 1, 128, 128)
    drawn = pipe("a red circle", [Region(condition, adapter="edges")], **call).latents
    assert not torch.equal(drawn, pipe("a red circle", **call).latents)


def test_a_run_goes_on_and_from_another_ones_result(finished, scenes, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, steps in ((whole, 4), (parts, 2), (parts, 4)):
        assert train(scenes, out, "--preset=masked-controlnet", f"--steps={steps}") == 0
    weights = [load_file(out / WEIGHTS) for out in (whole, parts)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    kind = json.loads((newest(parts)[-1] / "ema" / "config.json").read_text())["_class_name"]
    assert kind == "ControlNetModel"
    assert (
        train(scenes, tmp_path / "on", "--preset=masked-controlnet", "--steps=1", f"--adapter={finished}")
        == 0
    )


def test_the_sheet_while_it_trains(scenes, tmp_path):
    more = ("--preset=masked-controlnet", "--steps=1", "--validate-every=1", "--validation-steps=2")
    assert train(scenes, tmp_path, *more, "--checkpointing=on") == 0
    assert (tmp_path / "validation" / "00000001.png").exists()


def test_one_kind_where_the_other_is_expected(finished, scenes, tmp_path, capsys):
    make_adapter().save_pretrained(tmp_path / "adapter")
    make_union(make_pipeline().unet).save_pretrained(tmp_path / "union")
    for control, other, said in (
        ("controlnet", tmp_path / "union", "a ControlNet-Union; expected a ControlNet of one control"),
        ("controlnet", tmp_path / "adapter", "a T2I-Adapter; expected a ControlNet for SDXL"),
        ("features", finished, "_class_name is ControlNetModel, expected T2IAdapter"),
    ):
        assert train(scenes, tmp_path / control, f"--control={control}", f"--adapter={other}") == 2
        assert capsys.readouterr().err.count(said) == 1


def test_the_method_is_a_preset():
    assert METHODS["masked-controlnet"] == {"control": "controlnet", "z0_loss": "off"}
