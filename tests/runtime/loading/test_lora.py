"""runtime.loading.lora: what is fused is W + weight * alpha / rank * up @ down, in the layers named and in no other."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runtime.errors import InputError
from runtime.loading.folder import load_folder
from runtime.loading.lora import find_lora, fuse_lora
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
    with pytest.raises(InputError, match="weight nan, expected a finite number"):
        find_lora((tmp_path / "x.safetensors", float("nan")))
    (tmp_path / "y.safetensors").touch()
    with pytest.raises(InputError, match=r"2 \.safetensors files in the folder, expected one"):
        find_lora(tmp_path)
