"""runtime.serve.identity: equal files give an equal hash, wherever they lie; others another."""

import shutil

from runtime.control.conditions import DEPTH_MODEL_VARIABLE
from runtime.serve.identity import model_hash
from runtime.serve.options import make_parser
from tests.support import engines, saved_model


def of(*arguments):
    return model_hash(make_parser().parse_args([str(a) for a in arguments]))


def test_what_is_loaded_is_hashed_by_its_contents(tmp_path):
    model = saved_model.folder()
    known = of("--model", model)
    moved = shutil.copytree(model, tmp_path / "moved")
    assert len(known) == 32 and of("--model", moved) == known and of("--model", moved) != of()
    adapted = of("--model", model, "--adapter", f"canny={engines.adapter()}")
    assert adapted not in (known, of("--model", model, "--adapter", f"edges={engines.adapter()}"))
    assert of("--model", model, "--lora", f"{engines.adapter()}=0.5") != of(
        "--model", model, "--lora", engines.adapter()
    )
    options = (["--dtype", "bf16"], ["--vae-tiling"], ["--tokenizer", model], ["--config", model])
    assert len({known, *(of("--model", model, *changed) for changed in options)}) == 5
    weights = next(moved.rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert of("--model", moved) != known


def test_a_folder_that_is_a_link_counts_as_the_one_it_leads_to(tmp_path):
    plain = shutil.copytree(saved_model.folder(), tmp_path / "plain")
    linked = shutil.copytree(plain, tmp_path / "linked")
    shared = shutil.move(linked / "unet", tmp_path / "shared")
    (linked / "unet").symlink_to(shared, target_is_directory=True)
    (linked / "around").symlink_to(linked, target_is_directory=True)  # which has no end
    assert of("--model", linked) == of("--model", plain)
    (shared / "config.json").write_text("{}")
    assert of("--model", linked) != of("--model", plain)


def test_engines_by_their_manifest(tmp_path):
    folder = engines.copy_folder("onnxruntime", tmp_path)
    assert of("--engine", folder) == of("--engine", engines.folder("onnxruntime")) != of()


def test_the_model_that_depth_is_computed_by_counts_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.delenv(DEPTH_MODEL_VARIABLE, raising=False)
    found = {of()}
    for text in ("{}", '{"depth": 1}'):
        (tmp_path / "config.json").write_text(text)
        monkeypatch.setenv(DEPTH_MODEL_VARIABLE, str(tmp_path))
        found.add(of())
    assert len(found) == 3
