"""The names of a LoRA file's tensors: which layer of which part each belongs to, and what it is of that layer.

Read are diffusers' names, PEFT's, kohya's (after diffusers' or the original blocks of the UNet), LyCORIS' and
ComfyUI's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from runtime.errors import InputError

# The end of a tensor's name -> what it is of its layer; a ".weight" and PEFT's name of the adapter may follow.
KINDS = {
    "lora_down": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_A": "down",
    "lora_up": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "lora_B": "up",
    "lora_mid": "mid",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{
        name: name
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    },
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
NAME = re.compile(
    rf"^(?P<layer>.+?)\.(?P<kind>{'|'.join(map(re.escape, sorted(KINDS, key=len, reverse=True)))})"
    r"(?P<adapter>\.(?!weight$|bias$)\w+)?(?P<end>\.weight|\.bias)?$"
)
OLD_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")  # diffusers before 0.22
PARTS = {"unet": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
KOHYA = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
KOHYA["lycoris_"] = "unet"
# ComfyUI's, with dots, after the original blocks of the UNet or diffusers'
COMFY = {
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}


def split_name(name: str) -> tuple[str, str]:
    """Return a tensor's layer and what it is of it. Raises InputError for a name that no LoRA of a known kind has."""
    found = NAME.match(OLD_PROCESSOR.sub(lambda m: f".to_{m[1]}{'.0' * (m[1] == 'out')}.lora.", name))
    if (
        found is None
        or found["layer"].endswith(".")
        or (found["end"] == ".bias" and KINDS[found["kind"]] != "up")
    ):
        raise InputError(f"{name}: not a tensor of a LoRA, LoHa, LoKr or weight difference")
    kind = KINDS[found["kind"]]
    return found["layer"], "up_bias" if found["end"] == ".bias" else kind


class Layers:
    """The layers of a model's parts, found by the names that files have for them."""

    def __init__(self, parts: Mapping[str, nn.Module], base_class: str | None = None):
        """parts: "unet", "text_encoder", "text_encoder_2". base_class: of the module a PEFT folder was made from."""
        self.base_class = base_class
        self.dotted: dict[tuple[str, str], str] = {}  # (part, path without "text_model.") -> path
        self.kohya: dict[tuple[str, str], str] = {}  # (part, name with underscores) -> path
        for part, module in parts.items():
            for path, layer in module.named_modules():
                if getattr(layer, "weight", None) is not None:
                    short = path.removeprefix("text_model.")
                    self.dotted[part, short] = path
                    self.kohya[part, short.replace(".", "_")] = path
        for original, path in original_names(parts["unet"]):
            self.kohya["unet", original.replace(".", "_")] = path

    def find(self, name: str) -> tuple[str, str] | None:
        """Return a layer's part and its path in it; None where the model has no such layer.

        Raises InputError where both text encoders have it, and nothing says which is meant.
        """
        for prefix, part in (KOHYA | COMFY).items():
            if name.startswith(prefix):
                own = name.removeprefix(prefix).replace(".", "_").removeprefix("text_model_")
                path = self.kohya.get((part, own))
                return None if path is None else (part, path)
        name = name.removeprefix("base_model.model.")
        part, _, rest = name.partition(".")
        if part in PARTS:
            rest = rest.removeprefix("base_model.model.").removeprefix("text_model.")
            path = self.dotted.get((part, rest))
            return None if path is None else (part, path)
        return self._of_any_part(name.removeprefix("text_model."))

    def _of_any_part(self, short: str) -> tuple[str, str] | None:
        found = [(part, self.dotted[part, short]) for part in PARTS if (part, short) in self.dotted]
        if len(found) > 1:  # both text encoders have it
            named = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}
            found = [pair for pair in found if pair[0] == named.get(self.base_class)]
            if not found:
                raise InputError(
                    f"{short}: both text encoders have this layer; expected names that begin with text_encoder. or "
                    f"text_encoder_2., or a base_model_class in the configuration's auto_mapping: {' or '.join(named)}"
                )
        return found[0] if found else None


def original_names(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the original SDXL code's name and diffusers' path of each layer of diffusers' UNet2DConditionModel."""
    paths = {path for path, layer in unet.named_modules() if getattr(layer, "weight", None) is not None}
    for block, place in _blocks(unet):
        for path in sorted(paths):
            if path.startswith(f"{block}."):
                inner = _inner(path.removeprefix(f"{block}."))
                yield f"{place}.{'op' if 'downsamplers' in block else inner}", path
    single = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    single |= {f"time_embedding.linear_{i}": f"time_embed.{2 * (i - 1)}" for i in (1, 2)}
    single |= {f"add_embedding.linear_{i}": f"label_emb.0.{2 * (i - 1)}" for i in (1, 2)}
    for path, original in single.items():
        if path in paths:
            yield original, path


def _blocks(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each resnet, transformer and resampler by diffusers' path and its place in the original code."""
    place = 0
    for i, down in enumerate(unet.down_blocks):
        for j in range(len(down.resnets)):
            place += 1
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{place}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{place}.1"
        if getattr(down, "downsamplers", None):
            place += 1
            yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{place}.0"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    place = -1
    for i, up in enumerate(unet.up_blocks):
        attends = bool(getattr(up, "attentions", None))
        for j in range(len(up.resnets)):
            place += 1
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{place}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{place}.1"
        if getattr(up, "upsamplers", None):
            yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{place}.{1 + attends}"


def _inner(path: str) -> str:
    """Return the original code's name of a layer within its block."""
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return names.get(path, path)
