"""This program's stages: a denoising step, a picture, the VAE, batches, float8. One model is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device import ON_GPU, STATE, free_memory, matmul_rate, now, peak_gib, state, time_calls
from benchmarks.gpu.rows import Budget, Table
from benchmarks.gpu.world import DTYPE, PROMPT, SIZE, latents, our_pipeline, randn, region, step_inputs
from benchmarks.measure import flops
from kernels import ops
from runtime.engines.torch_compile import compile_unet
from runtime.model.attention import use_attention
from runtime.model.blocks import Resnet, TransformerBlock
from runtime.optimize.fused import fuse_unet, fuse_vae
from runtime.optimize.packed import unpack_weights
from runtime.pipeline import LocalControlPipeline
from runtime.sampling.denoiser import Denoiser, TorchDenoiser

FIELDS = (
    "stage",
    "side",
    "size",
    "images",
    "steps",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "floor_ms",
    "memory_gib",
    "note",
)
FIELDS += ("text_ms", "adapter_ms", "denoise_ms", "decode_ms", "samples_per_second")
COLUMNS = FIELDS + STATE
GRAPH_SECONDS, COMPILE_SECONDS = 10, 60
COMPILER = "inductor" if ON_GPU else "eager"  # a rehearsal needs no code


def table_of(folder: Path) -> Table:
    """Return the table of a folder's stages; InputError where its file is of other columns."""
    return Table(folder / "stages.csv", COLUMNS, now())


class Recorder:
    """Writes the rows of one process, each only where the budget has room for it and it is not there yet."""

    def __init__(self, folder: Path, budget: Budget):
        self.folder, self.budget = folder, budget
        self.table = table_of(folder)

    def measure(self, case: str, run: Callable[[], dict[str, object]], seconds: float = 5) -> bool:
        """Add what `run` returns; a failure becomes a row that names it. Returns whether it was measured."""
        if case in self.table:
            return True
        if not self.budget.allows(seconds):
            print(
                f"{case}: skipped, {self.budget.left():.0f} s are left and it may take {seconds}", flush=True
            )
            return False
        try:
            values = run()
        except Exception as error:
            note = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            values = {"note": note}
        self.table.add(case, values | state())
        print(case, *(f"{key} {value}" for key, value in values.items()), flush=True)
        return "note" not in values


def run(stages: list[str], recorder: Recorder, small: bool) -> None:
    """Run the stages of ours, over one model, in the order of their names here."""
    pipe = our_pipeline(small, "torch")
    if "step" in stages:
        recorder.measure("step, ours, kernels off", lambda: step_row(pipe.denoiser, "torch"))
    fuse_unet(unpack_weights(pipe.model.unet))  # packed in a rehearsal, on a CPU that is quicker so
    fuse_vae(pipe.model.vae)
    pipe = LocalControlPipeline(pipe.model, pipe.adapters)
    run_stage = {"step": step_stage, "picture": picture_stage, "vae": vae_stage, "batch": batch_stage}
    for name in filter(stages.__contains__, run_stage):
        run_stage[name](pipe, recorder)


def step_stage(pipe: LocalControlPipeline, recorder: Recorder) -> None:
    backend = kernels_of()
    recorder.measure("step, ours", lambda: step_row(pipe.denoiser, backend))
    profiled(recorder, "step", stepper(pipe.denoiser, backend))
    for attention in ("auto", "flash"):
        captured = compile_unet(pipe.model, None, ON_GPU)
        row = partial(step_row, captured, backend, attention)
        recorder.measure(f"step, ours, CUDA graph, attention {attention}", row, GRAPH_SECONDS)
        del captured, row
    with by_layer(pipe.model.unet):
        compiled = compile_unet(pipe.model, None, ON_GPU)
        row = partial(step_row, compiled, backend)
        recorder.measure("step, ours, layers compiled, CUDA graph", row, COMPILE_SECONDS)
        del compiled, row
    release()


def step_row(denoiser: Denoiser, backend: str, attention: str = "auto", images: int = 1) -> dict[str, object]:
    run = stepper(denoiser, backend, images)
    with use_attention(attention):
        peak = peak_gib(run)
        times = time_calls(run)
    work = 2 * images * forward_flops(denoiser)
    values = {"stage": "step", "side": "ours", "size": SIZE, "images": images, "steps": 1, **times}
    return values | {"floor_ms": round(work / matmul_rate(DTYPE) * 1e3, 3), "memory_gib": peak}


def stepper(denoiser: Denoiser, backend: str, images: int = 1) -> Callable[[], object]:
    """Return one guided step with a masked control, as the sampling loop calls it."""
    unet = denoiser.unet

    @torch.inference_mode()
    def prepared():
        with ops.use_backend(backend):
            return denoiser.prepare(**step_inputs(unet.config, images)), latents(2 * images)

    step, sample = prepared()

    @torch.inference_mode()
    def run() -> None:
        with ops.use_backend(backend):
            step(sample, 3)

    return run


_work: dict[int, int] = {}


def forward_flops(denoiser: Denoiser) -> int:
    """Return the operations of the UNet for one row, counted once."""
    unet = denoiser.unet
    if id(unet) not in _work:
        step = torch.inference_mode()(TorchDenoiser(unet).prepare)(**step_inputs(unet.config, 1))
        with torch.inference_mode():
            _work[id(unet)] = flops(lambda: step(latents(2), 3)) // 2
    return _work[id(unet)]


