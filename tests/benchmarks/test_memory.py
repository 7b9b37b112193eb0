"""benchmarks.memory: counts what is alive, and the committed table says what its search found."""

import csv

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.measure import RESULTS
from benchmarks.random_sdxl import make_adapter, make_pipeline, read_config

MIB = 2**20


def tensor(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4, device="meta")


def three_at_a_time() -> None:
    a = tensor(1)
    b = a + 1
    del a
    c = b * 2  # 2 MiB
    d = c.view(2, -1)
    del c
    d.add_(1)
    e = torch.cat([b, d.flatten()])  # 4 MiB
    del b, d
    e.neg()  # 4 MiB


@pytest.mark.parametrize("resident", [0, 5])
def test_the_peak_of_known_lifetimes(resident):
    layers = [nn.Linear(MIB // 4, resident, bias=False, device="meta")] if resident else []
    assert memory.peak(three_at_a_time, layers) == (4 + resident) * MIB


def test_what_ends_during_the_run_is_not_counted_to_its_end():
    class Layer(nn.Linear):
        pass

    layer = Layer(MIB // 4, 8, bias=False, device="meta")  # 8 MiB

    def run():
        layer.half()  # 8 + 4, then 4
        return tensor(6)

    assert memory.peak(run, [layer]) == 12 * MIB


def test_sdxls_weights_and_stages():
    plain, tiled = (memory.count(name, 2048) for name in ("plain", "vae_tiling"))
    assert 5.1e9 < 2 * 2_567_463_684 < min(plain.values())
    assert plain["denoise"] == tiled["denoise"] and plain["decode"] > 1.5 * tiled["decode"]


def test_what_offloading_saves():
    tiled = memory.count("vae_tiling", 2048)
    offloaded = memory.count("offload model, vae_tiling", 2048)
    assert all(offloaded[stage] < peak for stage, peak in tiled.items())
    assert memory.count("offload group, vae_tiling", 2048)["denoise"] < 0.3 * offloaded["denoise"]


@pytest.mark.parametrize("more", [0, memory.GRID], ids=["fits", "no more"])
def test_the_committed_table_is_what_fits_and_no_more(more):
    (found,) = (
        row
        for row in csv.DictReader((RESULTS / "memory_largest.csv").open())
        if row["setting"] == "offload model, vae_tiling"
    )
    peak = memory.row(found["setting"], int(found["gpu_8_gb"]) + more)["peak_gb"]
    assert (peak <= 8 - memory.RESERVE) is (more == 0)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [8, 12, 24])
def test_on_a_gpu_it_fits_in_what_the_table_says(gigabytes):
    """A cap on the process's memory stands in for the smaller GPU."""
    from runtime import LocalControlPipeline, Region
    from runtime.loading.load import from_diffusers
    from runtime.optimize.offload import Offload

    setting = "offload model, vae_tiling"
    (found,) = (r for r in csv.DictReader((RESULTS / "memory_largest.csv").open()) if r["setting"] == setting)
    side, device = int(found[f"gpu_{gigabytes}_gb"]), torch.device("cuda")
    unet = memory.UNet2DConditionModel.from_config(read_config("unet"))
    model = from_diffusers(make_pipeline(unet, memory.DTYPE))
    model.vae.to(memory.DTYPE).enable_tiling()
    adapter = make_adapter(unet.config.block_out_channels).to(device, memory.DTYPE)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    try:
        pipe = LocalControlPipeline(model, {"canny": adapter}, offload=Offload(model, device, "model"))
        condition = torch.rand(1, 3, side, side)
        assert len(pipe("a star", [Region(condition)], height=side, width=side, steps=1, seed=0).images) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
