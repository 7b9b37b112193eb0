"""Shared by the tests of the kernels: poisoned memory, tensors that are cut out of others, the comparison by name."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import kornia
import torch
from torch import Tensor

import tests.support.interpreter  # noqa: F401
from kernels import ops, reference
from tests.support.tolerances import assert_close

# Compiled kernels on a GPU, Triton's interpreter elsewhere: the tests are the same.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUT = "interpreted" if ops.INTERPRETED else "op"
NCHW, NHWC = torch.contiguous_format, torch.channels_last


def random(
    *shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = NCHW, seed: int = 0
) -> Tensor:
    """Normal values, on the device under test."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype).contiguous(memory_format=layout)


def uniform(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def _in_the_middle(tensor: Tensor, dim: int) -> Tensor:
    """The same values as a slice of a tensor with two more of that dimension on either side, all NaN."""
    shape = list(tensor.shape)
    shape[dim] += 4
    layout = NHWC if tensor.is_contiguous(memory_format=NHWC) else NCHW
    wide = tensor.new_full(shape, torch.nan).contiguous(memory_format=layout)
    cut = wide.narrow(dim, 2, tensor.shape[dim])
    return cut.copy_(tensor)


# How a (B, C, H, W) tensor may lie in memory; each takes the tensor and gives an equal one.
CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch slice": lambda t: _in_the_middle(t, 0),
    "channel slice": lambda t: _in_the_middle(t, 1),  # rows do not follow one another
    "row slice": lambda t: _in_the_middle(t, 2),
    "column slice": lambda t: _in_the_middle(t, 3),  # H and W are not one dimension
    "every second channel": lambda t: t.repeat_interleave(2, 1).contiguous(memory_format=NHWC)[:, ::2],
    "transposed image": lambda t: t.mT.contiguous().mT,  # dense, but H is the innermost
    "rows between channels": lambda t: (
        t.transpose(1, 2).contiguous().transpose(1, 2)
    ),  # (B, H, C, W) in memory
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel is given to fill holds NaN: what it leaves out is found."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args, **kwargs) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def assert_matches(op: str, *args, gradients: Callable[[Tensor], Tensor] | None = None, **kwargs):
    """Run an op's kernels and compare each output, and each gradient that an argument requires, with float64.

    gradients: the gradient of an output, random by default. Returns the kernels' output.
    """
    call = inspect.signature(getattr(reference, op)).bind(*args, **kwargs).arguments
    with ops.use_backend("triton"), poisoned():
        output = getattr(ops, op)(**call)
        outputs = _tuple(output)
        if gradients is None:
            weights = [random(*t.shape, dtype=t.dtype, seed=90 + i) for i, t in enumerate(outputs)]
        else:
            weights = [gradients(t) for t in outputs]
        actual = _gradients(outputs, call, weights)
    exact = {name: _double(value) for name, value in call.items()}
    wanted = _tuple(getattr(reference, op)(**exact))
    for i, (one, other) in enumerate(zip(outputs, wanted, strict=True)):
        assert_close(f"output {i}", one, other, OUTPUT)
    expected = _gradients(wanted, exact, [g.double() for g in weights])
    for name, gradient in actual.items():
        assert_close(f"gradient of {name}", gradient, expected[name], "gradient")
    return output


def _tuple(output) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _double(value):
    if isinstance(value, (list, tuple)):
        return [_double(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _gradients(outputs: tuple[Tensor, ...], call: dict, weights: list[Tensor]) -> dict[str, Tensor]:
    """The gradient of every argument, or member of a list argument, that requires one; by its name."""
    named = {}
    for name, value in call.items():
        members = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        for i, member in members:
            if isinstance(member, Tensor) and member.requires_grad:
                named[name if i is None else f"{name}[{i}]"] = member
    if not named:
        return {}
    found = torch.autograd.grad(outputs, list(named.values()), weights)
    for (name, argument), gradient in zip(named.items(), found, strict=True):
        assert gradient.dtype == argument.dtype, f"gradient of {name}: {gradient.dtype}"
    return dict(zip(named, found, strict=True))


def assert_float8(made: reference.Float8Rows, exact: Tensor) -> None:
    """Every value is within half a step of float8 of the exact one, and a row's scale is that of the exact row."""
    assert made.values.dtype == reference.FLOAT8 and made.values.shape == exact.shape
    assert_close("scales", made.scales, reference.float8_rows(exact).scales.double(), OUTPUT)
    half_a_step = torch.maximum(exact.abs() * 1.001 * 2.0**-4, made.scales * 2.0**-10)
    assert ((made.values.float() * made.scales - exact).abs() <= half_a_step).all()


def assert_compiles(function: Callable, *args: Tensor) -> None:
    """In one graph, with the outputs and gradients of eager mode to the last bit."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    with ops.use_backend("triton"):
        for run in (function, compiled):
            leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in args]
            outputs = _tuple(run(*leaves))
            wanted = [t for t in leaves if t.requires_grad]
            weights = [random(*t.shape, dtype=t.dtype, seed=i) for i, t in enumerate(outputs)]
            results.append(
                [*outputs, *(torch.autograd.grad(outputs, wanted, weights) if wanted else ()), *leaves]
            )
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other) and eager.stride() == other.stride()


def assert_compiles_once(function: Callable, *calls: tuple[Tensor, ...]) -> None:
    """One graph serves every size: nothing is compiled again, nothing in Python has looked at a number."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.compiler.reset()
    with ops.use_backend("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for args in calls:
            for out, wanted in zip(_tuple(compiled(*args)), _tuple(function(*args)), strict=True):
                assert torch.equal(out, wanted)


def loss_case(
    size: tuple[int, int] = (5, 4),
    dtype: torch.dtype = torch.float32,
    masks: int = 2,
    *,
    channels: int = 4,
    batch: int = 2,
    layout: torch.memory_format = NCHW,
) -> tuple[Tensor, ...]:
    """Output, noisy, latents, mask, alpha, sigma of samples at different noise levels; alpha and sigma float32."""
    alpha = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64, device=DEVICE)[:batch]
    sigma = (1 - alpha**2).sqrt()
    latents, noise, output = (
        random(batch, channels, *size, dtype=torch.float64, layout=layout, seed=i) for i in range(3)
    )
    noisy = alpha[:, None, None, None] * latents + sigma[:, None, None, None] * noise
    mask = uniform(masks, 1, *size, dtype=torch.float64, seed=3)
    levels = torch.promote_types(dtype, torch.float32)
    return (*(t.to(dtype) for t in (output, noisy, latents, mask)), alpha.to(levels), sigma.to(levels))


def loss_by_kornia(
    output: Tensor,
    noisy: Tensor,
    latents: Tensor,
    mask: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    edges: str = "sobel",
) -> Tensor:
    """`sobel_z0_loss` as one writes it with kornia."""
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    predicted = {
        "epsilon": (noisy - sigma * output) / alpha,
        "v_prediction": alpha * noisy - sigma * output,
        "sample": output,
    }[prediction_type]
    find = {
        "sobel": lambda z: kornia.filters.sobel(z, normalized=True, eps=1e-6),
        "laplacian": lambda z: kornia.filters.laplacian(z, kernel_size=3, border_type="replicate"),
        "none": lambda z: z,
    }[edges]
    found, wanted = find(predicted) * mask, find(latents) * mask
    return torch.nn.functional.mse_loss(found, wanted, reduction="none").flatten(1).mean(1)
