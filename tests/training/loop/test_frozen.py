"""training.loop.frozen: with fused layers the prediction and the gradients of the control are those of PyTorch's."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import ops
from runtime.loading.load import from_diffusers
from runtime.model.blocks import Injection
from tests.support.interpreter import BACKENDS
from tests.support.tiny import make_pipeline
from tests.support.tolerances import assert_close, relative_rms
from training.loop.frozen import FrozenUNet

HEIGHT, WIDTH, ROWS = 8, 6, 2
DOWN = (1, 1, 2, 2)  # by what the latents are halved where each level's control is added, as a power of two
REPLACED = ("native_group_norm", "native_layer_norm", "gelu", "silu")


def frozen(backend: str | None, dtype=torch.float32, **options) -> FrozenUNet:
    """backend: of the kernels; None for a UNet that is not fused."""
    torch.manual_seed(0)
    pipe = make_pipeline().to(dtype)
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    fuses = pytest.MonkeyPatch()
    with fuses.context() as patch, ops.use_backend(backend or "torch"):
        patch.setattr("training.loop.frozen.fuses_here", lambda *_: backend is not None)
        return FrozenUNet(from_diffusers(pipe).unet, **options)


def step(unet: FrozenUNet, backend: str | None) -> tuple[torch.Tensor, ...]:
    """The prediction, and the gradient of each level's features."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    features, control = [], []
    for channels, down in zip(unet.unet.config.control_channels, DOWN, strict=True):
        size = -(-HEIGHT // 2**down), -(-WIDTH // 2**down)
        level = random(ROWS, channels, *size).to(unet.dtype, memory_format=torch.channels_last)
        features.append(level.requires_grad_())
        gate = (random(ROWS, 1, *size) > 0).float()
        control.append(Injection([level], [gate], torch.ones(1)))
    given = random(ROWS, 4, HEIGHT, WIDTH), torch.tensor([900, 30]), random(ROWS, 77, 32), random(ROWS, 16)
    with ops.use_backend(backend or "torch"):
        output = unet(*given, torch.ones(ROWS, 6), control)
        return output, *torch.autograd.grad(output.square().sum(), features)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fused_step_is_the_plain_one(backend, checkpointing):
    unet = frozen(backend)
    unet.checkpointing = checkpointing
    expected = step(frozen(None), None)
    for i, (made, wanted) in enumerate(zip(step(unet, backend), expected, strict=True)):
        assert wanted.abs().max() > 0
        assert_close(f"output {i}", made, wanted, "unet")


def test_what_is_computed_again_runs_on_the_same_backend(monkeypatch):
    """On a GPU autograd computes it again in a thread of its own, to which no context comes."""
    unet, seen = frozen("torch"), []
    unet.checkpointing = True
    chosen = ops._implementation
    monkeypatch.setattr(
        ops, "_implementation", lambda *args: seen.append(ops.current_backend()) or chosen(*args)
    )
    start = torch.autograd.grad

    def elsewhere(*args):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(start, *args).result()

    monkeypatch.setattr(torch.autograd, "grad", elsewhere)
    step(unet, "torch")
    assert len(seen) > 20 and set(seen) == {"torch"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bf16_it_is_as_near_the_truth_as_the_plain_one(backend):
    exact, plain = step(frozen(None), None), step(frozen(None, torch.bfloat16), None)
    for made, other, wanted in zip(step(frozen(backend, torch.bfloat16), backend), plain, exact, strict=True):
        assert relative_rms(made, wanted) < max(1.2 * relative_rms(other, wanted), 1e-3)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.found[operation._schema.name.split("::")[1]] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.skipif(not ops.INTERPRETED, reason="not interpreted")
def test_a_fused_step_has_none_of_pytorchs_norms_and_gates():
    """Neither way; the time embedding's activations, once for all layers, are left."""
    with Names() as names:
        step(frozen("triton"), "triton")
    assert {name: n for name, n in names.found.items() if name.startswith(REPLACED)} == {"silu": 3}
    ours = ("group_norm_silu", "geglu", "add_layer_norm")
    assert all(names.found[name] and names.found[f"{name}_backward"] for name in ours)


def test_a_unet_that_a_pipeline_has_fused_already():
    unet = frozen("torch")
    expected = step(unet, "torch")
    with ops.use_backend("torch"):
        again = FrozenUNet(unet.unet)
    for made, wanted in zip(step(again, "torch"), expected, strict=True):
        assert torch.equal(made, wanted)
