"""The kernels at the sizes of SDXL, on a GPU: outputs and gradients against float64, and tensors beyond 2^31 elements.

The other tests here run in Triton's interpreter where there is no GPU, at small sizes.
"""

import pytest
import torch
from torch import Tensor

from kernels import ops, reference
from tests.support.kernel_cases import DEVICE, NCHW, NHWC, assert_float8, assert_matches
from tests.support.tolerances import assert_close

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FAR = 2**31  # elements between the rows of a batch: an offset that int32 does not hold


def made(*shape: int, dtype: torch.dtype = torch.bfloat16, layout=NHWC, seed: int = 0) -> Tensor:
    """Normal values, (B, C, H, W), made on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype).contiguous(memory_format=layout)


def gates(rows: int, side: int, dtype: torch.dtype) -> Tensor:
    return made(rows, 1, side, side, dtype=dtype, seed=9).sigmoid()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("channels", "side"), [(320, 64), (640, 64), (1280, 32), (640, 61)])
def test_inject(channels, side, batch, dtype):
    hidden = made(2 * batch, channels, side, side, dtype=dtype).requires_grad_()
    features = [made(n, channels, side, side, dtype=dtype, seed=n + 1).requires_grad_() for n in (batch, 1)]
    masks = [gates(1, side, dtype), gates(batch, side, dtype)]
    scales = torch.tensor([0.8, -0.3], device=DEVICE)
    assert_matches("inject", hidden, features, masks, scales, gradients=torch.randn_like)


@pytest.mark.parametrize("edges", ["sobel", "laplacian", "none"])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses(dtype, layout, batch, edges):
    output, noisy, latents = (made(batch, 4, 128, 128, dtype=dtype, layout=layout, seed=i) for i in range(3))
    alpha = torch.linspace(0.2, 0.9, batch, device=DEVICE)
    case = output.requires_grad_(), noisy, latents, gates(1, 128, dtype), alpha, (1 - alpha**2).sqrt()
    assert_matches("noise_and_z0_loss", *case, edges=edges, gradients=torch.randn_like)
    assert_matches("sobel_z0_loss", *case, "v_prediction", edges=edges, gradients=torch.randn_like)


NORMS = [(2, 320, 128, 128), (3, 640, 64, 64), (2, 1280, 32, 32), (2, 2560, 32, 32), (1, 960, 61, 77)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [*NORMS, (1, 128, 1024, 1024), (1, 512, 256, 256)], ids=str)
def test_group_norm(shape, silu, dtype):
    """The last two are of the VAE's decoder."""
    x = made(*shape, dtype=dtype).add(3).requires_grad_()
    weight, bias = (made(shape[1], dtype=dtype, layout=NCHW, seed=i) for i in (1, 2))
    parameters = weight.requires_grad_(), bias.requires_grad_()
    assert_matches("group_norm_silu", x, *parameters, 32, silu=silu, gradients=torch.randn_like)
    offset = made(*shape[:2], dtype=dtype, layout=NCHW, seed=3)
    assert_matches(
        "group_norm_silu", x, *parameters, 32, silu=silu, offset=offset, gradients=torch.randn_like
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(8192, 5120), (2048, 10240), (3 * 1023, 10240)])
def test_geglu(rows, width, dtype):
    x = made(rows, width, dtype=dtype, layout=NCHW).requires_grad_()
    assert_matches("geglu", x, made(width, dtype=dtype, layout=NCHW, seed=1), gradients=torch.randn_like)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(8192, 640), (2048, 1280), (3 * 1023, 1280)])
def test_add_layer_norm(rows, channels, dtype):
    x, other = (made(rows, channels, dtype=dtype, layout=NCHW, seed=i) for i in (0, 1))
    weight, bias = (made(channels, dtype=dtype, layout=NCHW, seed=i) for i in (2, 3))
    with ops.use_backend("triton"):
        total, norm = ops.add_layer_norm(x, other, weight, bias)
    assert torch.equal(total, x + other)
    wanted = reference.add_layer_norm(total.double(), None, weight.double(), bias.double())[1]
    assert_close("norm", norm, wanted)


has_float8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < ops.FLOAT8_GPU, reason="no float8"
)


@has_float8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(8192, 640), (2048, 1280), (2048, 5120), (3 * 1023, 2560)])
def test_float8_rows(rows, channels, dtype):
    x = made(rows, channels, dtype=dtype, layout=NCHW)
    with ops.use_backend("triton"):
        values, scales = ops.float8_rows(x)
    expected = reference.float8_rows(x.cpu())  # on CUDA PyTorch multiplies with a number's reciprocal
    assert torch.equal(scales.cpu(), expected.scales)
    assert torch.equal(values.view(torch.uint8).cpu(), expected.values.view(torch.uint8))


