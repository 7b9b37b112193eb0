"""An engine folder as the parts of a pipeline: text encoders, adapters and VAE that run on engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from transformers import CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from runtime.control.adapters import TYPE
from runtime.engines.base import Engine, check_folder, open_engine
from runtime.engines.denoiser import EngineDenoiser
from runtime.engines.manifest import ADAPTER, MODEL_FILES, Manifest, adapter_names, read_manifest
from runtime.engines.ports import CONDITION, IDS, LATENTS, MOMENTS, PIXELS, POOLED, STATES
from runtime.engines.targets import TARGETS
from runtime.engines.unet_once import load_once_per_image
from runtime.engines.verified import check_verified
from runtime.errors import InputError
from runtime.loading.load import Model, load_model
from runtime.loading.lora import LoraSource
from runtime.loading.weights import hash_tensor, weights_digest
from runtime.machine.arithmetic import DTYPES
from runtime.machine.files import expand, read_json, reads
from runtime.model.latent_rgb import known_projection
from runtime.model.vae import vae_factor

GRAPHS = {
    "unet": "unet",
    "vae": "vae",
    "text_encoder": "encoder",
    "text_encoder_2": "encoder",
}  # names in the graphs
PARTS = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "vae_decoder": "vae",
    "unet": "unet",
}


class EngineTextEncoder:
    """A text encoder, called as transformers' CLIP models are: token ids (B, S)."""

    def __init__(self, engine: Engine):
        self.engine, self.device = engine, engine.device

    def __call__(self, ids: Tensor, output_hidden_states: bool = True) -> CLIPTextModelOutput:
        """Return the pooled embedding (B, P), of an encoder that has one, and the states before the last layer."""
        largest = self.engine.profile.range("items")[2]
        parts = [self.engine({IDS: part}, items=len(part)) for part in ids.split(largest)]
        outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        states = (outputs[STATES], None)  # the last layer's are not computed
        return CLIPTextModelOutput(text_embeds=outputs.get(POOLED), hidden_states=states)


class EngineVAE:
    """A VAE's decoder, and its encoder where that was compiled, called as diffusers' AutoencoderKL is."""

    dtype = torch.float32  # of its inputs; what it computes in is the engine's own affair

    def __init__(self, engine: Engine, config: FrozenDict, encoder: Engine | None = None):
        self.engine, self.config, self.encoder = engine, config, encoder

    def encode(self, pixels: Tensor) -> AutoencoderKLOutput:
        """Return the posterior of one picture's latents, (1, C, h, w). Raises InputError without an encoder."""
        if self.encoder is None:
            raise InputError(
                "image: the engines have no vae_encoder; rebuild them with it, or leave the image out"
            )
        height, width = pixels.shape[2:]
        moments = self.encoder({PIXELS: pixels}, items=1, height=height, width=width)[MOMENTS]
        return AutoencoderKLOutput(DiagonalGaussianDistribution(moments))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        height, width = (vae_factor(self) * side for side in latents.shape[2:])
        largest = self.engine.profile.range("items")[2]
        parts = [
            self.engine({LATENTS: part}, items=len(part), height=height, width=width)[PIXELS]
            for part in latents.split(largest)
        ]
        return (torch.cat(parts),)


class EngineAdapter:
    """A T2I-Adapter, called as diffusers' is.

    Its graph can gate its features by masks and strengths. It is asked for them whole, so that one run serves all
    regions that show the same condition, and the control is summed as in PyTorch.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        ports = {port.name: port for port in engine.spec.inputs}
        channels = [port.shape[1] for port in engine.spec.outputs]
        self.config = SimpleNamespace(
            in_channels=ports[CONDITION].shape[1], channels=channels, adapter_type=TYPE
        )

    def __call__(self, condition: Tensor) -> list[Tensor]:
        """Return the feature maps (1, C_l, h_l, w_l) of a condition (1, C, H, W)."""
        height, width = condition.shape[2:]
        whole = {port.name: torch.ones(()) for port in self.engine.spec.inputs}
        outputs = self.engine({**whole, CONDITION: condition}, height=height, width=width)
        return [outputs[port.name] for port in self.engine.spec.outputs]


@reads()
def load_engines(
    folder: str | Path,
    device: torch.device,
    *,
    source: str | Path | None = None,
    loras: Sequence[LoraSource] = (),
    **options,
) -> tuple[Model, EngineDenoiser, dict[str, EngineAdapter]]:
    """Return the parts of a pipeline from an engine folder; parts that were not compiled are loaded with torch.

    source: the model to load those from, by default the one that was compiled; its weights must be those that were
    compiled. loras: put into all parts, the compiled ones too. options: of `loading.load_model`.

    Raises InputError, naming the field of the manifest that does not match, or what is missing here.
    """
    folder = expand(folder)
    manifest = read_manifest(folder)
    check_folder(manifest, folder, device)
    check_verified(manifest, folder, device)
    if "unet" not in manifest.engines:
        raise InputError(f"engine {folder}: it has no unet; {manifest.rebuild}")
    whole = all(part in manifest.engines for part in PARTS)
    weights = refitted(manifest, folder, source, loras, **options) if loras else {}
    torch_model = load_source(manifest, device, source, **options) if source or not whole else None
    if torch_model is not None and loras:
        torch_model = _load(manifest, device, source, loras, **options)

    def engine(name: str) -> Engine:
        return open_engine(manifest, folder, name, device, weights.get(PARTS.get(name, name)))

    encoders = [
        EngineTextEncoder(engine(name)) if name in manifest.engines else torch_model.text_encoders[i]
        for i, name in enumerate(("text_encoder", "text_encoder_2"))
    ]
    if "vae_decoder" in manifest.engines:
        config = FrozenDict(AutoencoderKL.load_config(folder / MODEL_FILES / "vae"))
        encoder = engine("vae_encoder") if "vae_encoder" in manifest.engines else None
        vae = EngineVAE(engine("vae_decoder"), config, encoder)
    else:
        vae = torch_model.vae
    model = _model(manifest, folder / MODEL_FILES, tuple(encoders), vae)
    adapters = {name: EngineAdapter(engine(ADAPTER + name)) for name in adapter_names(manifest)}
    exchanged = {name.removeprefix("unet."): w for name, w in weights.get("unet", {}).items()}
    unet = load_once_per_image(folder / MODEL_FILES / "unet", device, DTYPES[manifest.precision], exchanged)
    return model, EngineDenoiser(engine("unet"), unet), adapters


def engine_device(folder: str | Path) -> str:
    """Return the kind of device that a folder's engines run on."""
    target = TARGETS.get(read_manifest(folder).target)
    return "cuda" if target is not None and target.gpu else "cpu"


