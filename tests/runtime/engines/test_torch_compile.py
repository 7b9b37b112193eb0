"""The UNet compiled: the same pictures, and one compilation for whatever changes between them."""

from functools import cache

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import ops
from runtime import LocalControlPipeline, Region
from runtime.control.masks import box
from runtime.engines.torch_compile import compile_decoder
from runtime.errors import InputError
from tests.support import tiny
from tests.support.tolerances import relative_rms

REGION = Region(
    (torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.8).float(),
    mask=box(64, 64, (0, 0, 32, 64)),
    start=0.0,
    end=0.7,
)
CALLS = {
    "the same": {},
    "another prompt": {"prompt": "a blue circle at night"},
    "a negative prompt": {"negative_prompt": "sand"},
    "another mask": {"regions": [Region(REGION.condition, mask=box(64, 64, (8, 8, 40, 48)))]},
    "another strength": {"regions": [Region(REGION.condition, mask=REGION.mask, scale=0.3)]},
    "two regions": {"regions": [REGION, Region(REGION.condition, scale=0.5)]},
    "no region": {"regions": []},
    "larger": {"height": 128, "width": 96},
    "smaller": {"height": 48, "width": 64},
    "sides that no level halves evenly": {"height": 80, "width": 112},
    "three pictures": {"images_per_prompt": 3},
    "another guidance": {"guidance": 2.0},
    "no guidance": {"guidance": 1.0},
    "guidance at times": {"guidance_range": (0.0, 0.6)},
    "another scheduler": {"scheduler": "dpm++2m"},
    "more steps": {"steps": 5},
}


def make() -> LocalControlPipeline:
    return LocalControlPipeline.from_diffusers(tiny.make_pipeline(), {"canny": tiny.make_adapter()})


@cache
def eager() -> LocalControlPipeline:
    return make()


@cache
def compiled() -> tuple[LocalControlPipeline, CompileCounterWithBackend]:
    """Warmed up at one size. The compiler's own part is left out: what makes it compile again comes before it."""
    counter = CompileCounterWithBackend("eager")
    pipe = make().compile(compiler=counter)
    for guidance in (5.0, 1.0):
        pipe.warm_up(64, 64, guidance=guidance)
    return pipe, counter


def draw(pipe: LocalControlPipeline, call: dict) -> torch.Tensor:
    given = {"prompt": "a star", "regions": [REGION], "steps": 4, "seed": 0, **call}
    return pipe(given.pop("prompt"), given.pop("regions"), **given).latents


@pytest.mark.filterwarnings("ignore:.*is stretched")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_compiles_again_and_the_picture_is_the_same(name):
    pipe, counter = compiled()
    before = counter.frame_count
    made = draw(pipe, CALLS[name])
    assert counter.frame_count == before > 0
    assert relative_rms(made, draw(eager(), CALLS[name])) < 1e-5


@pytest.mark.slow
def test_inductor_draws_the_same():
    pipe = make().compile()
    assert relative_rms(draw(pipe, {}), draw(eager(), {})) < 1e-4


def test_without_a_compiler_it_is_the_same_call_on_kept_tensors():
    pipe = make().compile(compiler=None)
    assert torch.equal(draw(pipe, {}), draw(eager(), {}))


@torch.inference_mode()
def test_a_decoder_of_any_size():
    vae, counter = tiny.make_pipeline().vae, CompileCounterWithBackend("eager")
    given = [torch.randn(2, 4, 8, 8), torch.randn(3, 4, 10, 12)]
    expected = [vae.decode(latents).sample for latents in given]
    compile_decoder(vae, counter)
    for latents, pixels in zip(given, expected, strict=True):
        assert torch.equal(vae.decode(latents).sample, pixels)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*is stretched")
@pytest.mark.skipif(not (ops.INTERPRETED or torch.cuda.is_available()), reason="no Triton here")
def test_with_kernels_nothing_compiles_again_either():
    """The graph that a GPU gets: group norms and gates are our kernels, which Triton's interpreter runs here."""
    counter, device = CompileCounterWithBackend("eager"), "cuda" if torch.cuda.is_available() else "cpu"
    parts = tiny.make_pipeline().to(device), {"canny": tiny.make_adapter().to(device)}
    pipe = LocalControlPipeline.from_diffusers(*parts, backend="triton").compile(compiler=counter)
    for changed in ({}, {"height": 96, "width": 64}):  # guided rows: the others take 15 s more
        call = {"steps": 1, **changed}
        assert relative_rms(draw(pipe, call).cpu(), draw(eager(), call)) < 1e-4, changed
        assert counter.frame_count == 1


def test_what_cannot_be_compiled():
    pipe, _ = compiled()
    with pytest.raises(InputError, match="compile: the UNet is compiled already"):
        pipe.compile()
    with pytest.raises(InputError, match="cache_interval 2: a compiled UNet computes every step whole"):
        pipe("a star", cache_interval=2)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="cuda graph: the device is cpu; expected a CUDA device"):
            make().compile(cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*is stretched", "error:cuda graph")
@pytest.mark.parametrize("compiler", [None, "inductor"])
def test_a_cuda_graph_draws_the_same(compiler):
    def on_gpu():
        return LocalControlPipeline.from_diffusers(
            tiny.make_pipeline().to("cuda"), {"canny": tiny.make_adapter().to("cuda")}
        )

    pipe, plain = on_gpu().compile(compiler=compiler, cuda_graph=True), on_gpu()
    for name in (*CALLS, "the same"):  # graphs of several sizes, in turn
        assert relative_rms(draw(pipe, CALLS[name]), draw(plain, CALLS[name])) < 1e-3, name
