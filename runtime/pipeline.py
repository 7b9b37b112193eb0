"""LocalControlPipeline: prompt and regions in, pictures out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, T2IAdapter
from PIL import Image
from torch import Tensor

from kernels import ops
from runtime.capabilities import Capabilities
from runtime.control.adapters import Adapter
from runtime.control.features import Control, activity
from runtime.control.images import fit, to_tensor
from runtime.control.region import Region
from runtime.engines.parts import engine_device, load_engines
from runtime.engines.torch_compile import compile_decoder, compile_unet
from runtime.errors import InputError
from runtime.loading import load as loading
from runtime.loading.adapter import embedded_adapters
from runtime.loading.load import AdapterSource, Model
from runtime.loading.lora import LoraSource
from runtime.machine.device import check_backend, check_compile, pick_device, pick_dtype
from runtime.machine.finite import check_finite
from runtime.machine.report import timed
from runtime.model.attention import check_attention, use_attention
from runtime.model.vae import vae_factor
from runtime.optimize.fp8 import check_quantize
from runtime.optimize.fused import fuse_unet, fuses_here
from runtime.optimize.offload import Offload, check_offload
from runtime.optimize.specialize import specialize
from runtime.sampling.decode import decode, to_images
from runtime.sampling.denoiser import Denoiser, Step, TorchDenoiser
from runtime.sampling.encode import encode
from runtime.sampling.loop import denoise, make_noise
from runtime.sampling.request import MAX_SEED, Request
from runtime.sampling.schedulers import make_scheduler, set_timesteps
from runtime.sampling.text import Reading, encode_guidance

OUTPUT = {
    "pil": to_images,
    "pt": lambda pixels: pixels.cpu(),
    "np": lambda pixels: pixels.permute(0, 2, 3, 1).cpu().numpy(),
}


@dataclass
class Result:
    """Pictures, and what made them.

    images: PIL, RGB; where another output_type was asked for, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1],
    or none. latents: (B, C, h, w) float32, what was decoded. timings: seconds of each stage (text, adapter, denoise,
    decode) and "total". seed: of the first image, image i has seed + i; a given generator's own. region_steps: the
    steps, from 0, in which each region acts.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    latents: Tensor
    timings: dict[str, float]
    seed: int
    region_steps: list[list[int]] = field(default_factory=list)


