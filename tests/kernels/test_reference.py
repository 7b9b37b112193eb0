"""kernels.reference against its definitions, row by row in float64, and against kornia and diffusers."""

import kornia
import pytest
import torch
from diffusers.models.activations import GEGLU

from kernels import reference
from kernels.checks import EDGES, PREDICTION_TYPES
from tests.support.kernel_cases import loss_by_kornia, loss_case
from tests.support.tolerances import assert_close

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


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 2), (3, 2), (3, 3), (9, 6)], ids=str)
def test_sobel_is_kornias(size):
    z = random(2, 3, *size, dtype=torch.float64)
    assert_close("magnitude", reference.sobel(z), kornia.filters.sobel(z, normalized=True, eps=1e-6))


@pytest.mark.parametrize("size", [(1, 5), (4, 1), (2, 2), (3, 2), (3, 3), (9, 6)], ids=str)
def test_laplacian_is_kornias(size):
    z = random(2, 3, *size, dtype=torch.float64)
    expected = kornia.filters.laplacian(z, kernel_size=3, border_type="replicate", normalized=True)
    assert_close("laplacian", reference.laplacian(z), expected)


@pytest.mark.parametrize("edges", EDGES)
def test_a_flat_image_has_no_edges(edges):
    """To the last bit, whatever its value: the loss of two flat images is that of nothing."""
    flat = torch.full((1, 2, 4, 5), 0.1)
    ones = torch.ones(1)
    loss = reference.sobel_z0_loss(flat, flat, flat * 3, flat[:, :1], ones, ones, "sample", edges=edges)
    assert (loss.item() == 0) == (edges != "none")


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("size", [(1, 2), (2, 3), (8, 8)], ids=str)
@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_is_its_definition(prediction_type, edges, size, masks):
    case = loss_case(size, torch.float64, masks)
    expected = loss_by_kornia(*case, prediction_type, edges)
    assert_close("float64", reference.sobel_z0_loss(*case, prediction_type, edges=edges), expected)
    single = reference.sobel_z0_loss(*(t.float() for t in case), prediction_type, edges=edges)
    assert single.shape == (2,) and single.dtype == torch.float32
    assert_close("float32", single, expected)


