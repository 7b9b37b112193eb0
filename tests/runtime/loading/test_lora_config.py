"""runtime.loading.lora_config: a layer's scale is what PEFT itself makes of the configuration."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from runtime.errors import InputError
from runtime.loading.folder import load_folder
from runtime.loading.lora import find_lora, fuse_lora
from runtime.loading.lora_config import scale_of
from tests.support import saved_model

RANK = 2
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.0.self_attn.out_proj"


class Fused:
    """A pipeline, and how much of up @ down a LoRA of one layer adds to it."""

    def __init__(self, folder, part: str = "unet", path: str = ATTENTION):
        self.folder, self.pipe = folder, load_folder(saved_model.folder(), dtype=torch.float32)
        layers = dict(getattr(self.pipe, part).named_modules())
        self.layer = layers.get(path) or layers[f"text_model.{path}"]
        out, width = self.layer.weight.shape
        self.up, self.down = torch.randn(out, RANK), torch.randn(RANK, width)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.lora_A.weight": self.down, f"{name}.lora_B.weight": self.up}

    def by_peft(self, name: str = f"base_model.model.{ATTENTION}", **config):
        save_file(self.tensors(name), self.folder / "adapter_model.safetensors")
        (self.folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        return self.folder

    def factor(self, source, allow_pickle: bool = False) -> float:
        before, whole = self.layer.weight.clone(), self.up @ self.down
        fuse_lora(self.pipe, find_lora(source, allow_pickle))
        change = self.layer.weight - before
        factor = ((change * whole).sum() / whole.square().sum()).item()
        torch.testing.assert_close(change, factor * whole, rtol=1e-4, atol=1e-4)
        return factor


@pytest.fixture
def fused(tmp_path):
    return Fused(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 16},
        {},
        {"use_rslora": True},
        {"lora_alpha": 0},
        {"lora_alpha": 3, "alpha_pattern": {"block.to_q": 5, "to_q": 7}},
        {"lora_alpha": 3, "alpha_pattern": {"^block.to_q": 5}},
        {"lora_alpha": 3, "alpha_pattern": {r".*\.to_[qk]": 5}},
        {"lora_alpha": 3, "alpha_pattern": {"o_q": 5}},
    ],
)
def test_a_scale_is_pefts_own(config):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.ModuleDict({"to_q": nn.Linear(4, 4)})

    made = get_peft_model(Toy(), LoraConfig(r=RANK, target_modules=["to_q"], **config))
    expected = made.base_model.model.block.to_q.scaling["default"]
    assert scale_of(config or {"r": RANK}, "unet", "block.to_q", {"down": torch.ones(RANK, 4)}) == expected


@pytest.mark.parametrize("pattern", [f"unet.{ATTENTION}", ATTENTION, "attn1.to_q"])
def test_a_pattern_may_name_a_layer_within_the_pipeline(fused, pattern):
    source = fused.by_peft(
        f"base_model.model.unet.{ATTENTION}", r=RANK, lora_alpha=2, alpha_pattern={pattern: 3}
    )
    assert fused.factor(source) == pytest.approx(3 / RANK)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_pattern_is_of_either_name_of_a_text_encoders_layer(tmp_path, part, prefix):
    fused, path = Fused(tmp_path, part, TEXT), tmp_path / "x.safetensors"
    config = {"r": RANK, "lora_alpha": 2, "alpha_pattern": {prefix + TEXT: 3}}
    header = {"lora_adapter_metadata": json.dumps({f"{part}.{key}": value for key, value in config.items()})}
    save_file(fused.tensors(f"{part}.text_model.{TEXT}"), path, metadata=header)
    assert fused.factor(path) == pytest.approx(3 / RANK)


def test_a_configuration_without_alpha_means_pefts_default(fused):
    assert fused.factor(fused.by_peft(r=RANK)) == pytest.approx(LoraConfig().lora_alpha / RANK)


@pytest.mark.parametrize("name", ["style.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_the_configuration_counts_beside_a_renamed_or_pickled_file(fused, name, as_folder):
    folder = fused.by_peft(r=RANK, lora_alpha=16)
    if name.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
        torch.save(fused.tensors(f"base_model.model.{ATTENTION}"), folder / name)
    else:
        (folder / "adapter_model.safetensors").rename(folder / name)
    assert fused.factor(folder if as_folder else folder / name, allow_pickle=True) == pytest.approx(16 / RANK)


def test_a_lost_configuration_is_warned_of(fused):
    folder = fused.by_peft(r=RANK, lora_alpha=16)
    (folder / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match=r"its scale is in PEFT's adapter_config\.json, .* taken as 1"):
        assert fused.factor(folder) == pytest.approx(1)


def test_what_is_not_pefts_is_not_warned_of(fused, tmp_path):
    save_file(fused.tensors(f"unet.{ATTENTION}"), tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_16", "corda", "olora", "OLoRA", "loftq", "lora_ga"])
def test_a_lora_taken_out_of_the_models_weights_is_refused(fused, begun):
    with pytest.raises(InputError, match=f"PEFT's {begun.lower()} changed the weights of the model"):
        find_lora(fused.by_peft(r=RANK, lora_alpha=2, init_lora_weights=begun))


@pytest.mark.parametrize("begun", [True, False, "gaussian", "eva", "orthogonal", None])
def test_other_beginnings_leave_no_trace(fused, begun):
    source = fused.by_peft(r=RANK, lora_alpha=2, init_lora_weights=begun)
    assert fused.factor(source) == pytest.approx(1)


def test_a_pattern_that_is_none_is_named(fused):
    with pytest.raises(InputError, match=r"alpha_pattern 'to_q\(': "):
        find_lora(fused.by_peft(r=RANK, lora_alpha=2, alpha_pattern={"to_q(": 3}))


@pytest.mark.parametrize(("more", "expected"), [({"lora_alpha": 0}, 0), ({"lora_alpha": 8}, 4)])
def test_a_loras_bias_has_the_scale_of_its_layer(fused, tmp_path, more, expected):
    path = ATTENTION.replace("to_q", "to_out.0")
    bias = fused.pipe.unet.get_submodule(path).bias
    tensors = fused.tensors(f"base_model.model.{path}")
    tensors[f"base_model.model.{path}.lora_B.bias"] = torch.ones_like(bias)
    source, before = fused.by_peft(r=RANK, lora_bias=True, **more), bias.clone()
    save_file(tensors, source / "adapter_model.safetensors")
    fuse_lora(fused.pipe, find_lora(source))
    torch.testing.assert_close(bias.data, before + expected)
    alpha = {f"base_model.model.{path}.alpha": torch.tensor(1.0)}
    save_file(tensors | alpha, source / "adapter_model.safetensors")  # the file's own counts
    fuse_lora(fused.pipe, find_lora(source))
    torch.testing.assert_close(bias.data, before + expected + 0.5)


@pytest.mark.parametrize(
    ("part", "base"),
    [
        ("text_encoder", "CLIPTextModel"),
        ("text_encoder_2", "CLIPTextModelWithProjection"),
        ("text_encoder", None),
    ],
)
def test_a_layer_of_both_text_encoders_is_told_by_the_class(tmp_path, part, base):
    fused = Fused(tmp_path, part, TEXT)
    mapping = {"auto_mapping": {"base_model_class": base}} if base else {"auto_mapping": None}
    source = fused.by_peft(f"base_model.model.text_model.{TEXT}", r=RANK, lora_alpha=2, **mapping)
    if base:
        assert fused.factor(source) == pytest.approx(1)
        return
    with pytest.raises(
        InputError, match=rf"adapter_model\.safetensors: {TEXT}: both text encoders have this layer"
    ):
        fused.factor(source)


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", r".*.*.*.*.*!", r"[a-z_]+[a-z_]+[a-z_]+\w+!"])
def test_a_pattern_that_may_take_forever_is_refused(fused, pattern):
    with pytest.raises(InputError, match="may take forever; expected no repeated group"):
        find_lora(fused.by_peft(r=RANK, lora_alpha=2, alpha_pattern={pattern: 3}))


@pytest.mark.parametrize(
    "pattern",
    [
        r"(down|mid)_block.*\.attn[12]\.(to_q|to_k)",
        r"mid_block\.attentions\.\d+\.transformer_blocks\.\d+\.attn\d+\.to_\w",
        r"transformer_blocks\.[0-9]+\..*to_q",
    ],
)
def test_a_pattern_that_people_write_is_followed(fused, pattern):
    source = fused.by_peft(r=RANK, lora_alpha=2, alpha_pattern={"conv1": 5, pattern: 3})
    assert fused.factor(source) == pytest.approx(3 / RANK)
