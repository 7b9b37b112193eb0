"""benchmarks.random_sdxl: what it writes is a model and an adapter like any others."""

import pytest
import torch

from benchmarks import random_sdxl
from runtime import LocalControlPipeline, Region


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_pipeline_draws_with_it(dtype, tmp_path):
    assert random_sdxl.main(["--small", "--dtype", dtype, "--out", str(tmp_path)]) == 0
    pipe = LocalControlPipeline.from_pretrained(
        tmp_path / "model", {"canny": tmp_path / "adapter"}, dtype="bf16"
    )
    assert pipe.default_size == 1024
    condition = (torch.rand(1, 3, 64, 64) > 0.9).float()
    made = pipe("a star", [Region(condition)], height=64, width=64, steps=2, seed=0)
    assert made.latents.isfinite().all() and made.images[0].size == (64, 64)


def test_a_file_in_the_way_is_bad_input(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert random_sdxl.main(["--small", "--out", str(tmp_path / "file")]) == 2
    assert "is not a folder that can be written to" in capsys.readouterr().err
