"""runtime.loading.weights: what is wrong with a weight file is found in its header and named."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import InputError
from runtime.loading.weights import (
    check_finite_weights,
    find_weights,
    load_pickle,
    tensor_shapes,
    with_suffix,
)
from runtime.machine.files import read_json

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
SHAPES = {"a": (2, 3), "b": (4,)}


def test_shapes_of_safetensors_and_pickles(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save({"state_dict": TENSORS, "step": 3}, tmp_path / "x.ckpt")
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert tensor_shapes(tmp_path / "x.safetensors") == SHAPES
    assert tensor_shapes(tmp_path / "x.ckpt", allow_pickle=True) == SHAPES
    assert tensor_shapes(tmp_path / "old.bin", allow_pickle=True) == SHAPES


@pytest.mark.parametrize("spoil", [lambda d: d[:-1], lambda d: d[:9], lambda d: b"", lambda d: d + b"x"])
def test_a_cut_or_padded_file_is_named(tmp_path, spoil):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=r"x\.safetensors: not a whole \.safetensors file"):
        tensor_shapes(path)


def test_a_pickle_is_refused_unless_asked_for(tmp_path):
    torch.save(TENSORS, tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"x\.bin: a pickle"):
        tensor_shapes(tmp_path / "x.bin")


class _Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


@pytest.mark.parametrize("content", ["code", "cut", "a list"])
def test_a_pickle_with_anything_but_tensors_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    path = tmp_path / "x.bin"
    torch.save({"code": {"a": _Harmful()}, "cut": TENSORS, "a list": [torch.ones(2)]}[content], path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"x\.bin: "):
        tensor_shapes(path, allow_pickle=True)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda t: t.to_sparse(), "in sparse_coo"),
        (lambda t: t.to_sparse_csr(), "in sparse_csr"),
        (lambda t: t.to("meta"), "without values"),
    ],
)
def test_a_pickles_tensors_must_have_values_everywhere(tmp_path, make, kind):
    torch.save({"a": torch.ones(2), "b": make(torch.eye(3))}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=rf"x\.pt: b: a tensor {kind}; expected dense ones, with values"):
        load_pickle(tmp_path / "x.pt")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        InputError, match=r"x.gguf: a GGUF file, which is not read; expected a \.safetensors file"
    ):
        tensor_shapes(tmp_path / "x.gguf", allow_pickle=True)
    with pytest.raises(InputError, match=r"nowhere\.safetensors: weight file missing"):
        tensor_shapes(tmp_path / "nowhere.safetensors")
    with pytest.raises(InputError, match="weight file missing"):
        tensor_shapes(tmp_path)


@pytest.mark.parametrize(
    ("names", "dtype", "variant", "safe"),
    [
        (["model.safetensors"], torch.float16, None, True),
        (["model.safetensors", "model.fp16.safetensors"], torch.float16, "fp16", True),
        (["model.safetensors", "model.fp16.safetensors"], torch.bfloat16, None, True),
        (["model.fp16.safetensors"], torch.float32, "fp16", True),
        (["pytorch_model.bin", "model.safetensors"], torch.float32, None, True),
        (["diffusion_pytorch_model.fp16.bin"], torch.float32, "fp16", False),
    ],
)
def test_which_file_of_a_folder_is_taken(tmp_path, names, dtype, variant, safe):
    for name in names:
        (save_file if name.endswith("safetensors") else torch.save)(TENSORS, tmp_path / name)
    expected = {"variant": variant, "use_safetensors": safe}
    assert find_weights(tmp_path, dtype, allow_pickle=True) == expected


def test_every_shard_is_checked(tmp_path):
    name = "diffusion_pytorch_model"
    shards = {key: f"{name}-0000{i}-of-00002.safetensors" for i, key in enumerate(TENSORS, 1)}
    for key, shard in shards.items():
        save_file({key: TENSORS[key]}, tmp_path / shard)
    index = tmp_path / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert find_weights(tmp_path, torch.float32) == {"variant": None, "use_safetensors": True}
    (tmp_path / shards["b"]).unlink()
    with pytest.raises(InputError, match=f"{shards['b']}: weight file missing"):
        find_weights(tmp_path, torch.float32)
    index.write_text("{}")
    with pytest.raises(InputError, match=r"index\.json: expected a weight_map"):
        find_weights(tmp_path, torch.float32)


def test_a_tensor_of_two_shards_has_one_value(tmp_path):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": dict(zip(TENSORS, shards, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(TENSORS, tmp_path / shards[0])
    save_file(TENSORS, tmp_path / shards[1])
    find_weights(tmp_path, torch.float32)
    save_file(TENSORS | {"a": TENSORS["a"] + 1}, tmp_path / shards[1])
    with pytest.raises(InputError, match=rf"{shards[1]}: a is another in {shards[0]}; expected it in one"):
        find_weights(tmp_path, torch.float32)


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_json_that_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: "):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_weight_is_found(bad, dtype):
    modules = {"first": torch.nn.Linear(3, 3), "second": torch.nn.Linear(40, 40, dtype=dtype)}
    with torch.no_grad():
        modules["second"].weight.fill_(600.0)  # their sum is more than float16 holds
        check_finite_weights(modules, "here")
        modules["second"].weight[7, 9] = bad
    with pytest.raises(InputError, match="here: NaN or infinity in the weights, first in second weight"):
        check_finite_weights(modules, "here")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a Git LFS pointer, not the file itself",
        ),
        (b"\n<!DOCTYPE html><html>", "a web page, not a weight file"),
        (b"", "an empty file"),
        (b"{}", "not a weight file"),
    ],
)
def test_a_file_that_is_another_thing_is_named(tmp_path, data, message):
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(InputError, match=message):
        tensor_shapes(tmp_path / "x.ckpt", allow_pickle=True)


@pytest.mark.parametrize("name", ["x.SAFETENSORS", "x", "x.ckpt", "x.bin"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    assert tensor_shapes(tmp_path / name) == {key: tuple(value.shape) for key, value in TENSORS.items()}
    with with_suffix(tmp_path / name) as named:
        assert named.suffix == ".safetensors" and load_file(named).keys() == TENSORS.keys()


def test_a_state_dict_within_itself_ends(tmp_path):
    nested = {"a": torch.ones(2)}
    nested["state_dict"] = nested
    torch.save(nested, tmp_path / "x.bin")
    assert tensor_shapes(tmp_path / "x.bin", allow_pickle=True) == {"a": (2,)}


@pytest.mark.parametrize("shard", [5, None, [1], {"a": 1}])
def test_an_index_of_anything_but_names_is_refused(tmp_path, shard):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": shard}}))
    with pytest.raises(InputError, match=r"index\.json: expected a weight_map that names the weight files"):
        find_weights(tmp_path, torch.float32)


def test_a_variant_that_is_not_read_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(
        InputError, match=r"weight file missing, found diffusion_pytorch_model\.non_ema\.safe"
    ):
        find_weights(tmp_path, torch.float32)
