"""The adapters and LoRAs that a command line names."""

import pytest

from runtime.cli.sources import adapter_sources, lora_sources
from runtime.errors import InputError


def test_adapters_have_names():
    assert adapter_sources(["canny=a/b", "sketch=c=d"]) == {"canny": "a/b", "sketch": "c=d"}
    for bad in (["canny"], ["=a"], ["canny="], ["canny=a", "canny=b"]):
        with pytest.raises(InputError, match="--adapter"):
            adapter_sources(bad)


def test_loras_may_have_weights():
    assert lora_sources(["a.safetensors", "b.safetensors=0.5", "c=d.safetensors"]) == [
        ("a.safetensors", 1.0),
        ("b.safetensors", 0.5),
        ("c=d.safetensors", 1.0),
    ]
