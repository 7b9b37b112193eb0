"""runtime.loading.hub: what lies in Hugging Face's cache is used without a network; what does not is named."""

import shutil

import pytest
import torch
from huggingface_hub import constants

from runtime.errors import InputError
from runtime.loading.hub import cache_folder, fetch_files, fetch_pipeline, is_hub_id
from tests.support import saved_model
from tests.support.saved_model import cached_snapshot


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache that has the repository someone/tiny; the folder of its files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return shutil.copytree(saved_model.folder(), cached_snapshot(tmp_path, "someone/tiny"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", True),
        ("a_b/c.d-e", True),
        ("name", False),
        ("./folder/model", False),
        ("/folder/model", False),
        ("../model", False),
        ("a/b/c", False),
        ("https://huggingface.co/a/b", False),
        ("folder/", False),
        ("a/b c", False),
    ],
)
def test_what_a_hub_id_is(source, expected):
    assert is_hub_id(source) is expected


def test_a_whole_pipeline_is_taken_from_the_cache(cached):
    assert fetch_pipeline("someone/tiny", dtype=torch.float32) == cached
    assert fetch_pipeline("someone/tiny", dtype=torch.float16) == cached


def test_a_pipeline_in_part_is_left_to_the_loader_to_name(cached):
    (cached / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert fetch_pipeline("someone/tiny", dtype=torch.float32) == cached


def test_what_is_not_cached_is_named_with_its_place(cached):
    with pytest.raises(InputError, match="model someone/other: not on this disk, looked in") as error:
        fetch_pipeline("someone/other", dtype=torch.float32)
    assert str(cache_folder("someone/other")) in str(error.value)
    assert cache_folder("someone/tiny") == cached.parents[1]


def test_single_files(cached):
    assert fetch_files("someone/tiny", ["model_index.json"], offline=True) == cached
    assert fetch_files("someone/other", ["model_index.json"], offline=True) is None
    assert fetch_files("someone/other", ["model_index.json"], offline=False) is None
