"""What strangers' inputs are given to. Each target makes an input and returns the call that reads it."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from runtime import fastest
from runtime.capabilities import of_manifest
from runtime.cli.regions import parse_region, read_regions
from runtime.control.image_files import formats
from runtime.control.images import load_image
from runtime.control.masks import load_mask, read_mask
from runtime.control.region import Region, pack
from runtime.engines import verified
from runtime.engines.manifest import read_manifest
from runtime.errors import InputError
from runtime.loading.adapter import load_adapter
from runtime.loading.controls import load_controls
from runtime.loading.folder import check_folder, load_folder
from runtime.loading.lora import find_lora, fuse_lora
from runtime.loading.single_file import check_layout, declared_schedule
from runtime.loading.weights import load_pickle, tensor_shapes
from runtime.model.latent_rgb import FILE, SDXL, LatentRGB
from runtime.sampling.request import Request
from runtime.serve import orders
from runtime.serve.files import Files
from runtime.serve.limits import Limits
from runtime.serve.refusals import Refusal
from runtime.serve.schema import GenerateNow
from runtime.text.prompts import check_prompt, cut, parse, split
from tests.fuzz.mutate import VALUES, damaged, json_bytes, tensors_bytes
from tests.support import engines, saved_model, server
from tests.support.single_file_layout import controlnet_tensors
from tests.support.tiny import make_controlnet, make_union
from training.config import TrainConfig
from training.data.sample import decode_text
from training.data.sources import open_source

Call = Callable[[], object]
Make = Callable[[random.Random, Path], Call]
TARGETS: dict[str, tuple[float, Make]] = {}  # name -> share of the campaign, maker


def target(share: float) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        TARGETS[make.__name__.replace("_", " ")] = share, make
        return make

    return register


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@cache
def pictures() -> list[bytes]:
    """A small picture in every format and mode that is read."""
    rng, files = np.random.default_rng(0), []
    grey = Image.fromarray(rng.integers(0, 256, (24, 20), dtype=np.uint8))
    colour = Image.fromarray(rng.integers(0, 256, (24, 20, 4), dtype=np.uint8))
    for name in formats():
        for picture in (
            grey,
            colour,
            colour.convert("RGB"),
            colour.convert("RGB").convert("P"),
            grey.convert("1"),
        ):
            file = io.BytesIO()
            try:
                picture.save(file, name)
            except OSError:  # a mode that the format does not have
                continue
            files.append(file.getvalue())
    for mode in ("I;16", "LA", "F", "CMYK"):
        file = io.BytesIO()
        colour.convert("RGB").convert("L").convert(mode if mode != "I;16" else "I").save(file, "TIFF")
        files.append(file.getvalue())
    return files


@target(4)
def images(rng: random.Random, folder: Path) -> Call:
    path = written(folder / "a.png", damaged(rng.choice(pictures()), rng, pictures()))
    return lambda: load_image(path)


@target(2)
def masks(rng: random.Random, folder: Path) -> Call:
    path = written(folder / "a.png", damaged(rng.choice(pictures()), rng, pictures()))
    return lambda: load_mask(path, 32, 32)


@target(2)
def arrays(rng: random.Random, _: Path) -> Call:
    shape = [rng.choice((0, 1, 2, 3, 4, 5, 16)) for _ in range(rng.randrange(5))]
    array = np.random.default_rng(rng.randrange(2**32)).normal(size=shape)
    array = array.astype(
        rng.choice(("f2", "f4", "f8", "u1", "u2", "i4", "i8", "?", "c8", "U1", "O", "M8[s]", ">f4"))
    )
    if array.dtype.kind == "f" and array.size and rng.random() < 0.3:
        array.flat[0] = rng.choice((np.nan, np.inf, 1.0001, -1e-9))
    source = array
    if rng.random() < 0.3 and array.dtype.kind in "fiub" and array.dtype.byteorder != ">":
        source = torch.from_numpy(array)
    reader = rng.choice((load_image, read_mask))
    return lambda: reader(source)


@cache
def weights() -> dict[str, torch.Tensor]:
    return {
        name: value for name, value in load_file(saved_model.single_file()).items() if value.numel() < 5000
    }


@target(2)
def safetensors(rng: random.Random, folder: Path) -> Call:
    metadata = rng.choice(({}, {"modelspec.prediction_type": rng.choice(("v", "x", ""))}, {"format": "pt"}))
    path = written(folder / "a.safetensors", tensors_bytes(weights(), metadata, rng))

    def read():
        shapes = tensor_shapes(path)
        declared_schedule(path, shapes)
        check_layout(path, shapes, vae_needed=True)

    return read


@target(1)
def adapters(rng: random.Random, folder: Path) -> Call:
    source = engines.adapter()
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    config = (source / "config.json").read_bytes()
    if rng.random() < 0.5:
        config = json_bytes(json.loads(config), rng)
        data = (source / "diffusion_pytorch_model.safetensors").read_bytes()
    else:
        data = tensors_bytes(tensors, {}, rng)
    written(folder / "config.json", config)
    written(folder / "diffusion_pytorch_model.safetensors", data)
    return lambda: load_adapter(folder, device="cpu", dtype=torch.float32)


@cache
def controlnets() -> list[tuple[dict, dict[str, torch.Tensor]]]:
    """Configs and tensors: of a ControlNet, a union, and a ControlNet in the original layout, which has no config."""
    with torch.random.fork_rng(devices=[]):  # an input does not depend on whether these were there before
        unet = saved_model.pipeline().unet
        plain, union = make_controlnet(unet), make_union(unet)
    configs = (
        json.loads(json.dumps({**net.config, "_class_name": type(net).__name__})) for net in (plain, union)
    )
    found = zip(configs, (plain.state_dict(), union.state_dict()), strict=True)
    return [*found, ({}, controlnet_tensors(plain))]


@target(1.5)
def controlnet_files(rng: random.Random, folder: Path) -> Call:
    config, tensors = rng.choice(controlnets())
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = bool(config) and rng.random() < 0.7
    if whole and rng.random() < 0.7:
        written(folder / "config.json", json_bytes(config, rng))
        written(weights, safetensors_bytes(tensors))
    else:
        written(folder / "config.json", json.dumps(config).encode())
        written(weights, tensors_bytes(tensors, {}, rng))
    sources = {rng.choice(("depth", "canny-2", "mine")): folder if whole else weights}
    return lambda: load_controls(sources, torch.device("cpu"), torch.float32)


@target(0.5)
def projections(rng: random.Random, folder: Path) -> Call:
    SDXL.write(folder)
    written(folder / FILE, json_bytes(json.loads((folder / FILE).read_text()), rng))
    return lambda: LatentRGB.read(folder, 4)


@cache
def pipe():
    return load_folder(saved_model.folder(), dtype=torch.float32)


@cache
def loras() -> list[tuple[dict[str, torch.Tensor], dict]]:
    """LoRAs of the tiny model, in the spellings of kohya, PEFT and LyCORIS."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    out, into = pipe().unet.get_submodule(layer).weight.shape
    up, down = torch.randn(out, 2), torch.randn(2, into)
    kohya = "lora_unet_" + layer.replace(".", "_")
    return [
        ({f"{kohya}.lora_up.weight": up, f"{kohya}.lora_down.weight": down, f"{kohya}.alpha": torch.tensor(2.0)}, {}),
        ({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, {"r": 2, "lora_alpha": 4}),
        ({f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up},
         {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}),
        ({f"{kohya}.hada_w1_a": up, f"{kohya}.hada_w1_b": down, f"{kohya}.hada_w2_a": up, f"{kohya}.hada_w2_b": down,
          f"{kohya}.alpha": torch.tensor(1.0)}, {}),
        ({f"{kohya}.diff": torch.randn(out, into), f"{kohya}.diff_b": torch.randn(out)}, {}),
    ]  # fmt: skip


@target(2)
def lora_files(rng: random.Random, folder: Path) -> Call:
    tensors, config = rng.choice(loras())
    path = written(folder / "adapter_model.safetensors", tensors_bytes(tensors, {}, rng))
    if config:
        written(folder / "adapter_config.json", json_bytes(config, rng))
    weight = rng.choice((1.0, 1.0, 0.5, -1.0, 0.0, float("nan")))

    def read():
        before = {name: value.clone() for name, value in pipe().unet.state_dict().items()}
        try:
            fuse_lora(pipe(), find_lora((path, weight)))
        finally:
            pipe().unet.load_state_dict(before)

    return read


@cache
def pickles() -> list[bytes]:
    file, other = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(3), "b": torch.zeros(2, 2)}, "step": 1}, file)
    torch.save({"a": torch.ones(3)}, other, _use_new_zipfile_serialization=False)
    return [file.getvalue(), other.getvalue()]


