"""runtime.loading.lora: what is fused is W + weight * alpha / rank * up @ down, in the layers named and in no other."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

from runtime.errors import InputError
from runtime.loading.folder import load_folder
from runtime.loading.lora import find_lora, fuse_lora
from runtime.loading.lora_names import original_names
from tests.support import saved_model
from tests.support.tolerances import assert_close

RANK = 2
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "down_blocks.1.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.out_proj"
LAYERS = [
    ("unet", ATTENTION),
    ("unet", CONVOLUTION),
    ("text_encoder", TEXT),
    ("text_encoder_2", f"text_model.{TEXT}"),
]


@pytest.fixture
def pipe():
    return load_folder(saved_model.folder(), dtype=torch.float32)


def weights(pipe) -> dict[tuple[str, str], torch.Tensor]:
    """Every weight of the parts a LoRA can change."""
    return {
        (part, name): value.clone()
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def write_lora(path: Path, pipe, layers, style: str = "peft", alpha: float = RANK) -> dict:
    """A random LoRA for these layers; returns what it adds to each of them, at weight 1 and alpha equal to rank."""
    tensors, change = {}, {}
    for part, module in layers:
        weight = getattr(pipe, part).get_submodule(module).weight
        up, down = torch.randn(weight.shape[0], RANK), torch.randn(RANK, weight[0].numel())
        change[part, f"{module}.weight"] = (up @ down).view_as(weight)
        if weight.ndim == 4:
            down, up = down.view(RANK, *weight.shape[1:]), up[:, :, None, None]
        if style == "kohya":
            text = module if module.startswith("text_model.") or part == "unet" else f"text_model.{module}"
            prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
            name = prefix + text.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        else:
            tensors |= {f"{part}.{module}.lora_A.weight": down, f"{part}.{module}.lora_B.weight": up}
    save_file(tensors, path)
    return change


def assert_changed(pipe, before, change):
    after = weights(pipe)
    assert after.keys() == before.keys()  # no layer of peft is left
    for key, value in after.items():
        if key in change:
            assert_close(" ".join(key), value, before[key] + change[key])
        else:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(("style", "alpha"), [("peft", RANK), ("kohya", RANK), ("kohya", 1)])
def test_fused_weights(tmp_path, pipe, style, alpha):
    before = weights(pipe)
    change = write_lora(tmp_path / "x.safetensors", pipe, LAYERS, style, alpha)
    lora = find_lora((tmp_path / "x.safetensors", 0.5))
    assert lora.layers == len(LAYERS)
    fuse_lora(pipe, lora)
    assert_changed(pipe, before, {key: 0.5 * alpha / RANK * value for key, value in change.items()})


def test_loras_add_up(tmp_path, pipe):
    before = weights(pipe)
    saved = saved_model.folder() / "unet" / "diffusion_pytorch_model.safetensors"
    content = saved.read_bytes()  # mapped into memory: the file itself must not be written to
    first = write_lora(tmp_path / "first.safetensors", pipe, LAYERS[:2])
    (tmp_path / "folder").mkdir()
    second = write_lora(tmp_path / "folder" / "second.safetensors", pipe, LAYERS[1:3])
    for source in (tmp_path / "first.safetensors", (str(tmp_path / "folder"), -2)):
        fuse_lora(pipe, find_lora(source))
    total = first | {key: first.get(key, 0) - 2 * value for key, value in second.items()}
    assert_changed(pipe, before, total)
    assert saved.read_bytes() == content


def test_a_pickle_is_read_only_when_asked_for(tmp_path, pipe):
    down = f"unet.{ATTENTION}.lora_A.weight"
    size = pipe.unet.get_submodule(ATTENTION).weight.shape[0]
    tensors = {down: torch.ones(1, size), down.replace("_A", "_B"): torch.ones(size, 1)}
    torch.save(tensors, tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"x\.bin: a pickle"):
        find_lora(tmp_path / "x.bin")
    before = weights(pipe)
    fuse_lora(pipe, find_lora(tmp_path / "x.bin", allow_pickle=True))
    assert_changed(pipe, before, {("unet", f"{ATTENTION}.weight"): torch.ones(size, size)})


@pytest.mark.parametrize("names", [["down_blocks.7.nothing"], [ATTENTION, "down_blocks.7.nothing"]])
def test_a_layer_that_the_model_has_not(tmp_path, pipe, names):
    size = pipe.unet.get_submodule(ATTENTION).weight.shape[0]
    shapes = {"lora_A": (1, size), "lora_B": (size, 1)}
    tensors = {
        f"unet.{name}.{half}.weight": torch.ones(shape) for name in names for half, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors: a LoRA that does not fit this model"):
        fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_a_layer_of_another_size(tmp_path, pipe, style):
    other = type(pipe.unet.get_submodule(ATTENTION))(7, 9)
    pipe.unet.get_submodule(ATTENTION.rpartition(".")[0]).to_q = other
    write_lora(tmp_path / "x.safetensors", pipe, LAYERS[:1], style)
    pipe = load_folder(saved_model.folder(), dtype=torch.float32)
    with pytest.raises(
        InputError, match=r"x\.safetensors: a LoRA that does not fit this model: .*(size|shape)"
    ):
        fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))


def test_what_is_no_lora(tmp_path):
    save_file({"unet.conv_in.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors: not a LoRA"):
        find_lora(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"nowhere\.safetensors: weight file missing"):
        find_lora(tmp_path / "nowhere.safetensors")
    with pytest.raises(InputError, match="weight nan: expected a finite number"):
        find_lora((tmp_path / "x.safetensors", float("nan")))
    (tmp_path / "y.safetensors").touch()
    with pytest.raises(InputError, match=r"2 \.safetensors files in the folder, expected one"):
        find_lora(tmp_path)


def layers_of(pipe, kinds=("Linear", "Conv2d")) -> list[tuple[str, str]]:
    return [
        (part, path)
        for part in ("unet", "text_encoder", "text_encoder_2")
        for path, layer in getattr(pipe, part).named_modules()
        if type(layer).__name__ in kinds
    ]


def kohya_name(part: str, path: str) -> str:
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_text_model_",
        "text_encoder_2": "lora_te2_text_model_",
    }[part]
    if path == "text_projection":
        prefix = "lora_te2_"
    return prefix + path.removeprefix("text_model.").replace(".", "_")


def pair(pipe, part: str, path: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = getattr(pipe, part).get_submodule(path).weight
    return torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2)), torch.randn(rank, *weight.shape[1:])


@pytest.mark.parametrize("with_alpha", [True, False])
def test_each_layer_has_its_own_rank_and_alpha(tmp_path, pipe, with_alpha):
    """As resized and block-dim files have; every linear layer and convolution of the three parts."""
    before, tensors, change = weights(pipe), {}, {}
    for i, (part, path) in enumerate(layers_of(pipe)):
        rank, alpha = 2 + i % 5, (1.0, 3.0, 0.5)[i % 3]
        up, down = pair(pipe, part, path, rank)
        name = kohya_name(part, path)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        if with_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        product = (up.flatten(1) @ down.flatten(1)).view_as(before[part, f"{path}.weight"])
        change[part, f"{path}.weight"] = product * (alpha / rank if with_alpha else 1)
    save_file(tensors, tmp_path / "x.safetensors")
    fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))
    assert len(change) > 50
    assert_changed(pipe, before, change)


def test_the_original_names_are_those_of_diffusers_conversion(pipe):
    names = dict(original_names(pipe.unet))
    checkpoint = {
        f"model.diffusion_model.{name}.{kind}": torch.tensor([float(i)])
        for i, name in enumerate(names)
        for kind in ("weight", "bias")
    }
    made = convert_ldm_unet_checkpoint(checkpoint, {**pipe.unet.config})
    for i, path in enumerate(names.values()):
        assert made[f"{path}.weight"].item() == i, path
    weighted = {
        path for path, layer in pipe.unet.named_modules() if getattr(layer, "weight", None) is not None
    }
    assert set(names.values()) == weighted


def test_original_names_are_read(tmp_path, pipe):
    original = {path: name for name, path in original_names(pipe.unet)}[ATTENTION]
    before, (up, down) = weights(pipe), pair(pipe, "unet", ATTENTION, RANK)
    name = f"lora_unet_{original.replace('.', '_')}"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "x.safetensors")
    fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))
    assert_changed(pipe, before, {("unet", f"{ATTENTION}.weight"): up @ down})


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"r": RANK, "lora_alpha": 16}, 16 / RANK),
        ({"r": RANK, "lora_alpha": 16, "use_rslora": True}, 16 / RANK**0.5),
        (
            {"r": 8, "rank_pattern": {"to_q": RANK}, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}},
            3 / RANK,
        ),
    ],
    ids=["alpha", "rslora", "patterns"],
)
@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "base_model.model.unet.", "unet.base_model.model.", "unet."]
)
def test_a_peft_folder_says_its_scale(tmp_path, pipe, config, factor, prefix):
    before, (up, down) = weights(pipe), pair(pipe, "unet", ATTENTION, RANK)
    tensors = {f"{prefix}{ATTENTION}.lora_A.weight": down, f"{prefix}{ATTENTION}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    fuse_lora(pipe, find_lora((tmp_path, 0.5)))
    assert_changed(pipe, before, {("unet", f"{ATTENTION}.weight"): 0.5 * factor * up @ down})


def test_diffusers_header_says_its_scale(tmp_path, pipe):
    before, (up, down) = weights(pipe), pair(pipe, "unet", ATTENTION, RANK)
    tensors = {f"unet.{ATTENTION}.lora_A.weight": down, f"unet.{ATTENTION}.lora_B.weight": up}
    header = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 8})}
    save_file(tensors, tmp_path / "x.safetensors", metadata=header)
    fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))
    assert_changed(pipe, before, {("unet", f"{ATTENTION}.weight"): 8 / RANK * up @ down})


def test_biases_and_mixtures(tmp_path, pipe):
    before, (up, down) = weights(pipe), pair(pipe, "unet", ATTENTION, RANK)
    bias = pipe.unet.get_submodule(CONVOLUTION).bias
    difference = torch.randn(pipe.unet.get_submodule(CONVOLUTION).weight.shape)
    tensors = {
        f"{kohya_name('unet', ATTENTION)}.lora_up.weight": up,
        f"{kohya_name('unet', ATTENTION)}.lora_down.weight": down,
        f"{kohya_name('unet', CONVOLUTION)}.diff": difference,
        f"{kohya_name('unet', CONVOLUTION)}.diff_b": torch.ones_like(bias),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    fuse_lora(pipe, find_lora((tmp_path / "x.safetensors", 2.0)))
    change = {
        ("unet", f"{ATTENTION}.weight"): 2 * up @ down,
        ("unet", f"{CONVOLUTION}.weight"): 2 * difference,
    }
    assert_changed(pipe, before, change | {("unet", f"{CONVOLUTION}.bias"): 2 * torch.ones_like(bias)})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"lora_unet_mid.oft_blocks": torch.ones(2)},
            r"lora_unet_mid.oft_blocks: not a tensor of a LoRA, LoHa, LoKr",
        ),
        ({"lora_unet_nothing.alpha": torch.ones(1)}, "it has no layer lora_unet_nothing"),
        (
            {"bundle_emb.x.string_to_param": torch.ones(2)},
            "bundle_emb.x.string_to_param: not a tensor of a LoRA",
        ),
        ({f"unet.{ATTENTION}.lora_down.weight": torch.ones(RANK, 2)}, "has two of its kind|are the same one"),
    ],
    ids=["oft", "no such layer", "embedding", "twice"],
)
def test_every_tensor_is_used_or_the_file_is_refused(tmp_path, pipe, more, message):
    before = weights(pipe)
    write_lora(tmp_path / "x.safetensors", pipe, LAYERS[:1])
    save_file(load_file(tmp_path / "x.safetensors") | more, tmp_path / "y.safetensors")
    with pytest.raises(InputError, match=message):
        fuse_lora(pipe, find_lora(tmp_path / "y.safetensors"))
    assert_changed(pipe, before, {})


def test_a_number_that_is_not_finite_is_named(tmp_path, pipe):
    write_lora(tmp_path / "x.safetensors", pipe, LAYERS[:1])
    tensors = load_file(tmp_path / "x.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"x.safetensors: {name}: NaN or infinite values"):
        fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(("weight", "dtype"), [(1e39, torch.float32), (1e6, torch.float16)])
def test_a_weight_that_is_too_large_is_the_loras_fault(tmp_path, pipe, weight, dtype):
    pipe.unet.to(dtype)
    write_lora(tmp_path / "x.safetensors", pipe, LAYERS[:1])
    with pytest.raises(InputError, match=rf"x\.safetensors: at weight 1e\+\d+ .*to_q is beyond {dtype}"):
        fuse_lora(pipe, find_lora((tmp_path / "x.safetensors", weight)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "PEFT's LOHA; expected LORA"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'; expected a number"),
        (
            {"lora_alpha": 4, "alpha_pattern": {"to_q": None}},
            "alpha_pattern of to_q is None; expected a number",
        ),
        ({"modules_to_save": ["conv_in"]}, "has modules_to_save, which is not read"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path, pipe, config, message):
    write_lora(tmp_path / "adapter_model.safetensors", pipe, LAYERS[:1])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        find_lora(tmp_path)


@pytest.mark.parametrize("kind", ["int8", "complex64", "bool"])
def test_numbers_that_need_a_scale_are_refused(tmp_path, pipe, kind):
    write_lora(tmp_path / "x.safetensors", pipe, LAYERS[:1])
    tensors = load_file(tmp_path / "x.safetensors")
    save_file({k: v.to(getattr(torch, kind)) for k, v in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=rf"x\.safetensors: unet.*torch\.{kind}; expected floating-point"):
        fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("alpha", [{}, {"alpha": torch.tensor(2.0)}])
def test_a_rank_of_0_is_refused(tmp_path, pipe, alpha):
    up, down = pair(pipe, "unet", ATTENTION, 0)
    name = kohya_name("unet", ATTENTION)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    save_file(tensors | {f"{name}.{key}": value for key, value in alpha.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="does not fit this model: .*: its rank is 0"):
        fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("alpha", [1.0, 1, torch.tensor(1.0)])
def test_a_pickled_alpha_may_be_a_plain_number(tmp_path, pipe, alpha):
    before, (up, down) = weights(pipe), pair(pipe, "unet", ATTENTION, RANK)
    name = kohya_name("unet", ATTENTION)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
    torch.save(tensors, tmp_path / "x.pt")
    fuse_lora(pipe, find_lora(tmp_path / "x.pt", allow_pickle=True))
    assert_changed(pipe, before, {("unet", f"{ATTENTION}.weight"): up @ down / RANK})


@pytest.mark.parametrize("original", [True, False], ids=["original", "diffusers"])
def test_comfyuis_names_are_read(tmp_path, pipe, original):
    """A part's prefix and the layer's own name with dots, as its nodes save a LoRA."""
    own = {path: name for name, path in original_names(pipe.unet)}
    prefixes = ("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
    before, tensors, change = weights(pipe), {}, {}
    for part, path in layers_of(pipe):
        prefix = prefixes[["unet", "text_encoder", "text_encoder_2"].index(part)]
        name = own[path] if part == "unet" and original else path
        if part != "unet" and path != "text_projection":
            name = f"text_model.{path.removeprefix('text_model.')}"
        up, down = pair(pipe, part, path, RANK)
        tensors |= {f"{prefix}{name}.lora_up.weight": up, f"{prefix}{name}.lora_down.weight": down}
        change[part, f"{path}.weight"] = (up.flatten(1) @ down.flatten(1)).view_as(
            before[part, f"{path}.weight"]
        )
    save_file(tensors, tmp_path / "x.safetensors")
    fuse_lora(pipe, find_lora(tmp_path / "x.safetensors"))
    assert_changed(pipe, before, change)
