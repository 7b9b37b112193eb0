"""The kernels of sobel_z0_loss and noise_and_z0_loss against the reference in float64, and against kornia.

Sizes are as small as the case allows: the interpreter takes milliseconds for every row of a strip.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels import sobel_z0_loss as kernel
from kernels.checks import EDGES, PREDICTION_TYPES
from kernels.launching import launch
from tests.support.kernel_cases import (
    CUTS,
    DEVICE,
    NCHW,
    NHWC,
    assert_compiles,
    assert_compiles_once,
    assert_matches,
    loss_by_kornia,
    loss_case,
    poisoned,
    random,
    uniform,
)
from tests.support.tolerances import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {"size": (3, 5), "channels": 2, "layout": NHWC}


def case(*args, **kwargs):
    """As `loss_case`, with the gradient of the model output asked for."""
    output, *rest = loss_case(*args, **kwargs)
    return output.requires_grad_(), *rest


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_of_every_edge(prediction_type, edges):
    loss = assert_matches("sobel_z0_loss", *case(**SMALL), prediction_type, edges=edges)
    assert loss.shape == (2,) and loss.dtype == FP32
    exact = [t.double() for t in loss_case(**SMALL)]
    assert_close("kornia's loss", loss, loss_by_kornia(*exact, prediction_type, edges))


@pytest.mark.parametrize(("prediction_type", "edges"), list(zip(PREDICTION_TYPES, EDGES, strict=True)))
def test_the_noise_term_comes_with_it(prediction_type, edges):
    """Gradients of both terms at once, with different weights for each sample and term."""
    noise, edge = assert_matches("noise_and_z0_loss", *case(**SMALL), prediction_type, edges=edges)
    assert noise.shape == edge.shape == (2,) and noise.dtype == edge.dtype == FP32


def test_the_noise_term_changes_no_bit_of_the_other():
    output, *rest = case(**SMALL)
    with ops.use_backend("triton"), poisoned():
        losses = ops.noise_and_z0_loss(output, *rest)[1], ops.sobel_z0_loss(output, *rest)
        gradients = [torch.autograd.grad(loss.sum(), output)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*gradients)
    assert gradients[0].stride() == output.stride()


# Below three rows or columns every pixel is at two borders; 1 x 1 is flat.
BORDERS = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (1, 7), (7, 1)]


@pytest.mark.parametrize(
    ("size", "edges"),
    [*((size, "sobel") for size in BORDERS), *((size, "laplacian") for size in BORDERS[1:6])],
    ids=str,
)
def test_borders(size, edges):
    args = case(size, channels=5, batch=1, masks=1, layout=NHWC)  # five: three pixels alone may be all alike
    loss = assert_matches("sobel_z0_loss", *args, "v_prediction", edges=edges)
    exact = [t.double() for t in args]
    assert_close("kornia's loss", loss, loss_by_kornia(*exact, "v_prediction", edges))


@pytest.mark.parametrize(
    ("size", "channels", "layout"),
    [
        pytest.param((4, 2), 1, NCHW, id="exactly one strip"),
        pytest.param((5, 2), 2, NHWC, id="a second strip of one row"),
        pytest.param((9, 2), 1, NCHW, id="three strips, the middle one between other programs' rows"),
        pytest.param((2, 129), 1, NCHW, id="a second tile of one column"),
        pytest.param((2, 43), 3, NHWC, id="a pixel's channels on both sides of a tile's edge"),
    ],
)
def test_strips_and_tiles(size, channels, layout):
    args = case(size, channels=channels, batch=1, masks=1, layout=layout)
    assert_matches("noise_and_z0_loss", *args)


@pytest.mark.parametrize("height", [16, 17, 33])
def test_strips_of_many_images_are_longer(height, monkeypatch):
    monkeypatch.setattr(launch, "strip", lambda *_: {"ROWS": 16, "BLOCK": 2, "num_warps": 1})
    args = case((height, 2), channels=1, batch=1, masks=1, layout=NCHW)
    assert_matches("noise_and_z0_loss", *args)


@pytest.mark.parametrize(
    ("dtype", "layout", "masks"),
    [
        pytest.param(BF16, NHWC, 1, id="bf16 nhwc, one mask"),
        pytest.param(BF16, NCHW, 2, id="bf16 nchw, two masks"),
        pytest.param(FP16, NHWC, 2, id="fp16 nhwc, two masks"),
        pytest.param(FP16, NCHW, 1, id="fp16 nchw, one mask"),
    ],
)
def test_low_precision(dtype, layout, masks):
    """Read as it is and computed in float32: the losses are as exact as those of float32."""
    args = case((2, 3), dtype, masks, channels=2, layout=layout)
    losses = assert_matches("noise_and_z0_loss", *args, "v_prediction")
    assert all(loss.dtype == FP32 for loss in losses)


@pytest.mark.parametrize(
    ("cut", "layout"),
    [
        *(pytest.param(cut, NHWC, id=f"{cut} nhwc") for cut in CUTS),
        *(pytest.param(cut, NCHW, id=f"{cut} nchw") for cut in ("channel slice", "column slice")),
    ],
)
def test_slices(cut, layout):
    """The base around a slice is NaN: a tap that left the image would be found."""
    batch = 2 if "channel" in cut else 1  # there the stride of a row is not its length
    *tensors, alpha, sigma = loss_case((2, 3), masks=batch, channels=2, batch=batch, layout=layout)
    tensors = [CUTS[cut](t) for t in tensors]
    assert_matches("sobel_z0_loss", tensors[0].requires_grad_(), *tensors[1:], alpha, sigma)


def test_expanded_arguments_and_gradients():
    output, _, _, _, alpha, sigma = loss_case((3, 4), channels=2)
    row, plane = (
        random(1, 2, 3, 4, seed=7).expand(2, -1, -1, -1),
        random(2, 1, 3, 4, seed=8).expand(-1, 2, -1, -1),
    )
    args = row.requires_grad_(), plane, output, uniform(1, 1, 1, 4).expand(2, -1, 3, -1)
    assert_matches(
        "sobel_z0_loss", *args, alpha[:1].expand(2), sigma, gradients=lambda t: random(1).expand_as(t)
    )


def test_layouts_and_dtypes_may_differ():
    """A bfloat16 UNet in NHWC between float32 latents in NCHW."""
    output, noisy, latents, mask, alpha, sigma = loss_case((3, 4), channels=3)
    output = output.to(BF16, memory_format=NHWC).requires_grad_()
    args = output, noisy, latents.contiguous(memory_format=NHWC), mask.half(), alpha, sigma
    assert_matches("noise_and_z0_loss", *args)


def test_the_same_bits_twice():
    """Partial sums of several programs are added in a fixed order."""
    args = case((2, 3), channels=3, batch=1, masks=1)
    runs = []
    for _ in range(2):
        with ops.use_backend("triton"), poisoned():
            losses = torch.stack(ops.noise_and_z0_loss(*args))
            runs.append((losses, torch.autograd.grad(losses.sum(), args[0])[0]))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_the_truth_and_an_empty_mask_cost_nothing():
    output, noisy, latents, mask, alpha, sigma = case(**SMALL)
    truth = latents.clone().requires_grad_()
    with ops.use_backend("triton"), poisoned():
        for prediction, weights in ((truth, mask), (output, torch.zeros_like(mask))):
            loss = ops.sobel_z0_loss(prediction, noisy, latents, weights, alpha, sigma, "sample")
            (gradient,) = torch.autograd.grad(loss.sum(), prediction)
            assert not loss.any() and not gradient.any()


@settings(max_examples=4)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    channels=st.integers(1, 2),
    rows=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    layout=st.sampled_from([NCHW, NHWC]),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    edges=st.sampled_from(EDGES),
)
def test_any_shape(size, channels, rows, layout, prediction_type, edges):
    batch, masks = rows
    args = case(size, FP32, masks, channels=channels, batch=batch, layout=layout)
    assert_matches("noise_and_z0_loss", *args, prediction_type, edges=edges)


def test_operators_are_registered_well():
    args = *case((1, 2), channels=1, batch=1, masks=1), "epsilon", "sobel", True
    torch.library.opcheck(kernel.z0_losses_op, args)
    frozen = *loss_case((1, 2), channels=1, batch=1, masks=1), *args[6:]
    torch.library.opcheck(kernel.z0_losses_backward_op, (torch.ones(2, 1, device=DEVICE), *frozen))


@pytest.mark.parametrize("noise", [False, True], ids=["edges", "edges and noise"])
def test_compiles(noise):
    def function(output, *rest):
        if noise:
            of_noise, of_edges = ops.noise_and_z0_loss(output * 2, *rest, "v_prediction")
            return of_noise + 3 * of_edges
        return ops.sobel_z0_loss(output * 2, *rest, "v_prediction").sqrt()

    assert_compiles(function, *case((1, 2), channels=2, layout=NHWC))


def test_compiles_once_for_all_sizes():
    calls = [case((1, width), channels=1, batch=batch, masks=1) for batch, width in ((2, 5), (3, 7))]
    assert_compiles_once(ops.sobel_z0_loss, *calls)


def test_no_samples_no_losses():
    with ops.use_backend("triton"):
        output, *rest = (t[:0] for t in loss_case(masks=2))
        losses = ops.noise_and_z0_loss(output.requires_grad_(), *rest)
        assert [loss.shape for loss in losses] == [(0,), (0,)]
        sum(losses).sum().backward()
    assert output.grad.shape == output.shape