@has_float8
@pytest.mark.parametrize(("rows", "channels"), [(8192, 640), (2048, 1280), (3 * 1023, 1280)])
def test_add_layer_norm_in_float8(rows, channels):
    x, other = (made(rows, channels, layout=NCHW, seed=i) for i in (0, 1))
    weight, bias = (made(channels, layout=NCHW, seed=i) for i in (2, 3))
    with ops.use_backend("triton"):
        total, norm = ops.add_layer_norm(x, other, weight, bias, float8=True)
    assert torch.equal(total, x + other)
    exact = reference.add_layer_norm(total.double(), None, weight.double(), bias.double())[1]
    assert_float8(norm, exact)


@has_float8
@pytest.mark.parametrize(("rows", "width"), [(8192, 5120), (2048, 10240), (3 * 1023, 10240)])
def test_geglu_in_float8(rows, width):
    x, bias = made(rows, width, layout=NCHW), made(width, layout=NCHW, seed=1)
    with ops.use_backend("triton"):
        assert_float8(ops.geglu(x, bias, float8=True), reference.geglu(x.double(), bias.double()))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_guidance_step(layout, batch, rescale):
    sample, previous = (made(batch, 4, 128, 128, dtype=torch.float32, layout=layout, seed=i) for i in (0, 1))
    output = made(2 * batch, 4, 128, 128, layout=layout, seed=2)
    coefficients = torch.tensor([5.0, 1.0, -0.7, 0.8, 0.3, -0.1], device=DEVICE)
    assert_matches("guidance_step", sample, output, coefficients, previous, rescale=rescale)


def far_apart(*shape: int, seed: int = 0) -> Tensor:
    """Return a channels-last tensor of 2 rows that lie FAR elements apart, the second at an odd end of memory."""
    values = made(*shape, seed=seed)
    memory = torch.empty(FAR + values[0].numel(), dtype=values.dtype, device=DEVICE)
    tensor = memory.as_strided(values.shape, (FAR, *values.stride()[1:]))
    return tensor.copy_(values)


def test_offsets_beyond_int32():
    hidden, feature = far_apart(2, 64, 8, 8), far_apart(2, 64, 8, 8, seed=1)
    scales = torch.ones(1, device=DEVICE)
    assert_matches("inject", hidden, [feature], [gates(1, 8, hidden.dtype)], scales)
    weight, bias = (made(64, layout=NCHW, seed=i) for i in (1, 2))
    x = hidden.requires_grad_()
    assert_matches("group_norm_silu", x, weight, bias, 32, gradients=torch.randn_like)
    latents = [far_apart(2, 4, 16, 16, seed=i) for i in range(3)]
    alpha = torch.tensor([0.6, 0.8], device=DEVICE)
    assert_matches("noise_and_z0_loss", *latents, gates(1, 16, x.dtype), alpha, (1 - alpha**2).sqrt())


def test_rows_beyond_int32():
    """A tensor that itself has more than 2^31 elements, its last rows among them."""
    rows, width = FAR // 4096 + 3, 4096
    x = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE).fill_(0.5)
    x[-3:] = made(3, width, layout=NCHW)
    with ops.use_backend("triton"):
        actual = ops.geglu(x)[-3:]
    value, gate = x[-3:].double().chunk(2, dim=-1)
    assert_close("the last rows", actual, value * torch.nn.functional.gelu(gate))


def test_the_same_bits_every_time():
    """A race would show: sums of many programs, and tickets that the next launch finds clean."""
    x, weight, bias = made(2, 320, 128, 128), made(320, layout=NCHW), made(320, layout=NCHW, seed=1)
    output, noisy, latents = (made(2, 4, 128, 128, seed=i) for i in range(3))
    alpha = torch.tensor([0.6, 0.8], device=DEVICE)
    loss = output, noisy, latents, gates(1, 128, x.dtype), alpha, alpha
    with ops.use_backend("triton"):
        norm, losses = ops.group_norm_silu(x, weight, bias, 32), ops.noise_and_z0_loss(*loss)
        for _ in range(50):
            assert torch.equal(ops.group_norm_silu(x, weight, bias, 32), norm)
            assert all(torch.equal(*pair) for pair in zip(ops.noise_and_z0_loss(*loss), losses, strict=True))
