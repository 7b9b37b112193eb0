"""Linear layers in float8: within the format's rounding, where they may be, and no others."""

import pytest
import torch
from torch import nn

from kernels.reference import FLOAT8, float8_rows
from runtime import LocalControlPipeline
from runtime.errors import InputError
from runtime.loading.load import from_diffusers
from runtime.optimize.fp8 import (
    Fp8Linear,
    StoredConv2d,
    StoredLinear,
    check_quantize,
    multiplies_here,
    quantize,
    to_fp8,
)
from tests.support.tiny import make_pipeline
from tests.support.tolerances import relative_rms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROUNDING = 2.0**-4 / 3**0.5  # RMS of rounding to 3 bits of mantissa, at most


needs_products = pytest.mark.skipif(
    not multiplies_here(torch.device("cpu")), reason="this torch has no float8 product on a CPU"
)
WITH_PRODUCTS = [pytest.param("cpu", marks=needs_products), pytest.param("cuda", marks=pytest.mark.gpu)]


def test_rows_fill_the_range_and_come_back():
    x = torch.randn(5, 64) * torch.tensor([[1e-3], [1.0], [1e3], [1e-20], [0.0]])
    stored, scale = to_fp8(x)
    assert stored.dtype == FLOAT8 and stored[:3].float().abs().amax(1).tolist() == [448.0] * 3
    for row in range(3):
        assert relative_rms(stored[row].float() * scale[row], x[row]) < ROUNDING
    assert stored.float().isfinite().all()
    assert not (stored[4].float() * scale[4]).any()


@torch.inference_mode()
@pytest.mark.parametrize("device", WITH_PRODUCTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 77, 64), (1, 64), (2, 3, 5, 64)])
def test_a_linear_layer(device, bias, shape):
    layer = nn.Linear(64, 48, bias=bias).to(device, torch.bfloat16)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    made = Fp8Linear(layer)(x)
    assert made.shape == (*shape[:-1], 48) and made.dtype == torch.bfloat16
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert relative_rms(made, exact) < 2**0.5 * ROUNDING  # of both sides


@needs_products
@torch.inference_mode()
def test_a_linear_layer_takes_rows_that_are_in_float8_and_compiles_whole():
    layer = Fp8Linear(nn.Linear(64, 48).bfloat16())
    x = torch.randn(2, 7, 64).bfloat16()
    made = layer(x)
    assert torch.equal(layer(float8_rows(x)), made)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), made) and torch.equal(compiled(float8_rows(x)), made)


def test_a_torch_without_the_product_is_refused_in_one_line(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Only per-tensor scaling is supported")

    multiplies_here.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(
        InputError, match="has no row-wise float8 product on cpu; use fp8-weights, or a newer"
    ):
        check_quantize("fp8", torch.device("cpu"), torch.bfloat16)
    check_quantize("fp8-weights", torch.device("cpu"), torch.bfloat16)
    multiplies_here.cache_clear()


def layers(unet, kind):
    return [name for name, module in unet.named_modules() if type(module) is kind]


@torch.inference_mode()
def test_a_unet_keeps_what_runs_once_per_image():
    unet = from_diffusers(make_pipeline().to(torch.bfloat16)).unet
    before = layers(unet, nn.Linear)
    quantize(unet, "fp8")
    left, exchanged = layers(unet, nn.Linear), layers(unet, Fp8Linear)
    assert set(left) | set(exchanged) == set(before) and exchanged
    assert all(
        name.endswith(("attn2.to_k", "attn2.to_v", "time_emb_proj")) or "embedding" in name for name in left
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", [pytest.param("fp8", marks=needs_products), "fp8-weights"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear projection", "convolution as projection"])
def test_a_whole_unet_is_near(name, linear):
    pipe = make_pipeline()
    theirs = type(pipe.unet).from_config({**pipe.unet.config, "use_linear_projection": linear}).bfloat16()
    pipe.unet = theirs
    unet = from_diffusers(pipe).unet
    given = torch.tensor([500.0]), torch.randn(2, 16), torch.ones(2, 6)
    text, sample = torch.randn(2, 77, 32).bfloat16(), torch.randn(2, 4, 8, 8).bfloat16()

    def run():
        time = [t[0] for t in unet.embed_time(*given)]
        return unet(sample, time, unet.project_text(text))

    expected, size = run(), stored(unet)
    quantize(unet, name)
    assert 0 < relative_rms(run(), expected) < 0.1
    assert (
        stored(unet) < 0.85 * size
    )  # convolutions, embeddings and the text's keys are a large part of this one


def stored(unet) -> int:
    return sum(t.nbytes for t in (*unet.parameters(), *unet.buffers()))


@needs_products
def test_a_pipeline():
    pipe = LocalControlPipeline.from_pretrained("embedded", dtype="bf16", quantize="fp8")
    plain = LocalControlPipeline.from_pretrained("embedded", dtype="bf16")
    call = {"prompt": "a red star on sand", "steps": 4, "seed": 0}
    assert 0 < relative_rms(pipe(**call).latents, plain(**call).latents) < 0.2


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("int4", torch.bfloat16, "quantize 'int4': unknown, expected fp8, fp8-weights"),
        (
            "fp8",
            torch.float32,
            "quantize fp8: float8 products give bfloat16, got float32; expected dtype bf16",
        ),
    ],
)
def test_what_does_not_go_together(name, dtype, message):
    with pytest.raises(InputError, match=message):
        check_quantize(name, torch.device("cpu"), dtype)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(32, 48), (2, 7, 32)), (nn.Conv2d(8, 16, 3, 2, 1), (2, 8, 9, 9))],
    ids=["linear", "conv"],
)
def test_a_layer_with_stored_weights_is_near_and_compiles_whole(layer, shape):
    stored = (StoredLinear if isinstance(layer, nn.Linear) else StoredConv2d)(layer)
    x = torch.randn(shape)
    made = stored(x)
    assert 0 < relative_rms(made, layer(x)) < ROUNDING
    assert torch.equal(torch.compile(stored, backend="eager", fullgraph=True)(x), made)
    assert stored.stored.dtype == FLOAT8 and stored.out_features == 16 * (
        3 if isinstance(layer, nn.Linear) else 1
    )
