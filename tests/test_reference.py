"""kernels.reference against its definitions, row by row in float64, and against kornia."""

import kornia
import pytest
import torch

from kernels import reference
from tests.tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inject_rows(hidden, features, masks, scales, batch):
    """The definition, one row and one region at a time, in float64."""
    rows = []
    for i, row in enumerate(hidden.double()):
        for r, feature in enumerate(features):
            term = scales[r].double() * feature.double()[i % batch % len(feature)]
            if masks is not None and masks[r] is not None:
                term = term * masks[r].double()[i % batch % len(masks[r])]
            row = row + term
        rows.append(row)
    return torch.stack(rows)


# guidance halves, features' batch, rows of each region's feature and mask (None: no mask), size
SHAPES = {
    "one row": (1, 1, [(1, 1)], (4, 5, 7)),
    "guidance": (2, 1, [(1, 1)], (8, 4, 4)),
    "guidance of three images, mixed rows": (2, 3, [(3, 1), (1, 3), (3, 3), (1, 1)], (4, 3, 5)),
    "some masks missing": (2, 2, [(2, None), (1, 2), (1, None)], (4, 2, 3)),
    "one pixel, one channel": (2, 2, [(2, 2)], (1, 1, 1)),
}


def make(shape, dtype, layout=torch.contiguous_format):
    halves, batch, rows, size = SHAPES[shape]
    hidden = random(halves * batch, *size, dtype=dtype).contiguous(memory_format=layout)
    features = [random(n, *size, dtype=dtype, seed=1 + r) for r, (n, _) in enumerate(rows)]
    masks = [None if m is None else uniform(m, 1, *size[1:], seed=9 + r) for r, (_, m) in enumerate(rows)]
    return hidden, features, masks, torch.linspace(-0.5, 1.5, len(rows)), batch


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in-place"])
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_inject_is_its_definition(shape, dtype, layout, inplace):
    hidden, features, masks, scales, batch = make(shape, dtype, layout)
    expected = inject_rows(hidden, features, masks, scales, batch)
    before, strides = hidden.clone(), hidden.stride()
    out = reference.inject(hidden, features, masks, scales, inplace=inplace)
    assert out.dtype == dtype and out.stride() == strides
    assert_close("sum", out, expected)
    assert (out is hidden) == inplace
    if not inplace:
        assert torch.equal(hidden, before)


def test_inject_without_masks_or_regions():
    hidden, features, _, scales, batch = make("guidance of three images, mixed rows", torch.float32)
    expected = inject_rows(hidden, features, None, scales, batch)
    assert_close("no masks", reference.inject(hidden, features, None, scales), expected)
    alone = reference.inject(hidden, [], None, torch.zeros(0))
    assert torch.equal(alone, hidden) and alone is not hidden
    assert reference.inject(hidden, [], [], torch.zeros(0), inplace=True) is hidden


def test_inject_in_place_into_a_slice():
    whole = random(2, 4, 6, 6)
    hidden = whole[:, :, 1:5, 2:6]  # neither contiguous nor channels_last
    rest = whole.clone()
    expected = inject_rows(hidden, [torch.ones(1, 4, 4, 4)], None, torch.ones(1), 1)
    reference.inject(hidden, [torch.ones(1, 4, 4, 4)], None, torch.ones(1), inplace=True)
    assert_close("slice", whole[:, :, 1:5, 2:6], expected)
    whole[:, :, 1:5, 2:6] = rest[:, :, 1:5, 2:6]
    assert torch.equal(whole, rest)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in-place"])
def test_inject_rounds_once(inplace):
    """bfloat16 steps by 2 above 256: three halves added one at a time would all be lost."""
    hidden = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16)
    halves = [torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16)] * 3
    assert reference.inject(hidden, halves, None, torch.ones(3), inplace=inplace).item() == 258


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inject_where_the_mask_is_zero_changes_no_bit(dtype):
    hidden, feature = random(2, 4, 3, 3, dtype=dtype), random(1, 4, 3, 3, dtype=dtype, seed=1)
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 1, 1] = 0.5
    out = reference.inject(hidden, [feature], [mask], torch.ones(1))
    changed = (out != hidden).any(dim=(0, 1))
    assert changed.nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_inject_gradients(shape):
    hidden, features, masks, scales, _ = make(shape, torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, *features)]

    def op(hidden, *features):
        return reference.inject(hidden, features, masks, scales)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(2, 4, 3)},
            r"hidden must be a float \(G\*B, C, H, W\), got float32 \(2, 4, 3\)",
        ),
        ({"hidden": torch.zeros(4, 4, 3, 3, dtype=torch.int64)}, "hidden must be a float .* got int64"),
        ({"hidden": torch.zeros(3, 4, 3, 3)}, "hidden's batch 3 is no multiple of the features' batch 2"),
        ({"features": [torch.zeros(2, 4, 3, 2)]}, r"features\[0\] must be .* got float32 \(2, 4, 3, 2\)"),
        ({"features": [torch.zeros(2, 8, 3, 3)]}, r"features\[0\] must be a float \(2 or 1, 4, 3, 3\)"),
        ({"features": [torch.zeros(2, 4, 3, 3, dtype=torch.uint8)]}, r"features\[0\] .* got uint8"),
        ({"features": [torch.zeros(2, 4, 3, 3)] * 2}, "2 features need as many masks, got 1"),
        ({"masks": [torch.zeros(2, 4, 3, 3)]}, r"masks\[0\] must be a float \(2 or 1, 1, 3, 3\)"),
        ({"masks": [torch.zeros(2, 1, 3, 3, dtype=torch.bool)]}, r"masks\[0\] .* got bool"),
        ({"scales": torch.zeros(2)}, r"scales must be a float \(1,\), one a region, got float32 \(2,\)"),
        ({"scales": torch.zeros(1, dtype=torch.int64)}, "scales must be a float .* got int64"),
    ],
)
def test_inject_says_what_does_not_fit(change, message):
    call = {
        "hidden": torch.zeros(4, 4, 3, 3),
        "features": [torch.zeros(2, 4, 3, 3)],
        "masks": [torch.zeros(1, 1, 3, 3)],
        "scales": torch.zeros(1),
    }
    with pytest.raises(ValueError, match=f"inject: .*{message}"):
        reference.inject(**(call | change))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 2), (3, 2), (3, 3), (9, 6)], ids=str)
