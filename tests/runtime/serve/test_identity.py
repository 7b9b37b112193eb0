"""runtime.serve.identity: equal files give an equal hash, wherever they lie; others another."""

import shutil

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


def test_engines_by_their_manifest(tmp_path):
    folder = engines.copy_folder("onnxruntime", tmp_path)
    assert of("--engine", folder) == of("--engine", engines.folder("onnxruntime")) != of()