def refitted(
    manifest: Manifest, folder: Path, source: str | Path | None, loras: Sequence[LoraSource], **options
) -> dict[str, dict[str, Tensor]]:
    """Return the weights that change when `loras` are fused into the compiled model: part -> graph's name of it ->
    weight.
    """
    if not manifest.refit:
        raise InputError(
            f"lora: the engines in {folder} were built without --refit; {manifest.rebuild} --refit"
        )
    cpu = torch.device("cpu")
    base = load_source(manifest, cpu, source, **options)
    before = {
        part: {name: hash_tensor(w) for name, w in module.named_parameters()} for part, module in _parts(base)
    }
    del base  # before the second copy is loaded
    changed = {}
    for part, module in _parts(_load(manifest, cpu, source, loras, **options)):
        new = {name: w for name, w in module.named_parameters() if hash_tensor(w) != before[part][name]}
        changed[part] = {f"{GRAPHS[part]}.{name}": weight.detach() for name, weight in new.items()}
    return changed


def load_source(
    manifest: Manifest, device: torch.device, source: str | Path | None = None, **options
) -> Model:
    """Return the model that was compiled, in torch, from `source` where it was moved; InputError where its weights
    differ.
    """
    model = _load(manifest, device, source, **options)
    check_weights(manifest, model)
    return model


def _load(
    manifest: Manifest,
    device: torch.device,
    source: str | Path | None,
    loras: Sequence[LoraSource] = (),
    **options,
) -> Model:
    given = dict(manifest.model)
    for name in ("tokenizer", "config"):  # as recorded, unless it was moved
        options[name] = options.get(name) or given.get(name)
    return load_model(
        source or given["source"],
        device=device,
        dtype=DTYPES[manifest.precision],
        vae=given["vae"],
        loras=[*(tuple(lora) for lora in given["loras"]), *loras],
        **options,
    )


def model_weights(model: Model) -> dict[str, str]:
    """Return a hash of each part's weights."""
    return {name: weights_digest(part) for name, part in _parts(model)}


def _parts(model: Model) -> list[tuple[str, nn.Module]]:
    encoders = zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=True)
    return [("unet", model.unet), ("vae", model.vae), *encoders]


def check_weights(manifest: Manifest, model: Model) -> None:
    """Raise InputError where the model has other weights than those that were compiled."""
    for part, digest in model_weights(model).items():
        if manifest.model["weights"][part] != digest:
            raise InputError(
                f"model {model.name}: the weights of its {part} are not those the engines were built from "
                f"(manifest: model.weights.{part}); {manifest.rebuild}"
            )


def _model(manifest: Manifest, configs: Path, encoders: tuple, vae) -> Model:
    scheduler_class = getattr(
        diffusers, read_json(configs / "scheduler" / "scheduler_config.json")["_class_name"]
    )
    return Model(
        name=str(manifest.model["source"]),
        unet=None,
        vae=vae,
        tokenizers=tuple(
            CLIPTokenizer.from_pretrained(configs / name) for name in ("tokenizer", "tokenizer_2")
        ),
        text_encoders=encoders,
        scheduler=scheduler_class.from_pretrained(configs / "scheduler"),
        sample_size=manifest.model["sample_size"],
        force_zeros_for_empty_prompt=manifest.model["force_zeros_for_empty_prompt"],
        latent_rgb=known_projection(vae, configs / "vae"),
    )