def test_sobel_is_kornias(size):
    z = random(2, 3, *size, dtype=torch.float64)
    assert_close("magnitude", reference.sobel(z), kornia.filters.sobel(z, normalized=True, eps=1e-6))


def loss_case(size=(5, 4), dtype=torch.float32, masks=2):
    """Output, noisy, latents, mask, alpha, sigma of two samples at different noise levels."""
    alpha = torch.tensor([0.9, 0.2], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    shape = 2, 4, *size
    latents, noise = random(*shape, dtype=torch.float64), random(*shape, dtype=torch.float64, seed=1)
    noisy = alpha[:, None, None, None] * latents + sigma[:, None, None, None] * noise
    output = random(*shape, dtype=torch.float64, seed=2)
    mask = uniform(masks, 1, *size, dtype=torch.float64, seed=3)
    return tuple(t.to(dtype) for t in (output, noisy, latents, mask, alpha, sigma))


def loss_by_kornia(output, noisy, latents, mask, alpha, sigma, prediction_type):
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    predicted = {
        "epsilon": (noisy - sigma * output) / alpha,
        "v_prediction": alpha * noisy - sigma * output,
        "sample": output,
    }[prediction_type]
    edges = [kornia.filters.sobel(z, normalized=True, eps=1e-6) * mask for z in (predicted, latents)]
    return torch.nn.functional.mse_loss(*edges, reduction="none").flatten(1).mean(1)


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8)], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_its_definition(prediction_type, size, masks):
    case = loss_case(size, torch.float64, masks)
    expected = loss_by_kornia(*case, prediction_type)
    assert_close("float64", reference.sobel_z0_loss(*case, prediction_type), expected)
    single = reference.sobel_z0_loss(*(t.float() for t in case), prediction_type)
    assert single.shape == (2,) and single.dtype == torch.float32
    assert_close("float32", single, expected)


def test_loss_of_low_precision_is_computed_in_float32():
    output, *rest = loss_case()
    half = output.bfloat16()
    assert torch.equal(reference.sobel_z0_loss(half, *rest), reference.sobel_z0_loss(half.float(), *rest))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1), (2, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_gradient(prediction_type, size):
    output, *rest = loss_case(size, torch.float64)
    assert torch.autograd.gradcheck(
        lambda o: reference.sobel_z0_loss(o, *rest, prediction_type), output.requires_grad_()
    )


def test_loss_of_the_truth_is_zero_and_flat_images_have_a_gradient():
    _, noisy, latents, mask, alpha, sigma = loss_case(dtype=torch.float64)
    broadcast = alpha[:, None, None, None], sigma[:, None, None, None]
    truth = (noisy - broadcast[0] * latents) / broadcast[1]
    assert reference.sobel_z0_loss(truth, noisy, latents, mask, alpha, sigma).max() < 1e-24
    flat = torch.ones_like(latents).requires_grad_()
    reference.sobel_z0_loss(flat, noisy, latents, mask, alpha, sigma, "sample").sum().backward()
    assert flat.grad.isfinite().all()


def test_loss_sees_nothing_outside_the_mask():
    _, noisy, latents, _, alpha, sigma = loss_case((8, 8))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    one, other = latents + 0.1, latents + 0.1
    other[..., 5:] = 7  # two columns away from the mask's edge: outside the kernel of every masked pixel
    losses = [reference.sobel_z0_loss(z, noisy, latents, mask, alpha, sigma, "sample") for z in (one, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 4, 5), "model_output must be a float"),
        (
            1,
            torch.zeros(2, 4, 4, 5),
            r"noisy must be \(2, 4, 5, 4\), as model_output, got float32 \(2, 4, 4, 5\)",
        ),
        (2, torch.zeros(1, 4, 5, 4), "latents must be"),
        (3, torch.zeros(2, 4, 5, 4), r"mask must be \(2 or 1, 1, 5, 4\)"),
        (4, torch.zeros(1), r"alpha must be \(2,\), one a sample"),
        (5, torch.tensor(0.5), r"sigma must be \(2,\)"),
    ],
)
def test_loss_says_what_does_not_fit(index, value, message):
    case = list(loss_case())
    case[index] = value
    with pytest.raises(ValueError, match=f"sobel_z0_loss: {message}"):
        reference.sobel_z0_loss(*case)


def test_loss_knows_its_prediction_types():
    with pytest.raises(ValueError, match="'epsilon', 'v_prediction' or 'sample', got 'flow'"):
        reference.sobel_z0_loss(*loss_case(), "flow")
