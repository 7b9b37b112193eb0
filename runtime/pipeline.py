"""LocalControlPipeline: prompt and regions in, pictures out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, T2IAdapter
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from kernels import ops
from runtime import loading
from runtime.adapter import Control, embedded_adapters, load_adapter
from runtime.checks import MAX_SEED, check_backend, check_call, check_finite
from runtime.denoiser import EngineDenoiser, TorchDenoiser
from runtime.engine_model import EngineAdapter, engine_device, load_engines
from runtime.errors import InputError
from runtime.loading import DTYPES, Model
from runtime.lora import LoraSource
from runtime.packed import pack_weights, packs_here
from runtime.quiet import quiet
from runtime.region import Region, check_size, pack
from runtime.sampler import denoise, make_scheduler, set_timesteps
from runtime.text import encode_guidance

DECODE_PIXELS = 2**21  # decoded at once: two pictures of 1024 x 1024
AdapterSource = str | Path | T2IAdapter


@dataclass
class Result:
    """Pictures, and what made them.

    images: PIL, RGB. latents: (B, C, h, w) float32, what was decoded. timings: seconds of each stage (text, adapter,
    denoise, decode) and "total". seed: of the first image; image i has seed + i.
    """

    images: list[Image.Image]
    latents: Tensor
    timings: dict[str, float]
    seed: int


class LocalControlPipeline:
    """SDXL with controls that act inside painted regions only."""

    def __init__(
        self,
        model: Model,
        adapters: Mapping[str, T2IAdapter | EngineAdapter],
        backend: str = "auto",
        denoiser: TorchDenoiser | EngineDenoiser | None = None,
    ):
        """``backend``: of the custom kernels, "auto", "triton" or "torch" (see `kernels.ops`)."""
        check_backend(backend)
        self.model, self.adapters, self.backend = model, dict(adapters), backend
        self.denoiser = TorchDenoiser(model.unet) if denoiser is None else denoiser
        self.device, self.dtype = self.denoiser.device, self.denoiser.dtype

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "embedded",
        adapters: Mapping[str, AdapterSource] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        *,
        allow_pickle: bool = False,
        **options,
    ) -> LocalControlPipeline:
        """Load a model and its adapters.

        model: "embedded", a diffusers folder, a single .safetensors file, or a hub id.
        adapters: name -> folder, file, hub id or T2IAdapter; the embedded model brings its own ones.
        device: a GPU where there is one. dtype: "fp32", "bf16", "fp16" or torch's; by default bf16 on a GPU that has
        it, fp16 on another, fp32 on a CPU, where bf16 packs the UNet's weights (see `runtime.packed`).
        options: `loading.load_model`'s: vae, loras, tokenizer, config.

        Raises InputError, naming what is missing or does not fit.
        """
        check_backend(backend)
        device = _device(device)
        dtype = _dtype(dtype, device)
        if str(model) == "embedded":
            adapters = {**embedded_adapters(), **(adapters or {})}
        # The model last: it takes the longest, and what is wrong with an adapter is known before.
        adapters = _load_adapters(adapters or {}, device, dtype, allow_pickle)
        loaded = loading.load_model(model, device=device, dtype=dtype, allow_pickle=allow_pickle, **options)
        if packs_here(dtype, device):
            pack_weights(loaded.unet)
        return cls(loaded, adapters, backend)

    @classmethod
    def from_diffusers(
        cls,
        pipe: DiffusionPipeline,
        adapters: Mapping[str, AdapterSource] | None = None,
        backend: str = "auto",
    ) -> LocalControlPipeline:
        """Take any diffusers SDXL pipeline, on its device and in its dtype; weights are shared, not copied.

        adapters: as in `from_pretrained`; by default the pipeline's own one, if it has one, named "canny".
        """
        if adapters is None and isinstance(own := getattr(pipe, "adapter", None), T2IAdapter):
            adapters = {"canny": own}
        model = loading.from_diffusers(pipe)
        return cls(model, _load_adapters(adapters or {}, pipe.device, pipe.unet.dtype, False), backend)

    @classmethod
    def from_engine(
        cls,
        folder: str | Path,
        adapters: Mapping[str, AdapterSource] | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
        *,
        model: str | Path | None = None,
        loras: Sequence[LoraSource] = (),
        allow_pickle: bool = False,
        **options,
    ) -> LocalControlPipeline:
        """Run on the engines of a folder that `export.build_engine` wrote.

        adapters: more of them, or others of the same name, run with torch. device: a GPU for TensorRT, a CPU for the
        others, unless one is named. model: where to load parts from that were not compiled (by default the model that
        was), found to have the same weights. loras: put into the open engines, where they were built with --refit.

        Raises InputError, naming what does not match between the folder, this machine and the model.
        """
        check_backend(backend)
        device = _device(device or engine_device(folder))
        options |= {"allow_pickle": allow_pickle}
        loaded, denoiser, own = load_engines(folder, device, source=model, loras=loras, **options)
        others = _load_adapters(adapters or {}, device, denoiser.dtype, allow_pickle)
        return cls(loaded, {**own, **others}, backend, denoiser)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        regions: Sequence[Region] = (),
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        steps: int = 30,
        guidance: float = 5.0,
        seed: int | None = None,
        images_per_prompt: int = 1,
        scheduler: str | SchedulerMixin | None = None,
        latents: Tensor | None = None,
        *,
        mask_resize: str = "area",
        guidance_range: tuple[float, float] = (0.0, 1.0),
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Generate.

        prompt: one, or several for a batch. regions: none is plain text-to-image.
        height, width: pixels, multiples of 16; the model's own size by default.
        guidance: classifier-free guidance; 1 or less runs without. seed: of the first image, image i takes seed + i;
        drawn and reported where None. scheduler: see `sampler.SCHEDULERS`; the model's own by default.
        latents: initial N(0, 1) noise, (B, C, height / 8, width / 8), instead of the seed's.
        mask_resize: how masks come to the size of each level, see `masks.mask_pyramid`: "area", or "nearest" as in the
        original method. guidance_range: the fractions of the steps between which guidance acts; the others take half
        the work (see `sampler.denoise`). progress: called with (steps done, steps) after every denoising step.

        Raises InputError for bad input, and where a stage's result is not finite, naming the stage.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        check_call(prompts, negative_prompt, steps, guidance, seed, images_per_prompt, guidance_range)
        height, width = (self.default_size if side is None else side for side in (height, width))
        check_size(height, width)
        count = len(prompts) * images_per_prompt
        guidance_range = tuple(map(float, guidance_range))
        # the sizes of its steps: with guidance, without it, or both
        for guided in {guidance > 1, guidance > 1 and guidance_range == (0, 1)}:
            self.denoiser.check(count, guided, height, width)
        seed = secrets.randbits(32) if seed is None else int(seed)
        generators = [torch.Generator().manual_seed((seed + i) % MAX_SEED) for i in range(count)]
        noise = self._noise(latents, count, height, width, generators)
        scheduler = make_scheduler(scheduler, self.model.scheduler)
        timesteps = set_timesteps(scheduler, steps, self.device)
        packed = pack(regions, height, width)

        timings: dict[str, float] = {}
        with ops.use_backend(self.backend), _timed(timings, "total", self.device):
            with _timed(timings, "text", self.device):
                negative = [negative_prompt] * len(prompts)
                text, pooled = encode_guidance(self.model, prompts, negative, guidance > 1)
                check_finite(text, "text", self.dtype)
            with _timed(timings, "adapter", self.device):
                control = self._control(packed, len(timesteps), mask_resize)
            with _timed(timings, "denoise", self.device):
                ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device)
                ids = ids.expand(len(text), -1).to(self.dtype)
                step = self.denoiser.prepare(timesteps, text, pooled, ids, control, images_per_prompt)
                result = denoise(step, scheduler, noise, guidance, generators, progress, guidance_range)
                check_finite(result, "denoise", self.dtype)
            with _timed(timings, "decode", self.device):
                pixels = self.decode(result)
        return Result(_to_images(pixels), result, timings, seed)

    @property
    def default_size(self) -> int:
        """The side, in pixels, of the square images that the model was trained on."""
        return self.model.sample_size * self.vae_factor

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.model.vae.config.block_out_channels) - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) float32 in [0, 1], on the CPU; a few images at a time."""
        vae = self.model.vae
        mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
        latents = latents / vae.config.scaling_factor
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(x).view(1, -1, 1, 1) for x in (mean, std))
            latents = latents * std + mean
        area = latents.shape[2] * latents.shape[3] * self.vae_factor**2
        chunks = latents.to(vae.dtype).split(max(1, DECODE_PIXELS // area))
        pixels = torch.cat([vae.decode(chunk, return_dict=False)[0].float().cpu() for chunk in chunks])
        check_finite(pixels, "decode", vae.dtype)
        return (pixels / 2 + 0.5).clamp(0, 1)

    def _noise(self, latents: Tensor | None, count: int, height: int, width: int, generators) -> Tensor:
        shape = (count, self.denoiser.latent_channels, height // self.vae_factor, width // self.vae_factor)
        if latents is None:  # drawn on the CPU, image by image: the same on every device and in every batch
            return randn_tensor(shape, generator=generators, dtype=torch.float32).to(self.device)
        if tuple(latents.shape) != shape:
            raise InputError(f"latents: shape {tuple(latents.shape)}, expected {shape}")
        if not latents.isfinite().all():
            raise InputError("latents: NaN or infinite values, expected N(0, 1) noise")
        return latents.to(self.device, torch.float32)

    def _control(self, packed, steps: int, mask_resize: str) -> Control | None:
        control = Control.build(
            packed,
            self.adapters,
            steps,
            device=self.device,
            dtype=self.dtype,
            channels=self.denoiser.control_channels,
            mode=mask_resize,
        )
        for feature in (f for level in (control.features if control else ()) for f in level):
            check_finite(feature, "adapter", self.dtype)
        return control


def _load_adapters(
    sources: Mapping[str, AdapterSource], device: torch.device, dtype: torch.dtype, allow_pickle: bool
) -> dict[str, T2IAdapter]:
    adapters = {}
    for name, source in sources.items():
        if isinstance(source, T2IAdapter):
            with quiet():
                adapters[name] = source.to(device, dtype).eval()
        else:
            adapters[name] = load_adapter(
                source, device=device, dtype=dtype, allow_pickle=allow_pickle, name=name
            )
    return adapters


def _device(device: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device {device!r}: unknown, expected cpu, cuda, cuda:0 ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: no CUDA device is available here, expected cpu")
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if not isinstance(dtype, torch.dtype) and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: unknown, expected {', '.join(DTYPES)}")
    return DTYPES.get(dtype, dtype)


def _to_images(pixels: Tensor) -> list[Image.Image]:
    arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


@contextmanager
def _timed(timings: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    """Add the wall-clock seconds of the block, GPU work included."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    timings[stage] = time.perf_counter() - start
