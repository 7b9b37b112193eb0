"""runtime.loading.adapter: loading T2I-Adapters from every source."""

import json
import pickle
import re

import pytest
import torch
from diffusers import T2IAdapter
from huggingface_hub import constants
from safetensors.torch import save_file

from runtime.errors import InputError
from runtime.loading import adapter as adapter_module
from runtime.loading.adapter import load_adapter

CHANNELS = (8, 12, 16, 16)
SIZE = 48, 80  # pixels: 3 x 5 cells of 16, 2 x 3 of 32, the last ones partial


def make_adapter(channels=CHANNELS, in_channels=1, blocks=2, seed=0, kind="full_adapter_xl", stride=16):
    torch.manual_seed(seed)
    return T2IAdapter(in_channels, list(channels), blocks, stride, kind).eval().requires_grad_(False)


def load(source, **options):
    return load_adapter(source, **({"device": "cpu", "dtype": torch.float32} | options))


def assert_same_features(actual, expected):
    condition = torch.rand(1, expected.config.in_channels, *SIZE)
    with torch.no_grad():
        pairs = zip(actual(condition), expected(condition), strict=True)
    for level, (a, b) in enumerate(pairs):
        assert torch.equal(a, b), f"level {level}"


def original_names(state, blocks):
    """Diffusers' state dict under the names of the original T2I-Adapter files."""
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("adapter.")
        if m := re.fullmatch(r"body\.(\d)\.resnets\.(\d)\.(.*)", key):
            key = f"body.{int(m[1]) * blocks + int(m[2])}.{m[3]}"
        elif m := re.fullmatch(r"body\.(\d)\.(in_conv.*)", key):
            key = f"body.{int(m[1]) * blocks}.{m[2]}"
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_folder(tmp_path, variant):
    expected = make_adapter()
    expected.save_pretrained(tmp_path, variant=variant)
    loaded = load(tmp_path)
    assert_same_features(loaded, expected)
    assert not loaded.training and not list(tmp_path.glob("*.bin"))


