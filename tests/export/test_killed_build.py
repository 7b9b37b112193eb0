"""export.build_engine --resume: it goes on, at whatever moment the build before was killed."""

import os
import random
import signal
import subprocess
import sys

import pytest

from runtime.engines.base import check_contents
from runtime.engines.manifest import read_manifest
from tests.support import engines, saved_model

SIZES = ("--batch", "1", "--height", "64", "--width", "64", "--no-verify")


def build(target, out):
    call = [sys.executable, "-m", "export.build_engine", "--model", str(saved_model.folder()), *SIZES]
    call += ["--adapter", f"canny={engines.adapter()}", "--target", target, "--out", str(out), "--resume"]
    return subprocess.Popen(call, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_twenty_kills_at_random_moments_are_gone_on_from(target, tmp_path):
    """Later and later ones, so that every stage is hit; in between, some builds end."""
    rng, out, killed = random.Random(target), tmp_path / "engines", 0
    while killed < 20:
        with build(target, out) as run:
            try:
                _, said = run.communicate(timeout=rng.uniform(2.0, 9.0))
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                killed += 1
                continue
        assert run.returncode == 0, said
        out.rename(tmp_path / f"whole-{killed}")
    with build(target, out) as run:
        assert run.wait() == 0
    manifest = read_manifest(out)
    check_contents(manifest, out)
    assert set(manifest.engines) >= {"unet", "vae_decoder", "text_encoder", "text_encoder_2", "adapter_canny"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
