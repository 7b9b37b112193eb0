"""python -m runtime.generate on the tiny random model: what it writes, what it says, and every kind of bad input."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from kernels import ops
from runtime import LocalControlPipeline, generate
from runtime.cli.describe import png_text
from runtime.errors import InputError
from runtime.loading import load as loading
from tests.support import saved_model
from tests.support.tiny import make_adapter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """As users run it: the tests of the kernels have Triton's interpreter on."""
    monkeypatch.setattr(ops, "INTERPRETED", False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "canny"
    make_adapter().save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A working folder with a picture, a mask of its left half, and a black mask."""
    monkeypatch.chdir(tmp_path)
    pixels = np.zeros((64, 64), np.uint8)
    pixels[16:48, 16:48] = 255
    Image.fromarray(pixels).save("picture.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save("black.png")
    os.symlink("loop.png", "loop.png")
    return tmp_path


@pytest.fixture
def run(files, adapter):
    """Run the command line in the working folder with the tiny model; returns its exit code."""

    def call(*arguments: str, model: str | None = None) -> int:
        base = ["--prompt", "a red circle", "--steps", "2", "--seed", "5"]
        base += ["--model", model or str(saved_model.folder()), "--adapter", f"canny={adapter}"]
        return generate.main([*base, *arguments])

    return call


def written(files: Path) -> set[str]:
    return {p.name for p in files.iterdir()} - {"picture.png", "mask.png", "black.png", "loop.png"}


def test_writes_picture_sheet_and_report(run, files, capsys):
    controls = ["--condition", "picture.png", "--preprocess", "canny", "--mask", "mask.png", "--scale", "0.7"]
    assert run(*controls, "--sheet", "sheet.png", "--report", "report.json") == 0
    assert written(files) == {"out.png", "sheet.png", "report.json"}
    said = capsys.readouterr().err
    stages = ("start", "model", "text", "adapter", "denoise", "decode")
    for stage in stages:
        assert f"\n{stage}" in f"\n{said}", stage
    image = Image.open("out.png")
    assert image.size == (64, 64)
    assert image.text["prompt"] == "a red circle"
    assert image.text["seed"] == "5"
    assert re.fullmatch(r"localcontrol 0\.\d+\.\d+", image.text["software"])
    assert json.loads(image.text["regions"])[0]["scale"] == "0.7"
    report = json.loads(Path("report.json").read_text())
    seconds = report["seconds"]
    assert set(seconds) == {*stages, "save", "total"}
    assert seconds["total"] == pytest.approx(sum(seconds.values()) / 2, abs=1e-3)
    assert report["peak_memory_bytes"]["ram"] > 1e7
    assert {"torch", "diffusers", "localcontrol"} <= set(report["versions"])
    assert report["settings"]["seed"] == 5
    assert Image.open("sheet.png").width > 4 * 200


def test_the_report_has_the_time_of_an_engine_that_fails(run, monkeypatch, capsys):
    """Of its choice, too: a total that leaves them out is not what the picture waited for."""

    def choose(*_):
        time.sleep(0.3)
        return "nowhere", 1.0, 2.0

    def load_engine(*_, **__):
        time.sleep(0.5)
        raise InputError("damaged")

    monkeypatch.setattr("runtime.fastest.choose", choose)
    monkeypatch.setattr("runtime.LocalControlPipeline.from_engine", load_engine)
    assert run("--report", "report.json") == 0
    assert "engine nowhere: damaged; PyTorch is used" in capsys.readouterr().err
    seconds = json.loads(Path("report.json").read_text())["seconds"]
    assert seconds["model"] >= 0.8 and seconds["total"] >= 0.8


def test_the_metadata_repeats_the_run(run, adapter):
    region = "condition=picture.png,preprocess=canny,mask=mask.png,end=0.5,levels=1:1:0.5:0"
    assert run("--region", region, "--scheduler", "ddim", "--guidance", "3", "--metadata", "full") == 0
    text = Image.open("out.png").text
    Path("regions.json").write_text(text["regions"])
    again = ["--prompt", text["prompt"], "--seed", text["seed"], "--steps", text["steps"]]
    again += ["--guidance", text["guidance"], "--scheduler", text["scheduler"], "--model", text["model"]]
    again += [
        "--height",
        text["height"],
        "--width",
        text["width"],
        "--adapter",
        *json.loads(text["adapters"]),
    ]
    assert generate.main([*again, "--regions", "regions.json", "--out", "again.png"]) == 0
    assert np.array_equal(np.array(Image.open("again.png")), np.array(Image.open("out.png")))
    run("--out", "free.png")
    assert not np.array_equal(np.array(Image.open("free.png")), np.array(Image.open("out.png")))


def test_the_metadata_tells_of_no_person_and_no_machine_unless_asked(run, files, adapter, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    (files / "somebody").mkdir()
    (files / "mask.png").rename(files / "somebody" / "mask.png")
    region = f"condition={files / 'picture.png'},preprocess=canny,mask=somebody/mask.png"
    for kind in ("plain", "full", "none"):
        assert run("--region", region, "--metadata", kind, "--out", f"{kind}.png") == 0
    plain, full, none = (Image.open(f"{kind}.png").text for kind in ("plain", "full", "none"))
    assert none == {} and plain.keys() == full.keys()
    assert json.loads(plain["regions"])[0]["condition"] == "picture.png"
    assert json.loads(plain["regions"])[0]["mask"] == "mask.png"
    assert json.loads(plain["adapters"]) == [f"canny={adapter.name}"]
    assert not any(str(files.parent) in value or "somebody" in value for value in plain.values())
    told = png_text(
        {"adapters": ["mine=/mnt/secret/lr=1e-5/out"], "loras": ["/mnt/x/a.safetensors=0.5"]}, "plain"
    )
    assert told == {"adapters": '["mine=out"]', "loras": '["a.safetensors=0.5"]'}
    assert str(files / "picture.png") in full["regions"] and str(adapter) in full["adapters"]


def test_the_report_says_in_which_steps_each_region_acts(run):
    region = "condition=picture.png,preprocess=canny"
    options = [
        "--region",
        f"{region},end=0.5",
        "--region",
        f"{region},start=0.9",
        "--region",
        f"{region},end=0",
    ]
    assert run(*options, "--steps", "4", "--report", "r.json") == 0
    assert json.loads(Path("r.json").read_text())["region_steps"] == [[0, 1], [3], []]


def test_the_metadata_of_a_regions_file_is_seen_from_the_working_folder(run, files):
    (files / "inputs").mkdir()
    for name in ("picture.png", "mask.png"):
        (files / name).rename(files / "inputs" / name)
    region = {"condition": "picture.png", "mask": "mask.png", "preprocess": "canny", "levels": [1, 1, 0, 0]}
    Path("inputs/regions.json").write_text(json.dumps([region]))
    assert run("--regions", "inputs/regions.json") == 0
    Path("again.json").write_text(Image.open("out.png").text["regions"])
    assert json.loads(Path("again.json").read_text())[0]["mask"] == "inputs/mask.png"
    assert run("--regions", "again.json", "--out", "again.png") == 0
    assert np.array_equal(np.array(Image.open("again.png")), np.array(Image.open("out.png")))


def test_several_images_are_numbered_and_seeded(run, files):
    assert run("--images", "3", "--out", "a.png", "--dtype", "bf16") == 0
    assert Image.open("a.png").text["dtype"] == "bf16"
    assert written(files) == {"a.png", "a-1.png", "a-2.png"}
    assert [Image.open(name).text["seed"] for name in ("a.png", "a-1.png", "a-2.png")] == ["5", "6", "7"]


def test_a_drawn_seed_is_said_and_written(capsys, files):
    arguments = ["--prompt", "x", "--steps", "1", "--model", str(saved_model.folder())]
    assert generate.main(arguments) == 0
    seed = Image.open("out.png").text["seed"]
    assert f"(seed {seed})" in capsys.readouterr().err
    assert generate.main([*arguments, "--out", "other.png"]) == 0
    assert Image.open("other.png").text["seed"] != seed
    assert generate.main([*arguments, "--seed", seed, "--out", "same.png"]) == 0
    assert np.array_equal(np.array(Image.open("same.png")), np.array(Image.open("out.png")))


BAD = {
    "missing condition": (["--condition", "no.png"], "region condition: .*no.png"),
    "empty condition": (["--condition", "empty.png"], "region condition: .*empty.png"),
    "truncated condition": (["--condition", "cut.png"], "region condition: .*cut.png"),
    "condition is text": (["--condition", "text.png"], "region condition: .*text.png"),
    "decompression bomb": (["--condition", "bomb.png"], "bomb.png.*pixels"),
    "missing mask": (["--condition", "picture.png", "--mask", "no.png"], "region mask: .*no.png"),
    "NaN in the condition": (["--condition", "nan.tif"], "region condition: contains NaN"),
    "NaN in the mask": (["--condition", "picture.png", "--mask", "nan.tif"], "region mask: contains NaN"),
    "NaN in the result": (["--guidance", "1e39"], "denoise: the result has NaN"),
    "mask without condition": (["--mask", "mask.png"], "--mask without --condition"),
    "unknown preprocess": (
        ["--condition", "picture.png", "--preprocess", "cany"],
        "preprocess 'cany' is unknown.*canny",
    ),
    "size": (["--height", "100"], "height 100: not a multiple of 16; the nearest: 96 and 112"),
    "steps": (["--steps", "0"], "steps 0"),
    "seed": (["--seed", "-3"], "seed -3"),
    "images": (["--images", "0"], "--images 0"),
    "guidance": (["--guidance", "nan"], "guidance nan"),
    "scheduler": (["--scheduler", "eulr"], "scheduler 'eulr' is unknown"),
    "scale": (["--condition", "picture.png", "--scale", "nan"], "region: scale"),
    "start after end": (
        ["--condition", "picture.png", "--start", "0.8", "--end", "0.2"],
        "start 0.8 is after end 0.2",
    ),
    "levels": (["--condition", "picture.png", "--levels", "1:1"], "levels '1:1'; expected 4"),
    "region key": (
        ["--region", "condition=picture.png,strength=1"],
        "--region 1: unknown key strength; expected ",
    ),
    "regions file": (["--regions", "no.json"], "regions: cannot read no.json"),
    "unknown adapter": (
        ["--region", "condition=picture.png,adapter=depth"],
        "adapter 'depth' is unknown; .*canny",
    ),
    "adapter path": (["--adapter", "x=nowhere"], r"adapter x \(nowhere\): not found"),
    "adapter form": (["--adapter", "nowhere"], "--adapter 'nowhere'; expected name=path"),
    "out folder": (["--out", "no/such/out.png"], "--out: .*no/such"),
    "out is a folder": (["--out", "folder.png"], "--out: folder.png is a folder"),
    "out suffix": (["--out", "out.jpg"], "--out out.jpg: expected a name that ends in .png"),
    "sheet is out": (["--sheet", "out.png"], "--sheet out.png is also --out"),
    "out is the condition": (
        ["--condition", "picture.png", "--out", "../{folder}/picture.png"],
        "region condition: picture.png would be overwritten by --out",
    ),
    "unknown user": (["--out", "~no-such-user/out.png"], "--out: cannot write ~no-such-user"),
    "report folder": (["--report", "no/report.json"], "--report: .*no"),
    "model": (["--model", "nowhere"], "model nowhere: "),
    "device": (["--device", "tpu9"], "device 'tpu9'"),
    "device without data": (["--device", "meta"], "device meta: it computes nothing"),
    "a device that this PyTorch has not": (
        ["--device", "xpu"],
        "device xpu: this PyTorch or machine has none",
    ),
    "broken UTF-8": (["--prompt", "caf\udce9"], r"prompt 'caf.': broken UTF-8 at character 4"),
    "a long number": (["--seed", "9" * 401], r"seed 9{40}\.\.\. \(401 characters\): expected a whole number"),
    "a huge size": (["--height", "1600000"], "height 1600000: expected at most 16384 pixels"),
    "many images": (["--images", "30000000"], "--images 30000000: expected a whole number from 1 to 1000"),
    "a long path": (["--condition", "a" * 300 + ".png"], "region condition: a+.png cannot be read"),
    "deep JSON": (["--regions", "deep.json"], "regions: deep.json is not JSON"),
    "a user's model": (["--model", "~nosuchuser/x"], "model ~nosuchuser/x: no such user"),
    "a user's adapter": (["--adapter", "x=~nosuchuser/x"], "~nosuchuser/x: no such user"),
    "a seed whose next is none": (
        ["--seed", "9223372036854775807", "--images", "2"],
        "--seed 9223372036854775807: of 2 images; expected at most 9223372036854775806",
    ),
    "a link to itself": (["--condition", "loop.png"], "loop.png cannot be read: "),
    "a user's engine": (["--engine", "~nosuchuser/x"], "~nosuchuser/x: no such user"),
    "guidance rescale": (["--guidance-rescale", "2"], "guidance_rescale 2: expected a number from 0 to 1"),
    "backend": (["--backend", "triton"], "triton"),
    "lora": (["--lora", "no.safetensors"], "no.safetensors"),
    "vae": (["--vae", "no-vae"], "vae no-vae"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(run, files, capsys, case):
    arguments, message = BAD[case]
    (files / "empty.png").touch()
    (files / "cut.png").write_bytes((files / "picture.png").read_bytes()[:-40])
    (files / "text.png").write_text("no picture")
    (files / "folder.png").mkdir()
    (files / "deep.json").write_text("[" * 100_000)
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(files / "nan.tif")
    if case == "decompression bomb":
        Image.new("1", (10_000, 9_000)).save("bomb.png")  # just over PIL's limit
    before = written(files)
    assert run(*(argument.format(folder=files.name) for argument in arguments)) == 2
    *stages, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert not any(line.startswith("error") for line in stages)
    assert written(files) == before


def test_a_wrong_path_is_found_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(LocalControlPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for case in ("missing condition", "out folder", "size", "scheduler", "region key", "unknown adapter"):
        assert run(*BAD[case][0]) == 2, case


def test_a_wrong_adapter_or_backend_is_found_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    for case in ("adapter path", "backend", "device"):
        assert run(*BAD[case][0]) == 2, case


def test_an_adapter_of_other_channels_is_refused(run, files, capsys):
    make_adapter(channels=(32, 32, 64, 64)).save_pretrained(files / "wide")
    assert run("--adapter", "wide=wide", "--condition", "picture.png", "--control", "wide") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: adapter 'wide' has features of (32, 32, 64, 64) channels")
    assert written(files) == {"wide"}


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_spoiled_model_folder_is_refused(run, files, capsys, harm):
    model = saved_model.copy_folder(files)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if harm == "truncated":
        weights.write_bytes(content[:-1000])
    assert run(model=str(model)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "diffusion_pytorch_model" in last
    assert written(files) == {"model"}


def test_warnings_are_one_line_each(run, capsys):
    assert run("--condition", "picture.png", "--mask", "black.png") == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]
    assert len(warned) == 1
    assert warned[0].startswith("warning: region mask: all zero")


def test_a_mask_of_another_shape_and_weights_in_plain_words_are_warned_of_once(run, capsys):
    Image.new("L", (64, 32), 255).save("wide.png")
    words = "red\n" * 90 + "(zebra:1.3)"
    assert run("--prompt", words, "--condition", "picture.png", "--mask", "wide.png", "--sheet", "s.png") == 0
    said = capsys.readouterr().err.splitlines()
    warned = [line for line in said if line.startswith("warning: ")]
    assert len(warned) == 2, warned
    assert re.search(r"prompt: '\(zebra:1.3\)' is read as words; prompt syntax a1111", warned[0])
    assert re.search("region mask: 64 x 32 px is stretched", warned[1])
    assert not any("stacklevel" in line or "UserWarning" in line for line in said)


def test_an_interrupt_leaves_nothing_and_exits_130(run, files, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalControlPipeline, "draw", interrupt)
    assert run() == 130
    assert written(files) == set()
    assert capsys.readouterr().err.strip().splitlines()[-1] == "interrupted"


def test_an_interrupt_while_saving_leaves_no_part_of_a_picture(run, files, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert run("--report", "report.json") == 130
    assert written(files) == set()
    assert capsys.readouterr().err.strip().splitlines()[-1] == "interrupted"


def test_an_unexpected_error_is_not_swallowed(run, monkeypatch):
    monkeypatch.setattr(LocalControlPipeline, "draw", lambda *_, **__: {}["a defect"])
    with pytest.raises(KeyError, match="a defect"):
        run()


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_help_shows_groups_and_two_examples():
    shown = python("-m", "runtime.generate", "--help")
    assert shown.returncode == 0
    assert shown.stdout.count("python -m runtime.generate --") >= 2
    for group in ("the picture:", "one region:", "several regions:", "the model:", "output:"):
        assert group in shown.stdout


def test_a_wrong_path_as_a_command(files):
    failed = python("-m", "runtime.generate", "--prompt", "x", "--condition", "no.png")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: region condition: ")
    assert failed.stderr.count("\n") == 1


def test_help_imports_no_torch_and_a_wrong_path_no_diffusers(files):
    code = """
import sys
import time
from runtime.generate import main
try:
    main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
assert main(["--prompt", "x", "--condition", "no.png"]) == 2
assert "diffusers" not in sys.modules
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_held_outside_is_said_shown_and_reported(run, capsys):
    region = ["--condition", "picture.png", "--mask", "mask.png"]
    held = ["--outside", "held", "--sheet", "sheet.png", "--report", "report.json"]
    assert run(*region, *held) == 0
    assert "outside  0 of 64 x 64 pixels differ from the picture without control" in capsys.readouterr().err
    drawn = np.asarray(Image.open("out.png"))
    assert run("--out", "free.png") == 0
    free = np.asarray(Image.open("free.png"))
    assert np.array_equal(drawn[:, 32:], free[:, 32:]) and not np.array_equal(drawn[:, :32], free[:, :32])
    assert run(*region, "--sheet", "free-sheet.png") == 0
    assert Image.open("sheet.png").width > Image.open("free-sheet.png").width
    report = json.loads(Path("report.json").read_text())
    assert report["settings"]["outside"] == "held" and report["pixels_changed_outside"] == 0
    assert report["seconds"]["reference"] > 0


def test_a_held_picture_keeps_its_size_and_pixels(run, capsys):
    photo = np.random.default_rng(0).integers(0, 256, (57, 70, 3), dtype=np.uint8)
    Image.fromarray(photo).save("photo.png")
    region = ["--condition", "picture.png", "--mask", "mask.png", "--image", "photo.png"]
    assert run(*region, "--outside", "held", "--strength", "0.5", "--sheet", "sheet.png") == 0
    assert "outside  0 of 70 x 57 pixels differ from photo.png as RGB" in capsys.readouterr().err
    drawn = Image.open("out.png")
    assert drawn.size == (70, 57) and np.array_equal(np.asarray(drawn)[:, 36:], photo[:, 36:])
    assert drawn.text["outside"] == "held" and drawn.text["height"] == "null"


def test_words_of_a_region_take_the_prompts_place_inside_its_mask(run, capsys):
    assert run("--out", "plain.png") == 0
    assert run("--region-prompt", "a blue star", "--mask", "mask.png", "--sheet", "sheet.png") == 0
    worded, plain = (np.asarray(Image.open(name)) for name in ("out.png", "plain.png"))
    assert not np.array_equal(worded, plain)
    assert json.loads(Image.open("out.png").text["regions"])[0]["prompt"] == "a blue star"
    assert run("--region", "prompt=a blue star, at night,mask=mask.png", "--out", "night.png") == 0
    assert json.loads(Image.open("night.png").text["regions"])[0]["prompt"] == "a blue star, at night"
    assert run("--mask", "mask.png") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("expected the picture that the control shows, or --region-prompt")
    assert run("--region", "mask=mask.png") == 2
    assert "--region 1: condition is missing, and so is a prompt" in capsys.readouterr().err
    assert run("--region-prompt", "", "--condition", "picture.png") == 2
    assert "prompt ''; expected words" in capsys.readouterr().err
    assert run("--region-prompt", "a star", "--control", "canny") == 2
    assert "--control canny without a condition" in capsys.readouterr().err


def test_a_held_picture_keeps_its_profile_and_says_what_becomes_of_transparency(run, files, capsys):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.open("picture.png").convert("RGBA")
    image.putalpha(200)
    image.save("photo.png", icc_profile=profile)
    region = ["--condition", "picture.png", "--mask", "mask.png", "--strength", "0.5", "--image", "photo.png"]
    assert run(*region, "--outside", "held") == 0
    assert Image.open("out.png").info["icc_profile"] == profile
    said = [line for line in capsys.readouterr().err.splitlines() if "transparency" in line]
    assert said == [
        "warning: outside held: image has transparency, which is laid on one colour; the picture made has none"
    ]
    assert run(*region) == 0  # its colours are the model's
    assert "icc_profile" not in Image.open("out.png").info