def test_a_folder_of_shards(tmp_path):
    expected = make_adapter()
    expected.save_pretrained(tmp_path, max_shard_size=sum(p.nbytes for p in expected.parameters()) // 3)
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert_same_features(load(tmp_path), expected)
    shards[-1].unlink()
    with pytest.raises(InputError, match=f"{shards[-1].name}: weight file missing"):
        load(tmp_path)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize(
    ("channels", "in_channels", "blocks"), [(CHANNELS, 1, 2), ((8, 8, 16, 24), 3, 2), ((8, 16, 16, 16), 3, 1)]
)
def test_single_file(tmp_path, layout, channels, in_channels, blocks):
    if channels[2] != channels[3]:
        channels = (*channels[:3], channels[2])  # full_adapter_xl keeps the width at its last level
    expected = make_adapter(channels, in_channels, blocks)
    state = expected.state_dict()
    save_file(state if layout == "diffusers" else original_names(state, blocks), tmp_path / "a.safetensors")
    loaded = load(str(tmp_path / "a.safetensors"))
    assert tuple(loaded.config.channels) == channels and loaded.config.in_channels == in_channels
    assert_same_features(loaded, expected)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_dtype_and_device(tmp_path, kind):
    make_adapter().half().save_pretrained(tmp_path)
    source = tmp_path if kind == "folder" else tmp_path / "diffusion_pytorch_model.safetensors"
    parameters = list(load(source, dtype=torch.bfloat16).parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16} and {p.device.type for p in parameters} == {
        "cpu"
    }


def test_embedded_name(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_module, "EMBEDDED", tmp_path)
    expected = make_adapter()
    expected.save_pretrained(tmp_path / "canny")
    assert_same_features(load("canny"), expected)
    with pytest.raises(InputError, match=r"adapter cany: not found, .* embedded adapter \(canny\)"):
        load("cany")


def test_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--t2i-adapter"
    with pytest.raises(InputError, match="someone/t2i-adapter") as error:
        load("someone/t2i-adapter")
    assert str(folder) in str(error.value)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    expected = make_adapter()
    expected.save_pretrained(folder / "snapshots" / ("0" * 40))
    assert_same_features(load("someone/t2i-adapter"), expected)


def test_pickle_is_read_only_when_asked_for(tmp_path):
    expected = make_adapter()
    path = tmp_path / "adapter.pth"
    torch.save(expected.state_dict(), path)
    with pytest.raises(InputError, match=f"{path}: a pickle"):
        load(path)
    assert_same_features(load(path, allow_pickle=True), expected)
    torch.save({"state_dict": expected.state_dict()}, path)
    assert_same_features(load(path, allow_pickle=True), expected)


def test_pickle_that_runs_code_is_never_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    path = tmp_path / "adapter.ckpt"
    path.write_bytes(pickle.dumps({"conv_in.weight": Attack()}, protocol=2))
    with pytest.raises(InputError, match=str(path)):
        load(path, allow_pickle=True)
    assert not (tmp_path / "pwned").exists()


def cut(name, to):
    """Keep only the first bytes of a folder's file; with None, none of it."""

    def damage(folder):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        if to is not None:
            (folder / name).write_bytes(whole[:to])

    return damage


def change(**options):
    """Change values in a folder's config; with None, take them out."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | options
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return damage


# what is wrong with a folder -> how it came to be, and the error expected for it
BROKEN = {
    "no config": (cut("config.json", None), "config.json: missing"),
    "config cut short": (cut("config.json", 9), "config.json: not a JSON file"),
    "no weights": (cut("diffusion_pytorch_model.safetensors", None), "weight file missing"),
    "weights cut short": (cut("diffusion_pytorch_model.safetensors", -9), "not a whole .safetensors"),
    "another class": (change(_class_name="VAE"), "_class_name is VAE, expected T2IAdapter"),
    "another type": (change(adapter_type="light_adapter"), "adapter_type is light_adapter, expected full"),
    "no type": (change(adapter_type=None), "adapter_type is full_adapter, expected full_adapter_xl"),
    "another stride": (change(downscale_factor=8), "downscale_factor is 8, expected 16"),
    "other channels": (change(channels=[8] * 4), r"has channels \[8, 8, 8, 8\], its weights have \[8, 12"),
    "more blocks": (change(num_res_blocks=3), "has num_res_blocks 3, its weights have 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder_is_named(tmp_path, case):
    make_adapter().save_pretrained(tmp_path)
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path, name="canny")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_broken_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    state = make_adapter().state_dict()
    save_file(state, path)
    whole = path.read_bytes()

    def fails(message, tensors=None, **options):
        if tensors is not None:
            save_file(tensors, path)
        with pytest.raises(InputError, match=message) as error:
            load(path, **options)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        fails("not a whole .safetensors file")
    fails("no T2I-Adapter's tensors, first unet.weight", {"unet.weight": torch.zeros(1)})
    fails(
        "not a whole full_adapter_xl.*adapter.body.3.resnets.1.block2.bias",
        without(state, "3.resnets.1.block2.bias"),
    )
    fails("not a whole full_adapter_xl", state | {"adapter.extra": torch.zeros(1)})
    nan = state | {"adapter.conv_in.bias": torch.full((CHANNELS[0],), torch.nan)}
    fails("NaN or infinity .* adapter.conv_in.bias", nan)
    light = T2IAdapter(3, [8, 12, 16], 1, 8, "light_adapter").state_dict()
    fails("light_adapter", light)
    full = T2IAdapter(3, [8, 12, 16, 16], 1, 8, "full_adapter").state_dict()
    fails(r"adapter edges \(.*\): its type is full_adapter", full, name="edges")


def without(state, suffix):
    return {key: value for key, value in state.items() if not key.endswith(suffix)}


def test_missing_source_says_where_it_looked(tmp_path):
    with pytest.raises(InputError, match="not found, looked in") as error:
        load(tmp_path / "nothing.safetensors")
    assert str(tmp_path / "nothing.safetensors") in str(error.value)


# the control


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.adapter.", "adapter."])
def test_a_wrapped_models_prefix_is_left_out(tmp_path, layout, prefix):
    expected = make_adapter()
    tensors = expected.state_dict()
    tensors = original_names(tensors, 2) if layout == "original" else tensors
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "x.safetensors")
    assert_same_features(load(tmp_path / "x.safetensors"), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight", "a ControlNet-LLLite"),
        ("image_proj.proj.weight", "an IP-Adapter"),
        ("lora_unet_mid_block.lora_up.weight", "a LoRA (pass it as one of loras)"),
        ("model.diffusion_model.out.2.weight", "a whole model"),
        ("decoder.conv_in.weight", "a VAE"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, name, kind):
    save_file({name: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=re.escape(f"{kind}, first {name}; expected full_adapter_xl")):
        load(tmp_path / "x.safetensors")
