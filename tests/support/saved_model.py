"""The tiny SDXL pipeline, saved once a run in the layouts that loading reads, and ways to compare and spoil them."""

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from diffusers import SchedulerMixin, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig

from runtime.loading.folder import MODELS
from tests.support.single_file_layout import to_single_file
from tests.support.tiny import make_pipeline
from tests.support.tolerances import assert_close

_DIRECTORY = tempfile.TemporaryDirectory(prefix="localcontrol-tests-")  # removed when the run ends


@cache
def pipeline() -> StableDiffusionXLPipeline:
    """The pipeline that was saved: not to be changed.

    Its text encoders are of different widths, as SDXL's are: that is how diffusers tells them apart in a file.
    """
    pipe = make_pipeline()
    width = pipe.text_encoder.config.hidden_size
    for part, hidden in (("text_encoder", width // 2), ("text_encoder_2", width + width // 2)):
        encoder = getattr(pipe, part)
        config = encoder.config.to_dict() | {"hidden_size": hidden, "projection_dim": width}
        setattr(pipe, part, type(encoder)(CLIPTextConfig(**config)).eval())
    return pipe


@cache
def folder() -> Path:
    """The pipeline in diffusers' folder layout."""
    path = Path(_DIRECTORY.name) / "folder"
    pipeline().save_pretrained(path)
    return path


@cache
def single_file() -> Path:
    """The pipeline in the original single-file layout."""
    path = Path(_DIRECTORY.name) / "single.safetensors"
    save_file(to_single_file(pipeline()), path)
    return path


def copy_folder(to: Path) -> Path:
    """A copy of the folder that a test may spoil."""
    return shutil.copytree(folder(), to / "model")


def cached_snapshot(cache: Path, repository: str) -> Path:
    """Enter a repository into a cache of Hugging Face's form; return where its files belong (not there yet)."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    return folder / "snapshots" / "abc"


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object], to: Path | None = None) -> Path:
    """Rewrite a .safetensors file with its tensors changed in place by `edit`."""
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    edit(tensors)
    save_file(tensors, to or path, metadata={"format": "pt"})
    return to or path


def options(scheduler: SchedulerMixin) -> dict:
    """A scheduler's config without diffusers' own notes on where it came from."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def outputs(unet, vae, text_encoders) -> dict[str, Tensor]:
    """What each part of a pipeline computes from fixed inputs: equal where the weights and configs are."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = torch.randint(0, 50, (2, 77), generator=generator)
    with torch.no_grad():
        first, second = (encoder(tokens, output_hidden_states=True) for encoder in text_encoders)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        added = {"text_embeds": second.text_embeds, "time_ids": torch.arange(12.0).view(2, 6)}
        latent = noise(2, vae.config.latent_channels, 8, 8)
        return {
            "text_encoder": first.hidden_states[-2],
            "text_encoder_2": second.hidden_states[-2],
            "pooled": second.text_embeds,
            "unet": unet(latent, 500, text, added_cond_kwargs=added).sample,
            "decoded": vae.decode(latent).sample,
            "encoded": vae.encode(noise(1, 3, 32, 32)).latent_dist.mean,
        }


def assert_same(pipe: StableDiffusionXLPipeline, expected: StableDiffusionXLPipeline | None = None) -> None:
    """The two pipelines have the same weights, to the bit, and every part computes the same from them.

    Weights mapped from a file are not aligned in memory, which changes the last bits of some convolutions.
    """
    expected = expected or pipeline()
    for part in MODELS:
        left, right = (getattr(p, part).state_dict() for p in (pipe, expected))
        assert left.keys() == right.keys(), part
        for name in right:
            assert torch.equal(left[name], right[name]), f"{part} {name}"
    left, right = (outputs(p.unet, p.vae, (p.text_encoder, p.text_encoder_2)) for p in (pipe, expected))
    for name in right:
        assert_close(name, left[name], right[name], "unet")
    assert options(pipe.scheduler) == options(expected.scheduler)
    for name in ("tokenizer", "tokenizer_2"):
        left, right = (
            getattr(p, name)("a red box", padding="max_length").input_ids for p in (pipe, expected)
        )
        assert left == right, name
