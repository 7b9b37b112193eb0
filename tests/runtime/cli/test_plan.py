"""runtime.cli.plan: options that an engine does not heed are refused before it is opened."""

import re
from types import SimpleNamespace

import pytest

from runtime import capabilities
from runtime.cli.options import parse
from runtime.cli.plan import of_engine
from runtime.engines import manifest
from runtime.engines.parts import PARTS
from runtime.errors import InputError


@pytest.fixture
def engines(monkeypatch) -> list[str]:
    """The names of the engines in a folder."""
    names = list(PARTS)
    monkeypatch.setattr(manifest, "read_manifest", lambda _: SimpleNamespace(engines=names))
    monkeypatch.setattr(capabilities, "of_manifest", lambda *_: "known")
    return names


@pytest.mark.parametrize("option", ["tokenizer", "config"])
def test_files_of_a_model_that_is_not_loaded_are_refused(engines, option):
    def check(*more: str):
        return of_engine(parse(["--prompt", "x", "--engine", "folder", f"--{option}", "files", *more]))

    expected = f"--{option} with --engine: the engines have their own; leave it out"
    with pytest.raises(InputError, match=re.escape(expected)):
        check()
    assert check("--model", "sdxl.safetensors") == check("--lora", "style.safetensors") == "known"
    engines.remove("vae_decoder")  # the model that was compiled is loaded for it
    assert check() == "known"