class LocalControlPipeline:
    """SDXL with controls that act inside painted regions only."""

    def __init__(
        self,
        model: Model,
        adapters: Mapping[str, Adapter],
        backend: str = "auto",
        denoiser: Denoiser | None = None,
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
        options: `loading.load_model`'s: vae, loras, tokenizer, config, prediction_type, rescale_betas_zero_snr.

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
        `warm_up`. Other sizes, batches, prompts, masks and regions need no compiling (see
        `engines.torch_compile`); a CUDA graph is captured for each size. Returns itself.

        Raises InputError where the UNet runs on engines or is offloaded, or a CUDA graph is asked for without a GPU.
        """
        check_compile(compiler is not None, cuda_graph, self.device, self.offload and self.offload.how)
        if self.denoiser.profile is not None:
            raise InputError("compile: the UNet is compiled already; expected one in PyTorch")
        self.denoiser = compile_unet(self.model, compiler, cuda_graph)
        if compiler is not None and self.device.type == "cuda":  # on a CPU it waits for longer than it wins
            compile_decoder(self.model.vae, compiler)
        return self

    def warm_up(
        self,
        height: int | None = None,
        width: int | None = None,
        images: int = 1,
        *,
        request: Request | None = None,
        **settings,
    ) -> None:
        """Do what the first picture of a request would wait for: compile, capture, choose algorithms.

        request: the one to come; by default one of this size and these settings, which are a call's keyword arguments.
        """
        if request is None:
            request = Request("", height=height, width=width, images_per_prompt=images, **settings)
        kinds = sorted(
            set(request.guided_steps(request.run_steps)), reverse=True
        )  # a step with guidance, one without
        once = {"steps": len(kinds), "guidance_range": (0.0, sum(kinds) / len(kinds)), "scheduler": "euler"}
        once |= {"image": None, "strength": 1.0, "generator": None}
        self.draw(replace(request, **once, regions=(), latents=None, seed=0, cache_interval=1))

    def __call__(
        self,
        prompt: str | Sequence[str],
        regions: Sequence[Region] = (),
        negative_prompt: str | Sequence[str] = "",
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
        guidance_rescale: float = 0.0,
        cache_interval: int = 1,
        prompt_syntax: str = "plain",
        clip_skip: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        image=None,
        strength: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Generate.

        prompt: one, or several for a batch; negative_prompt: one for all, or one for each.
        regions: none is plain text-to-image.
        height, width: pixels, multiples of 16; the model's own size by default.
        guidance: classifier-free guidance; 1 or less runs without. seed: of the first image, image i takes seed + i;
        drawn and reported where None. scheduler: see `schedulers.SCHEDULERS`; the model's own by default.
        latents: initial N(0, 1) noise, (B, C, height / 8, width / 8), instead of the seed's.
        mask_resize: how masks come to the size of each level, see `masks.mask_pyramid`: "area", or "nearest" as in the
        original method. guidance_range: the fractions of the steps between which guidance acts; the others take half
        the work (see `loop.denoise`). guidance_rescale: how far the guided prediction is brought to the spread of
        the prompt's own, 0 to 1, against overexposed pictures (arXiv 2305.08891). cache_interval: compute the UNet's
        deep features at every so many steps only (see `deep_cache.DeepCache`; lossy above 1).
        prompt_syntax: "plain", or "a1111" for weights such as (word:1.3), see `prompts.parse`; long prompts are encoded
        in chunks in either. clip_skip: how many more of the text encoders' last layers to leave out. generator: instead
        of a seed, one for all images or one for each. output_type: "pil", "np", "pt", or "latent" to decode nothing.
        image: a picture to start from (what `Region` takes), resized to height and width, by default its own rounded
        down to 16; strength: the share of the steps that are run on it, above 0, up to 1.
        progress: called with (steps done, steps) after every step.

        May be called from several threads. Raises InputError for bad input, and where a stage's result is not finite,
        naming the stage.
        """
        request = Request(
            prompt,
            regions,
            negative_prompt,
            height,
            width,
            steps,
            guidance,
            seed,
            images_per_prompt,
            scheduler,
            latents,
            mask_resize,
            guidance_range,
            guidance_rescale,
            cache_interval,
            prompt_syntax,
            clip_skip,
            generator,
            output_type,
            image,
            strength,
        )
        return self.draw(request, progress)

    @torch.inference_mode()
    def draw(self, request: Request, progress: Callable[[int, int], None] | None = None) -> Result:
        """Generate what a request asks for; see `__call__`."""
        self.capabilities.check(request)
        height, width = request.height or self.default_size, request.width or self.default_size
        seed, generators = _randomness(request)
        sides = height // self.vae_factor, width // self.vae_factor
        shape = (request.images, self.denoiser.latent_channels, *sides)
        scheduler = make_scheduler(request.scheduler, self.model.scheduler)
        timesteps = set_timesteps(scheduler, request.steps, self.device, request.left)
        packed = request.pack(height, width)

        timings: dict[str, float] = {}
        with ops.use_backend(self.backend), timed(timings, "total", self.device):
            start = self._start(request, generators, (height, width), timings)
            noise = make_noise(shape, generators, request.latents).to(self.device)
            with timed(timings, "text", self.device), self._at_work("text"):
                reading = Reading(request.prompt_syntax, request.clip_skip, self.denoiser.most_tokens)
                guided = request.guidance > 1
                text, pooled = encode_guidance(
                    self.model, request.prompts, request.negatives, guided, reading
                )
                check_finite(text, "text", self.dtype)
            with timed(timings, "adapter", self.device):
                control = self._control(packed, len(timesteps), request.mask_resize)
            with timed(timings, "denoise", self.device), self._at_work("denoise"):
                step = self._prepare(request, timesteps, text, pooled, (height, width), control)
                with use_attention(self.attention):
                    result = denoise(
                        step,
                        scheduler,
                        noise,
                        request.guidance,
                        generators,
                        progress,
                        request.guidance_range,
                        request.guidance_rescale,
                        timesteps,
                        start,
                    )
                check_finite(result, "denoise", self.dtype)
            images = []
            if request.output_type != "latent":
                with timed(timings, "decode", self.device), self._at_work("decode"):
                    images = OUTPUT[request.output_type](decode(self.model.vae, result))
        acting = activity(request.regions, len(timesteps))
        return Result(images, result, timings, seed, [rows.nonzero()[:, 0].tolist() for rows in acting.T])

    @property
    def capabilities(self) -> Capabilities:
        """Return what can be asked for."""
        waits = self.offload.whole_steps if self.offload is not None else None
        whole_steps = self.denoiser.whole_steps or waits
        return Capabilities(self.adapters.keys(), self.default_size, self.denoiser.profile, whole_steps)

    @property
    def default_size(self) -> int:
        """Return the side, in pixels, of the square images that the model was trained on."""
        return self.model.sample_size * self.vae_factor

    @property
    def vae_factor(self) -> int:
        return vae_factor(self.model.vae)

    def decode(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) -> pixels (B, 3, H, W) float32 in [0, 1], on the CPU."""
        with self._at_work("decode"):
            return decode(self.model.vae, latents).cpu()

    def _start(
        self,
        request: Request,
        generators: Sequence[torch.Generator],
        size: tuple[int, int],
        timings: dict[str, float],
    ) -> Tensor | None:
        """Return the latents of the picture that the run starts from, (B, C, h, w); None without one."""
        if request.image is None:
            return None
        pixels = fit(to_tensor(request.image), *size, "image").to(self.device)
        with timed(timings, "encode", self.device), self._at_work("decode"):
            return encode(self.model.vae, pixels, generators, request.images)

    def _at_work(self, stage: str) -> AbstractContextManager[None]:
        return nullcontext() if self.offload is None else self.offload.at_work(stage)

    def _prepare(
        self,
        request: Request,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        size: tuple[int, int],
        control: Control | None,
    ) -> Step:
        ids = torch.tensor([[*size, 0, 0, *size]], device=self.device)
        ids = ids.expand(len(text), -1).to(self.dtype)
        return self.denoiser.prepare(
            timesteps, text, pooled, ids, control, request.images_per_prompt, request.cache_interval
        )

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


def _randomness(request: Request) -> tuple[int, Sequence[torch.Generator]]:
    """Return the first image's seed, and the generators: one for each image, or the one that was given for all."""
    if request.generators is not None:
        return request.generators[0].initial_seed(), request.generators
    seed = secrets.randbits(32) if request.seed is None else request.seed
    return seed, [torch.Generator().manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(request.images)]