def test_loss_of_low_precision_is_computed_in_float32():
    output, *rest = loss_case()
    half = output.bfloat16()
    assert torch.equal(reference.sobel_z0_loss(half, *rest), reference.sobel_z0_loss(half.float(), *rest))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1), (2, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_gradients(prediction_type, edges, size):
    output, *rest = loss_case(size, torch.float64, channels=2)

    def op(output):
        return reference.noise_and_z0_loss(output, *rest, prediction_type, edges=edges)

    assert torch.autograd.gradcheck(op, output.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_noise_term_is_the_distance_to_the_target(prediction_type, dtype):
    output, _, latents, mask, alpha, sigma = loss_case(dtype=torch.float64)
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    noise = random(*output.shape, dtype=torch.float64, seed=5).to(output.device)
    target = {"epsilon": noise, "v_prediction": a * noise - s * latents, "sample": latents}[prediction_type]
    output = output.to(dtype)
    args = output, a * latents + s * noise, latents, mask, alpha, sigma, prediction_type
    of_noise, of_edges = reference.noise_and_z0_loss(*args)
    assert of_noise.dtype == of_edges.dtype == torch.promote_types(dtype, torch.float32)
    assert_close("noise", of_noise, (output.double() - target).square().flatten(1).mean(1))
    assert torch.equal(of_edges, reference.sobel_z0_loss(*args))


def test_loss_of_the_truth_is_zero_and_flat_images_have_a_gradient():
    _, noisy, latents, mask, alpha, sigma = loss_case(dtype=torch.float64)
    broadcast = alpha[:, None, None, None], sigma[:, None, None, None]
    truth = (noisy - broadcast[0] * latents) / broadcast[1]
    assert reference.sobel_z0_loss(truth, noisy, latents, mask, alpha, sigma).max() < 1e-24
    flat = torch.ones_like(latents).requires_grad_()
    reference.sobel_z0_loss(flat, noisy, latents, mask, alpha, sigma, "sample").sum().backward()
    assert flat.grad.isfinite().all()


def test_loss_sees_nothing_outside_the_mask():
    _, noisy, latents, mask, alpha, sigma = loss_case((8, 8))
    mask.zero_()
    mask[..., :4] = 1
    one, other = latents + 0.1, latents + 0.1
    other[..., 5:] = 7  # two columns away from the mask's edge: outside the kernel of every masked pixel
    losses = [reference.sobel_z0_loss(z, noisy, latents, mask, alpha, sigma, "sample") for z in (one, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "norm only"])
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_silu_is_its_definition(dtype, layout, silu):
    x = (random(2, 12, 3, 5, dtype=dtype) + 1).contiguous(memory_format=layout)
    weight, bias = random(12, dtype=dtype, seed=1), random(12, dtype=dtype, seed=2)
    out = reference.group_norm_silu(x, weight, bias, 4, 1e-3, silu)
    grouped = x.double().reshape(2, 4, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    expected = ((grouped - mean) / (variance + 1e-3).sqrt()).view(x.shape)
    expected = expected * weight.double()[:, None, None] + bias.double()[:, None, None]
    assert out.dtype == dtype and out.stride() == x.stride()
    assert_close("norm", out, expected * expected.sigmoid() if silu else expected)


def test_group_norm_silu_adds_an_offset_to_every_pixel():
    x, weight, bias, offset = (
        random(2, 12, 3, 5),
        random(12, seed=1),
        random(12, seed=2),
        random(2, 12, seed=3),
    )
    for rows in (offset, offset[:1]):
        moved = x + rows.view(-1, 12, 1, 1)
        expected = reference.group_norm_silu(moved, weight, bias, 4)
        assert torch.equal(reference.group_norm_silu(x, weight, bias, 4, offset=rows), expected)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "norm only"])
def test_group_norm_silu_gradients(silu):
    shapes = (2, 6, 2, 3), (6,), (6,), (2, 6)
    leaves = [random(*n, dtype=torch.float64, seed=i).requires_grad_() for i, n in enumerate(shapes)]

    def norm(x, weight, bias, offset):
        return reference.group_norm_silu(x, weight, bias, 2, silu=silu, offset=offset)

    assert torch.autograd.gradcheck(norm, leaves)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_geglu_is_diffusers(dtype, bias):
    layer = GEGLU(6, 5, bias=bias).double()
    x = random(2, 3, 6, dtype=torch.float64)
    projected = torch.nn.functional.linear(x, layer.proj.weight).to(dtype)
    added = None if layer.proj.bias is None else layer.proj.bias.to(dtype)
    value, gate = (projected.double() + (0 if added is None else added.double())).chunk(2, -1)
    if dtype == torch.float64:
        assert_close("diffusers", value * gate * (1 + torch.erf(gate / 2**0.5)) / 2, layer(x))
    assert_close(
        "geglu", reference.geglu(projected, added), value * gate * (1 + torch.erf(gate / 2**0.5)) / 2
    )


def test_geglu_gradients():
    x, bias = random(2, 3, 10, dtype=torch.float64), random(10, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(reference.geglu, (x.requires_grad_(), bias.requires_grad_()))
    assert torch.autograd.gradcheck(reference.geglu, (x,))


def step_rows(sample, output, coefficients, previous, rescale):
    """The definition, one row at a time, in float64."""
    w, p, q, a, b, c = coefficients.double().tolist()
    batch, rows = len(sample), []
    for i, x in enumerate(sample.double()):
        o = output[i].double()
        if len(output) == 2 * batch:
            guided = output[batch + i].double()
            o = o + w * (guided - o)
            o = o * (rescale * guided.std() / o.std() + 1 - rescale)
        denoised = p * x + q * o
        following = a * x + b * denoised
        rows.append((following if previous is None else following + c * previous[i].double(), denoised))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def step_case(halves, previous, dtype=torch.float64):
    """sample, output, coefficients, previous."""
    sample, before = (random(2, 3, 4, 5, dtype=dtype, seed=i) for i in range(2))
    output = random(2 * halves, 3, 4, 5, dtype=dtype, seed=2)
    return sample, output, random(6, dtype=dtype, seed=3), before if previous else None


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("previous", [False, True], ids=["first", "previous"])
@pytest.mark.parametrize("halves", [1, 2], ids=["unguided", "guided"])
def test_guidance_step_is_its_definition(halves, previous, rescale):
    args = step_case(halves, previous, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        args = args[0], args[1].to(dtype, memory_format=torch.channels_last), *args[2:]
        outputs = reference.guidance_step(*args, rescale=rescale)
        for name, out, expected in zip(("next", "denoised"), outputs, step_rows(*args, rescale), strict=True):
            assert out.dtype == torch.float32 and out.stride() == args[0].stride()
            assert_close(name, out, expected)


@pytest.mark.parametrize(("halves", "previous", "rescale"), [(1, False, 0.0), (2, True, 0.0), (2, True, 0.7)])
def test_guidance_step_gradients(halves, previous, rescale):
    args = [None if t is None else t.requires_grad_() for t in step_case(halves, previous)]

    def op(*args):
        return reference.guidance_step(*args, rescale=rescale)

    assert torch.autograd.gradcheck(op, args)
