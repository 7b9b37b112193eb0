"""The graphs' modules against diffusers' and transformers' own models, and what their ports say of them."""

import pytest
import torch

from export.graphs import make_components
from runtime.engines.denoiser import constant_inputs
from runtime.engines.ports import Axis
from tests.support import engines, saved_model
from tests.support.tiny import make_adapter
from tests.support.tolerances import assert_close


def inputs(name: str, index: int = 2) -> dict[str, torch.Tensor]:
    """Inputs of the largest size."""
    component = engines.component(name)
    return engines.random_inputs(component.inputs, engines.sizes_of(component, index))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_text_encoders(name):
    given = inputs(name)
    made = engines.run_torch(engines.component(name), given)
    theirs = getattr(saved_model.pipeline(), name)(given["ids"], output_hidden_states=True)
    assert_close("states", made.pop("states"), theirs.hidden_states[-2], "unet")
    if name == "text_encoder_2":
        assert_close("pooled", made.pop("pooled"), theirs.text_embeds, "unet")
    assert not made


@torch.inference_mode()
@pytest.mark.parametrize("control", [True, False], ids=["control", "no control"])
@pytest.mark.parametrize("timestep", [999.0, 1.0])
def test_unet(control, timestep):
    given, unet = inputs("unet"), engines.model().unet
    rows = len(given["sample"])
    text, pooled, ids = (
        torch.randn(rows, 77, 32),
        torch.randn(rows, 16),
        torch.randint(1, 999, (rows, 6)).float(),
    )
    (time,), constant = constant_inputs(unet, torch.tensor([timestep]), text, pooled, ids)
    given |= {"time": time, **constant}
    levels = [given[f"level_{i}"].mul_(control).expand(rows, -1, -1, -1) for i in range(4)]
    made = engines.run_torch(engines.component("unet"), given)
    theirs = saved_model.pipeline().unet(
        given["sample"],
        timestep,
        text,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
        down_intrablock_additional_residuals=levels if control else None,
    )
    assert_close("prediction", made["prediction"], theirs.sample, "unet")


@torch.inference_mode()
def test_adapter():
    given = inputs("adapter_canny")
    made = engines.run_torch(engines.component("adapter_canny"), given)
    for i, feature in enumerate(make_adapter()(given["condition"])):
        gated = given["strengths"][i] * given[f"mask_{i}"] * feature
        assert_close(f"level_{i}", made[f"level_{i}"], gated, "unet")


@torch.inference_mode()
def test_vae():
    latents, pixels = inputs("vae_decoder"), inputs("vae_encoder")
    decoded = engines.run_torch(engines.component("vae_decoder"), latents)
    encoded = engines.run_torch(engines.component("vae_encoder"), pixels)
    vae = saved_model.pipeline().vae
    assert_close("pixels", decoded["pixels"], vae.decode(latents["latents"]).sample, "unet")
    moments = vae.encode(pixels["pixels"]).latent_dist.parameters
    assert_close("moments", encoded["moments"], moments, "unet")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", engines.ENGINES)
def test_outputs_are_what_the_ports_say(name, precision):
    component = engines.component(name, precision)
    sizes = engines.sizes_of(component, 2)
    made = engines.run_torch(component, engines.random_inputs(component.inputs, sizes))
    for port in component.outputs:
        assert made[port.name].shape == port.sized(sizes), port.name
        assert made[port.name].dtype == port.dtype, port.name


def test_the_unets_inputs():
    """Latents in float32; time, text and control in what it computes in."""
    ports = {port.name: port for port in engines.component("unet", "bf16").inputs}
    wide = {name for name, port in ports.items() if port.dtype == torch.float32}
    assert wide == {"sample"}
    assert ports["sample"].shape == (Axis("rows"), 4, Axis("height", 8), Axis("width", 8))
    widths = [
        m.time_emb_proj.out_features for m in engines.model().unet.modules() if hasattr(m, "time_emb_proj")
    ]
    assert ports["time"].shape == (Axis("rows"), sum(widths))
    assert ports["key_0"].shape == ports["value_0"].shape == (Axis("rows"), 4, 77, 16)
    assert ports["level_3"].shape == (Axis("rows"), 64, Axis("height", 32), Axis("width", 32))


def test_a_vae_that_overflows_in_float16_stays_in_float32():
    weights = engines.component("vae_decoder", "fp16").module.parameters()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_adapter_stands_for_every_adapter():
    adapters = {"canny": make_adapter(), "colour": make_adapter(in_channels=3)}
    made = list(make_components(engines.model(), adapters, ["adapter", "unet"]))
    assert [component.name for component in made] == ["adapter_canny", "adapter_colour", "unet"]
    assert [component.inputs[0].shape[1] for component in made[:2]] == [1, 3]
