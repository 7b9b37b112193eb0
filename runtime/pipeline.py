"""LocalControlPipeline: prompt and regions in, pictures out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, T2IAdapter
from PIL import Image
from torch import Tensor

from kernels import ops
from runtime.control.features import Control
from runtime.control.region import Region, check_size, pack
from runtime.engines.parts import EngineAdapter, engine_device, load_engines
from runtime.engines.torch_compile import compile_decoder, compile_unet
from runtime.errors import InputError
from runtime.loading import load as loading
from runtime.loading.adapter import embedded_adapters
from runtime.loading.load import AdapterSource, Model
from runtime.loading.lora import LoraSource
from runtime.machine.device import pick_device, pick_dtype
from runtime.machine.report import timed
from runtime.model.attention import check_attention, use_attention
from runtime.optimize.fp8 import check_quantize
from runtime.optimize.fused import fuse_unet, fuses_here
from runtime.optimize.offload import Offload, check_offload
from runtime.optimize.specialize import specialize
from runtime.sampling.checks import MAX_SEED, check_backend, check_call, check_finite
from runtime.sampling.decode import decode, to_images, vae_factor
from runtime.sampling.denoiser import EngineDenoiser, TorchDenoiser
from runtime.sampling.loop import denoise, guided_steps, make_noise, make_scheduler, set_timesteps
from runtime.sampling.text import encode_guidance


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
        *,
        attention: str = "auto",
        offload: Offload | None = None,
    ):
        """backend: of the custom kernels, "auto", "triton" or "torch" (see `kernels.ops`).

        attention: see `runtime.model.attention`. offload: what brings a model that waits in main memory to its device.
        """
        check_backend(backend)
        self.model, self.adapters, self.backend = model, dict(adapters), backend
        self.attention, self.offload = attention, offload
        self.denoiser = denoiser or TorchDenoiser(model.unet, offload and offload.device)
        self.device, self.dtype = self.denoiser.device, self.denoiser.dtype
        check_attention(attention, self.device, self.dtype)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "embedded",
        adapters: Mapping[str, AdapterSource] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        *,
        attention: str = "auto",
        quantize: str | None = None,
        offload: str | None = None,
        vae_tiling: bool = False,
        allow_pickle: bool = False,
        **options,
    ) -> LocalControlPipeline:
        """Load a model and its adapters.

        model: "embedded", a diffusers folder, a single .safetensors file, or a hub id.
        adapters: name -> folder, file, hub id or T2IAdapter; the embedded model brings its own ones.
        device: a GPU where there is one. dtype: "fp32", "bf16", "fp16" or torch's; by default bf16 on a GPU that has
        it, fp16 on another, fp32 on a CPU, where the UNet's weights are packed if that helps (see
        `optimize.packed`).
        attention: the UNet's, one of `attention.ATTENTIONS`. quantize: "fp8", or "fp8-weights" to save memory alone
        (see `optimize.fp8`; lossy). offload: "model" or "group", for a GPU with little memory (see `optimize.offload`).
        vae_tiling: decode a picture larger than the model's own size in tiles, blended where they meet (lossy).
        options: `loading.load_model`'s: vae, loras, tokenizer, config.

        Raises InputError, naming what is missing or does not fit.
        """
        check_backend(backend)
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        check_quantize(quantize, device, dtype)
        check_offload(offload, device)
        check_attention(attention, device, dtype)
        if str(model) == "embedded":
            adapters = {**embedded_adapters(), **(adapters or {})}
        # The model last: it takes the longest, and what is wrong with an adapter is known before.
        adapters = loading.load_adapters(adapters or {}, device, dtype, allow_pickle)
        home = device if offload is None else "cpu"
        loaded = loading.load_model(model, device=home, dtype=dtype, allow_pickle=allow_pickle, **options)
        specialize(loaded, device, dtype, backend, quantize)
        if vae_tiling:
            loaded.vae.enable_tiling()
        offload = offload and Offload(loaded, device, offload)
        return cls(loaded, adapters, backend, attention=attention, offload=offload)

    @classmethod
    def from_diffusers(
        cls,
        pipe: DiffusionPipeline,
        adapters: Mapping[str, AdapterSource] | None = None,
        backend: str = "auto",
        *,
        attention: str = "auto",
    ) -> LocalControlPipeline:
        """Take any diffusers SDXL pipeline, on its device and in its dtype; weights are shared, not copied.

        adapters, attention: as in `from_pretrained`; by default the pipeline's own adapter, if it has one, named
        "canny".
        """
        if adapters is None and isinstance(own := getattr(pipe, "adapter", None), T2IAdapter):
            adapters = {"canny": own}
        model = loading.from_diffusers(pipe)
        if fuses_here(backend, pipe.device):
            fuse_unet(model.unet)
        adapters = loading.load_adapters(adapters or {}, pipe.device, pipe.unet.dtype, False)
        return cls(model, adapters, backend, attention=attention)

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
        device = pick_device(device or engine_device(folder))
        options |= {"allow_pickle": allow_pickle}
        loaded, denoiser, own = load_engines(folder, device, source=model, loras=loras, **options)
        others = loading.load_adapters(adapters or {}, device, denoiser.dtype, allow_pickle)
        return cls(loaded, {**own, **others}, backend, denoiser)

    def compile(
        self, *, compiler: str | Callable | None = "inductor", cuda_graph: bool = False
    ) -> LocalControlPipeline:
        """Have the UNet and, on a GPU, the VAE's decoder compiled by torch.compile; the UNet captured as a CUDA graph.

        compiler: torch.compile's backend, None for none. The first picture waits for it, minutes with SDXL; see
        `warm_up`. Other sizes, batches, prompts, masks and regions need no compiling (see `engine_torch`); a CUDA
        graph is captured for each size. Returns itself.

        Raises InputError where the UNet runs on engines, is offloaded, or its weights are packed.
        """
        if self.offload is not None:
            raise InputError("compile: the UNet is offloaded; expected one that stays on its device")
        if not isinstance(self.denoiser, TorchDenoiser):
            raise InputError("compile: the UNet is compiled already; expected one in PyTorch")
        self.denoiser = compile_unet(self.model, compiler, cuda_graph)
        if compiler is not None and self.device.type == "cuda":  # on a CPU it waits for longer than it wins
            compile_decoder(self.model.vae, compiler)
        return self

    def warm_up(self, height: int | None = None, width: int | None = None, images: int = 1) -> None:
        """Do what the first picture of this size would wait for: compile, capture, choose algorithms."""
        steps = {"steps": 2, "guidance_range": (0.0, 0.5)}  # one step with guidance, one without
        self("", height=height, width=width, images_per_prompt=images, seed=0, **steps)

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
        cache_interval: int = 1,
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
        the work (see `sampler.denoise`). cache_interval: compute the UNet's deep features at every so many steps only
        (see `deep_cache.DeepCache`; lossy above 1). progress: called with (steps done, steps) after every step.

        Raises InputError for bad input, and where a stage's result is not finite, naming the stage.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        check_call(
            prompts, negative_prompt, steps, guidance, seed, images_per_prompt, guidance_range, cache_interval
        )
        if self.offload is not None:
            self.offload.check(cache_interval)
        height, width = (self.default_size if side is None else side for side in (height, width))
        check_size(height, width)
        count = len(prompts) * images_per_prompt
        seed = secrets.randbits(32) if seed is None else int(seed)
        generators = [torch.Generator().manual_seed((seed + i) % MAX_SEED) for i in range(count)]
        sides = height // self.vae_factor, width // self.vae_factor
        noise = make_noise((count, self.denoiser.latent_channels, *sides), generators, latents).to(
            self.device
        )
        scheduler = make_scheduler(scheduler, self.model.scheduler)
        timesteps = set_timesteps(scheduler, steps, self.device)
        for guided in set(guided_steps(guidance, guidance_range, len(timesteps))):
            self.denoiser.check(count, guided, height, width, cache_interval)
        packed = pack(regions, height, width)

        timings: dict[str, float] = {}
        with ops.use_backend(self.backend), timed(timings, "total", self.device):
            with timed(timings, "text", self.device), self._at_work("text"):
                negative = [negative_prompt] * len(prompts)
                text, pooled = encode_guidance(self.model, prompts, negative, guidance > 1)
                check_finite(text, "text", self.dtype)
            with timed(timings, "adapter", self.device):
                control = self._control(packed, len(timesteps), mask_resize)
            with (
                timed(timings, "denoise", self.device),
                self._at_work("denoise"),
                use_attention(self.attention),
            ):
                ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device)
                ids = ids.expand(len(text), -1).to(self.dtype)
                step = self.denoiser.prepare(
                    timesteps, text, pooled, ids, control, images_per_prompt, cache_interval
                )
                result = denoise(step, scheduler, noise, guidance, generators, progress, guidance_range)
                check_finite(result, "denoise", self.dtype)
            with timed(timings, "decode", self.device):
                pixels = self.decode(result)
        return Result(to_images(pixels), result, timings, seed)

    @property
    def default_size(self) -> int:
        """The side, in pixels, of the square images that the model was trained on."""
        return self.model.sample_size * self.vae_factor

    @property
    def vae_factor(self) -> int:
        return vae_factor(self.model.vae)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) float32 in [0, 1], on the CPU."""
        with self._at_work("decode"):
            return decode(self.model.vae, latents)

    def _at_work(self, stage: str) -> AbstractContextManager[None]:
        return nullcontext() if self.offload is None else self.offload.at_work(stage)

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
