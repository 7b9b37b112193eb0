"""runtime.loading.quiet: silence ends with the block, by whichever way it is left."""

import contextlib

import pytest
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from runtime.loading.quiet import quiet


def state():
    libraries = (diffusers_logging, transformers_logging)
    return [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]


@pytest.mark.parametrize("bars", [False, True])
def test_silence_and_its_end(bars, capfd):
    before = state()
    with contextlib.suppress(KeyError), quiet(bars=bars):
        for library in (diffusers_logging, transformers_logging):
            library.get_logger("diffusers.x").error("said")
            assert library.is_progress_bar_enabled() is bars
        assert are_progress_bars_disabled() is not bars
        raise KeyError
    assert state() == before
    assert capfd.readouterr().err == ""