@target(0.5)
def pickle_files(rng: random.Random, folder: Path) -> Call:
    path = written(folder / "a.bin", damaged(rng.choice(pickles()), rng, pickles()))

    def read():
        tensor_shapes(path, allow_pickle=True)
        return load_pickle(path)

    return read


REGION = {
    "condition": "a.png", "mask": "a.png", "adapter": "canny", "scale": {"0": 0.5, "0.5": 1}, "start": 0.0, "end": 0.8,
    "levels": [1, 1, 0.5, 0], "preprocess": "none", "mask_condition": False, "prompt": "a", "prompt_weight": [[0, 1]],
    "uncond_scale": 0.5,
}  # fmt: skip


@target(2)
def region_files(rng: random.Random, folder: Path) -> Call:
    path = written(folder / "regions.json", json_bytes([REGION], rng))
    written(folder / "a.png", pictures()[0])

    def read():
        regions = [
            Region.from_dict(fields, f"region {i}", folder)
            for i, fields in enumerate(read_regions(str(path)))
        ]
        pack(Request("x", regions).regions, 32, 32)

    return read


@target(1)
def region_texts(rng: random.Random, folder: Path) -> Call:
    written(folder / "a.png", pictures()[0])
    text = ",".join(f"{k}={v}" for k, v in REGION.items() if k not in ("levels", "prompt_weight"))
    text = text.replace(str(REGION["scale"]), "0:0.5,0.5:1")
    text = damaged(text.encode(), rng).decode("utf-8", rng.choice(("replace", "surrogateescape")))
    return lambda: Region.from_dict(parse_region(text), "region", folder)