@contextmanager
def by_layer(unet: nn.Module) -> Iterator[None]:
    """Have the UNet's layers compiled one by one in this block: those of one class and size share their code."""
    torch.compiler.reset()
    layers = [m for m in unet.modules() if isinstance(m, (Resnet, TransformerBlock))]
    with torch._dynamo.config.patch(recompile_limit=64):
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False, backend=COMPILER)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def picture_stage(pipe: LocalControlPipeline, recorder: Recorder) -> None:
    recorder.measure("picture, ours", lambda: picture_row(pipe), 10)
    captured = LocalControlPipeline(pipe.model, pipe.adapters)
    captured.compile(compiler=None, cuda_graph=ON_GPU)
    recorder.measure("picture, ours, CUDA graph", lambda: picture_row(captured), 15)
    quick = {"steps": 4, "guidance": 1.0}
    recorder.measure("picture, ours, CUDA graph, 4 steps", lambda: picture_row(captured, **quick), 10)
    with by_layer(pipe.model.unet):
        compiled = LocalControlPipeline(pipe.model, pipe.adapters)
        compiled.compile(compiler=None, cuda_graph=ON_GPU)
        case = "picture, ours, layers compiled, CUDA graph"
        recorder.measure(case, lambda: picture_row(compiled), COMPILE_SECONDS)
        recorder.measure(f"{case}, 4 steps", lambda: picture_row(compiled, **quick), COMPILE_SECONDS)
    release()


def picture_row(
    pipe: LocalControlPipeline, images: int = 1, steps: int = 30 if ON_GPU else 2, guidance: float = 5.0
) -> dict[str, object]:
    control, timings = region(), []

    def draw() -> None:
        call = {"height": SIZE, "width": SIZE, "steps": steps, "guidance": guidance, "scheduler": "euler"}
        timings.append(pipe(PROMPT, [control], seed=0, images_per_prompt=images, **call).timings)

    peak = peak_gib(draw)
    times = time_calls(draw, 2.0, least=3)
    middle = timings[len(timings) // 2]
    parts = {f"{name}_ms": round(middle[name] * 1e3, 3) for name in ("text", "adapter", "denoise", "decode")}
    rows = (2 if guidance > 1 else 1) * images
    floor = rows * steps * forward_flops(TorchDenoiser(pipe.model.unet)) / matmul_rate(DTYPE) * 1e3
    values = {"stage": "picture", "side": "ours", "size": SIZE, "images": images, "steps": steps}
    return values | times | parts | {"floor_ms": round(floor, 2), "memory_gib": peak}


def vae_stage(pipe: LocalControlPipeline, recorder: Recorder) -> None:
    vae, side = pipe.model.vae, SIZE // 8

    @torch.inference_mode()
    def decode() -> None:
        with ops.use_backend(kernels_of()):
            vae.decode(randn(1, 4, side, side), return_dict=False)

    def row() -> dict[str, object]:
        values = {"stage": "vae", "side": "ours", "size": SIZE, "images": 1}
        return values | {"memory_gib": peak_gib(decode), **time_calls(decode)}

    recorder.measure("vae decode, ours", row)
    profiled(recorder, "vae", decode)


def batch_stage(pipe: LocalControlPipeline, recorder: Recorder) -> None:
    for images in (4, 8) if ON_GPU else (2,):
        recorder.measure(f"picture, ours, {images} images", lambda n=images: picture_row(pipe, n), 5 * images)


def fp8_stage(recorder: Recorder, small: bool) -> None:
    pipe = our_pipeline(small, "auto", "fp8" if ON_GPU else "fp8-weights")
    captured = compile_unet(pipe.model, None, ON_GPU)
    recorder.measure("step, ours, fp8", lambda: step_row(captured, kernels_of()), GRAPH_SECONDS)
    profiled(recorder, "fp8", stepper(pipe.denoiser, kernels_of()))
    with by_layer(pipe.model.unet):
        compiled = compile_unet(pipe.model, None, ON_GPU)
        case = "step, ours, fp8, layers compiled, CUDA graph"
        recorder.measure(case, lambda: step_row(compiled, kernels_of()), COMPILE_SECONDS)


def profiled(recorder: Recorder, name: str, run: Callable[[], object]) -> None:
    """Write where the device's time of one call goes, to <folder>/profile-<name>.txt; a failure ends no other row."""
    try:
        _profile(recorder.folder / f"profile-{name}.txt", run, records=name == "training")
    except Exception as error:
        print(f"profile {name}: {type(error).__name__}: {error}".partition("\n")[0][:200], flush=True)


def _profile(path: Path, run: Callable[[], object], records: bool) -> None:
    """Write it kernel by kernel. records: whether gradients are recorded."""
    run()
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * ON_GPU]
    with profile(activities=kinds) as found, nullcontext() if records else torch.no_grad():
        run()
        if ON_GPU:
            torch.cuda.synchronize()
    order = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    events = [e for e in found.key_averages() if not ON_GPU or e.self_device_time_total > 0]
    events.sort(key=lambda e: getattr(e, order), reverse=True)
    kernels = [e for e in events if not ON_GPU or e.device_type == torch.autograd.DeviceType.CUDA]
    lines = [f"{getattr(e, order) / 1e3:9.3f} ms {e.count:5} x  {e.key[:150]}" for e in kernels[:60]]
    total = sum(getattr(e, order) for e in kernels) / 1e3
    lines.insert(0, f"{total:9.3f} ms {sum(e.count for e in kernels):5} x  in all")
    path.write_text("\n".join(lines) + "\n")


def kernels_of() -> str:
    """Return the backend to run with: the kernels; in a rehearsal plain PyTorch, as they would take too long."""
    return "triton" if ON_GPU else "torch"


def release() -> None:
    torch.compiler.reset()
    free_memory()
