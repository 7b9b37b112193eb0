"""LocalControlPipeline: prompt and regions in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from kernels import ops
from runtime.arguments import truth
from runtime.capabilities import Capabilities
from runtime.control.adapters import Adapter
from runtime.control.region import Region
from runtime.engines.captured_parts import capture_parts
from runtime.engines.parts import engine_device, load_engines
from runtime.engines.torch_compile import compile_decoder, compile_unet
from runtime.errors import InputError
from runtime.loading import load as loading
from runtime.loading.adapter import embedded_adapters
from runtime.loading.controlnet import check_controlnet
from runtime.loading.controls import AdapterSource, load_controls, named, own_adapter
from runtime.loading.load import Model
from runtime.loading.lora import LoraSource
from runtime.machine.device import check_backend, check_compile, pick_device, pick_dtype
from runtime.model.attention import check_attention
from runtime.model.controlnet import ControlNet
from runtime.model.vae import vae_factor
from runtime.optimize.fp8 import check_quantize
from runtime.optimize.fused import fuse_encoder, fuse_unet, fuses_here
from runtime.optimize.offload import Offload, check_offload
from runtime.optimize.specialize import distinct, specialize
from runtime.sampling.denoiser import Denoiser, TorchDenoiser
from runtime.sampling.drawing import Drawing
from runtime.sampling.held import Reference
from runtime.sampling.pixels import decode
from runtime.sampling.progress import OnStep
from runtime.sampling.rehearsals import rehearsals
from runtime.sampling.request import Request
from runtime.sampling.result import Result


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
        controlnets: Mapping[str, ControlNet] | None = None,
    ):
        """adapters: T2I-Adapters by name. backend: of the kernels, "auto", "triton" or "torch" (see `kernels.ops`).

        attention: see `runtime.model.attention`. offload: what brings a model that waits in main memory to its device.
        controlnets: ControlNets by name, which other adapters do not have.
        """
        self.model, self.adapters, self.backend = model, dict(adapters), backend
        self.controlnets = dict(controlnets or {})
        self.attention, self.offload = attention, offload
        self.denoiser = denoiser or TorchDenoiser(model.unet, offload and offload.device)
        self.device, self.dtype = self.denoiser.device, self.denoiser.dtype
        check_backend(backend, self.device)
        check_attention(attention, self.device, self.dtype)
        for name, net in self.controlnets.items():
            check_controlnet(name, net, model.unet.config, self.vae_factor)

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
        adapters: name -> T2I-Adapter or ControlNet: folder, file, hub id, or diffusers' object; the embedded model
        brings its own ones. Of a ControlNet-Union the name says the control ("depth", "depth-2").
        device: a GPU where there is one. dtype: "fp32", "bf16", "fp16" or torch's; by default bf16 on a GPU that has
        it, fp16 on another, fp32 on a CPU, where the UNet's weights are packed if that helps (see
        `optimize.packed`).
        attention: the UNet's, one of `attention.ATTENTIONS`. quantize: "fp8", or "fp8-weights" to save memory alone
        (see `optimize.fp8`; lossy). offload: "model" or "group", for a GPU with little memory (see `optimize.offload`).
        vae_tiling: decode a picture larger than the model's own size in tiles, blended where they meet (lossy).
        options: `loading.load_model`'s: vae, loras, tokenizer, config, prediction_type, rescale_betas_zero_snr.

        Raises InputError, naming what is missing or does not fit.
        """
        allow_pickle, vae_tiling = truth(allow_pickle, "allow_pickle"), truth(vae_tiling, "vae_tiling")
        device = pick_device(device)
        check_backend(backend, device)
        dtype = pick_dtype(dtype, device)
        check_quantize(quantize, device, dtype)
        check_offload(offload, device)
        check_attention(attention, device, dtype)
        if str(model) == "embedded":
            adapters = {**embedded_adapters(), **named(adapters or {})}
        # The model last: it takes the longest, and what is wrong with an adapter is known before.
        home = device if offload is None else "cpu"
        nets_home = home if offload == "model" else device
        adapters, nets = load_controls(adapters or {}, device, dtype, allow_pickle, nets_home)
        loaded = loading.load_model(model, device=home, dtype=dtype, allow_pickle=allow_pickle, **options)
        specialize(loaded, device, dtype, backend, quantize, nets.values())
        if vae_tiling:
            loaded.vae.enable_tiling()
        offload = offload and Offload(loaded, device, offload, distinct(nets.values()))
        return cls(loaded, adapters, backend, attention=attention, offload=offload, controlnets=nets)

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

        adapters, attention: as in `from_pretrained`; by default the pipeline's own adapter or ControlNet, if it has
        one, named "canny".
        """
        adapters = own_adapter(pipe) if adapters is None else adapters
        model = loading.from_diffusers(pipe)
        adapters, nets = load_controls(adapters or {}, pipe.device, pipe.unet.dtype)
        if fuses_here(backend, pipe.device):
            fuse_unet(model.unet)
            for net in distinct(nets.values()):
                fuse_encoder(net)
        return cls(model, adapters, backend, attention=attention, controlnets=nets)

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
        allow_pickle = truth(allow_pickle, "allow_pickle")
        device = pick_device(device or engine_device(folder))
        check_backend(backend, device)
        options |= {"allow_pickle": allow_pickle}
        loaded, denoiser, own = load_engines(folder, device, source=model, loras=loras, **options)
        others, nets = load_controls(adapters or {}, device, denoiser.dtype, allow_pickle)
        if nets:
            raise InputError(
                f"adapter {next(iter(nets))}: a ControlNet, which a compiled UNet does not take; leave the engine out"
            )
        return cls(loaded, {**own, **others}, backend, denoiser)

    def compile(
        self, *, compiler: str | Callable | None = "inductor", cuda_graph: bool = False
    ) -> LocalControlPipeline:
        """Have the UNet and, on a GPU, the VAE's decoder compiled by torch.compile; the UNet, text encoders and
        T2I-Adapters captured as CUDA graphs.

        compiler: torch.compile's backend, None for none. The first picture waits for it, minutes with SDXL; see
        `warm_up`. Other sizes, batches, prompts, masks and regions need no compiling (see
        `engines.torch_compile`), but for a number of regions with words, and for ControlNets, which have a graph of the
        UNet of their own, and run beside it as they are. A CUDA graph is captured for each size. Returns itself.

        Raises InputError where the UNet runs on engines or is offloaded, or a CUDA graph is asked for without a GPU.
        """
        check_compile(compiler is not None, cuda_graph, self.device, self.offload and self.offload.how)
        if self.denoiser.profile is not None:
            raise InputError("compile: the UNet is compiled already; expected one in PyTorch")
        self.denoiser = compile_unet(self.model, compiler, cuda_graph)
        if cuda_graph:
            self.model, self.adapters = capture_parts(self.model, self.adapters, self.device)
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
            plain = {"prompt": "", "height": height, "width": width, "images_per_prompt": images}
            request = Request(**plain | settings)
        for once in rehearsals(request, request.size(self.default_size), self.controlnets):
            self.draw(once)

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
        outside: str = "free",
        reference: Reference | None = None,
        on_step: OnStep | None = None,
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
        prompt_syntax: "plain", or "a1111" for weights such as (word:1.3), see `prompts.parse`, and prompts joined by
        AND, see `composition`; long prompts are encoded in chunks in either. clip_skip: how many more of the text
        encoders' last layers to leave out. generator: instead of a seed, one for all images or one for each.
        output_type: "pil", "np", "pt", or "latent" to decode nothing.
        image: a picture to start from (what `Region` takes, a list too), resized to height and width, by default its
        own rounded down to 16; strength: the share of the steps that are run on it, above 0, up to 1.
        outside: "free", or "held": where no mask covers it, every pixel is that of a reference, which is `image` at its
        own size, or without one the picture of this seed without control. reference: an earlier result's, used again
        where nothing else has changed, so that another region takes one run and not two; without a seed its own
        counts. Leave it out where the model's weights were changed.
        on_step: called after every step with a `Progress` (step, steps, latents, preview()); where it raises, or calls
        the Progress's cancel(), no further step is run.

        May be called from several threads. Raises InputError for bad input, and where a stage's result is not finite,
        naming the stage; Cancelled where on_step has cancelled it.
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
            outside,
            reference,
        )
        return self.draw(request, on_step)

    @torch.inference_mode()
    def draw(self, request: Request, on_step: OnStep | None = None) -> Result:
        """Generate what a request asks for; see `__call__`."""
        self.capabilities.check(request)
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step: a {type(on_step).__name__}; expected a function")
        with ops.use_backend(self.backend):
            return Drawing(self, request, on_step).draw()

    @property
    def capabilities(self) -> Capabilities:
        """Return what can be asked for."""
        waits = self.offload.whole_steps if self.offload is not None else None
        whole_steps = self.denoiser.whole_steps or waits
        return Capabilities(
            [*self.adapters, *self.controlnets],
            self.default_size,
            self.denoiser.profile,
            whole_steps,
            words=self.denoiser.most_words,
        )

    @property
    def default_size(self) -> int:
        """Return the side, in pixels, of the square images that the model was trained on."""
        return self.model.sample_size * self.vae_factor

    @property
    def vae_factor(self) -> int:
        return vae_factor(self.model.vae)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) -> pixels (B, 3, H, W) float32 in [0, 1], on the CPU."""
        with self.at_work("decode"):
            return decode(self.model.vae, latents).cpu()

    def at_work(self, stage: str) -> AbstractContextManager[None]:
        """Have the modules of a stage, "text", "denoise" or "decode", on the device in this block."""
        return nullcontext() if self.offload is None else self.offload.at_work(stage)