_DIRECTORY = tempfile.TemporaryDirectory(prefix="localcontrol-fuzz-")  # removed when the run ends


@cache
def server_orders():
    return orders.Orders(server.pipe().capabilities, Files(Path(_DIRECTORY.name), Limits()), Limits())


@target(2)
def server_bodies(rng: random.Random, _: Path) -> Call:
    picture = base64.b64encode(pictures()[0]).decode()
    region = {**REGION, "condition": picture, "mask": picture, "prompt_weight": 0.5}
    body = {"prompt": "a", "regions": [region], "steps": 2, "seed": 1, "guidance_range": [0, 1], "height": 32,
            "width": 32, "image": base64.b64encode(pictures()[1]).decode(), "strength": 0.5}  # fmt: skip
    data = json_bytes(body, rng)

    def read():
        try:
            server_orders().order(orders.parse(GenerateNow, data))
        except Refusal as error:
            raise (InputError if error.status < 500 else RuntimeError)(str(error)) from error

    return read


@target(1)
def requests(rng: random.Random, _: Path) -> Call:
    names = [n for n in Request.__dataclass_fields__ if n not in ("prompt", "regions")]
    given = {name: rng.choice((*VALUES, [1], (0.0, 1.0), np.float32(2), torch.tensor(3), object())) for name in
             rng.sample(names, rng.choice((1, 1, 2)))}  # fmt: skip
    prompt = rng.choice(("a", "a", ["a", "b"], rng.choice(VALUES)))
    return lambda: Request(prompt, **given)


@target(1)
def prompts(rng: random.Random, _: Path) -> Call:
    words = (
        "(",
        ")",
        "[",
        "]",
        ":1.3)",
        ":",
        "\\",
        "BREAK",
        " AND ",
        ":0.5 AND ",
        ",",
        "a red car",
        "<lora:x:1>",
        "|",
        "\u2028",
        "9" * 30,
    )
    text = "".join(rng.choice(words) for _ in range(rng.randrange(1, 60)))
    syntax, joins = rng.choice(("plain", "a1111")), rng.choice((True, False))

    def read():
        check_prompt(text, syntax, joins=joins)
        for part in split(text, syntax):
            found = parse(part.text, syntax)
            cut([(None if f.text is None else list(range(len(f.text))), f.weight) for f in found], 75, 5)

    return read


MODEL_FILES = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
               "text_encoder_2/config.json", "scheduler/scheduler_config.json")  # fmt: skip


@target(1)
def model_folders(rng: random.Random, folder: Path) -> Call:
    source, name = saved_model.folder(), rng.choice(MODEL_FILES)
    for file in source.rglob("*"):
        if file.suffix in (".json", ".txt"):
            (folder / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.relative_to(source))
    written(folder / name, json_bytes(json.loads((source / name).read_text()), rng))
    return lambda: check_folder(folder)


@target(1.5)
def manifests(rng: random.Random, folder: Path) -> Call:
    source = json.loads((engines.folder("onnxruntime") / "manifest.json").read_text())
    written(folder / "manifest.json", json_bytes(source, rng))
    written(folder / "verified.json", json_bytes([{"passed": True, "machine": {}, "error": 0.1}], rng))

    def read():
        manifest = read_manifest(folder)
        of_manifest(manifest).check(Request("x"))
        verified.entries(folder)

    return read


@target(0.5)
def tables_of_times(rng: random.Random, folder: Path) -> Call:
    times = {"picture_ms": 1.0, "first_ms": 2.0, "pixels": 4}
    entry = {"device": "x", "dtype": "fp32", "model": "x", "engine": "x", "manifest": "x", "adapters": {}}
    written(folder / "fastest.json", json_bytes([{**entry, "times": times, "torch_times": times}], rng))

    def read():
        before = fastest.cache_folder
        fastest.cache_folder = lambda create=True: folder
        try:
            for found in fastest.read_table():
                fastest.expect(found["times"], Request("x"))
        finally:
            fastest.cache_folder = before

    return read


@cache
def a_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, picture in enumerate(pictures()[:6]):
            for name, data in (
                (f"{i}.png", picture),
                (f"{i}.txt", b"a caption"),
                (f"{i}.json", b'{"text": "a"}'),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def with_checksums(data: bytes) -> bytes:
    """Return a tar whose headers' checksums are right: what else is damaged in them is then read."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def read_all(data: Path | str, **options) -> None:
    for _ in open_source(TrainConfig(data=str(data), **options)).read():
        pass


@target(1.5)
def tars(rng: random.Random, folder: Path) -> Call:
    data = damaged(a_tar(), rng)
    if rng.random() < 0.3:
        data = with_checksums(data)
    if rng.random() < 0.7:  # damaged inside, with a whole end
        data = data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512 + 1024)
    path = written(folder / "a.tar", data)
    return lambda: read_all(path, condition_from=rng.choice((None, "edges.png")))


@target(1)
def data_tables(rng: random.Random, folder: Path) -> Call:
    written(folder / "0.png", pictures()[0])
    rows = [
        {"file_name": "0.png", "text": "a", "conditioning_image": "0.png"},
        {"file_name": "0.png", "text": "b"},
    ]
    if rng.random() < 0.5:
        lines = [json_bytes(row, rng) for row in rows]
        written(folder / "metadata.jsonl", b"\n".join(lines))
    else:
        written(folder / "metadata.csv", damaged(b'file_name,text\n0.png,"a"\n0.png,b\n', rng))
    return lambda: read_all(folder)


@target(0.5)
def captions(rng: random.Random, _: Path) -> Call:
    data = damaged(
        "a café at night".encode(rng.choice(("utf-8", "utf-16", "utf-32", "latin-1", "utf-16-le"))), rng
    )
    return lambda: decode_text(data)


@target(0.5)
def training_configs(rng: random.Random, folder: Path) -> Call:
    source = {"config": TrainConfig(out="x").to_json()}
    path = written(folder / "training.json", json_bytes(source, rng))
    return lambda: TrainConfig.read(path)
