"""runtime.sampling.request: numbers and paths are taken as what they are, all else is one line that names the field."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.control.region import Region
from runtime.errors import InputError
from runtime.sampling.request import MAX_SEED, Request, guided_steps

CONDITION = torch.ones(16, 16)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": np.int64(4)}, 4),
        ({"seed": np.uint8(7)}, 7),
        ({"seed": MAX_SEED}, MAX_SEED),
        ({"steps": torch.tensor(4)}, 4),
        ({"guidance": np.float32(2.5)}, 2.5),
        ({"guidance": torch.tensor(2.5)}, 2.5),
        ({"guidance": 3}, 3.0),
        ({"height": np.int32(32)}, 32),
        ({"guidance_range": np.array([0, 0.5])}, (0.0, 0.5)),
        ({"guidance_range": [0, 1]}, (0.0, 1.0)),
    ],
    ids=str,
)
def test_numbers_are_taken_as_what_they_are(given, expected):
    (name,) = given
    made = getattr(Request("x", **given), name)
    assert made == expected and type(made) is type(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance": "5"}, "guidance '5': expected a finite number"),
        ({"guidance": True}, "guidance True: expected a finite number"),
        ({"guidance": None}, "guidance None"),
        ({"guidance": 10**400}, "guidance 1000"),
        ({"seed": "7"}, "seed '7': expected a whole number"),
        ({"seed": [1, 2]}, r"seed \[1, 2\]"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"seed": True}, "seed True"),
        ({"seed": np.bool_(True)}, "seed (np.)?True"),
        ({"seed": torch.tensor([1, 2])}, "seed tensor"),
        ({"seed": MAX_SEED + 1}, "seed 9223372036854775808"),
        ({"steps": 4.0}, "steps 4.0"),
        ({"prompt": 5}, "prompt 5: expected a text"),
        ({"prompt": ("a", None)}, "prompt .*: expected a text"),
        ({"prompt": {"a": 1}}, "prompt .*: expected a text"),
        ({"negative_prompt": None}, "negative_prompt None: expected a text"),
        (
            {"negative_prompt": ["a", "b"]},
            "negative_prompt: 2 texts for 1 prompts; expected one, or one for each",
        ),
        ({"prompt_syntax": "compel"}, "prompt_syntax 'compel': expected plain, a1111"),
        (
            {"prompt": "a AND b", "prompt_syntax": "a1111", "guidance": 1},
            "prompt: AND, and the weight of a whole prompt, count in steps with guidance alone",
        ),
        ({"negative_prompt": "a AND b", "prompt_syntax": "a1111"}, "negative_prompt: 'AND' is not read"),
        ({"negative_prompt": "(a:99)", "prompt_syntax": "a1111"}, "negative_prompt: a weight of 99"),
        ({"output_type": "webp"}, "output_type 'webp': expected pil, np, pt, latent"),
        ({"clip_skip": -1}, "clip_skip -1: expected a whole number of at least 0"),
        ({"generator": 5}, "generator: a int; expected a torch.Generator"),
        ({"generator": torch.Generator(), "seed": 1}, "generator: given beside a seed"),
        ({"generator": [torch.Generator()] * 3}, "generator: 3 for 1 pictures"),
        ({"regions": None}, "regions: NoneType; expected a list of runtime.Region"),
        ({"regions": Region(CONDITION)}, "regions: Region; expected a list"),
        ({"regions": [Region(CONDITION), "x"]}, "region 2: a str; expected a runtime.Region"),
        (
            {"latents": torch.zeros(1, 4, 8, 8, dtype=torch.complex64)},
            "latents: complex64 .*; expected floats",
        ),
        ({"latents": torch.zeros(4, 8, 8)}, r"latents: float32 \(4, 8, 8\); expected floats \(B, C, h, w\)"),
        ({"latents": [1.0]}, "latents: a list; expected a tensor"),
        ({"latents": np.full((1, 4, 8, 8), np.nan)}, "latents: NaN or infinite"),
        ({"height": 100}, "height 100: not a multiple of 16; the nearest: 96 and 112"),
        ({"mask_resize": "cubic"}, "mask_resize 'cubic': expected area or nearest"),
        ({"guidance_range": (0.5, 0.2)}, "guidance_range 0.5 to 0.2: expected 0 <= start <= end <= 1"),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5: expected a number from 0 to 1"),
        ({"scheduler": 5}, "scheduler 5 is unknown"),
        ({"prompt": "caf\udce9"}, "prompt 'caf.': broken UTF-8 at character 4"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_all_else_is_one_line(given, message):
    with pytest.raises(InputError, match=message) as caught:
        Request(**{"prompt": "x", **given})
    assert "\n" not in str(caught.value)


def test_arrays_of_noise_are_taken():
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    assert torch.equal(Request("x", latents=noise).latents, torch.from_numpy(noise).float())


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    opened = []
    Image.new("L", (16, 16), 255).save(tmp_path / "p.png")
    read = Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **options: opened.append(1) or read(*given, **options))
    path = tmp_path / "p.png"
    request = Request("x", [Region(path), Region(str(path), scale=0.5), Region(Path(path), start=0.5)])
    first = request.pack(32, 32)
    assert request.pack(32, 32) is first and request.pack(16, 16) is not first
    assert len(opened) == 1


def test_guided_steps_follow_the_range():
    assert guided_steps(5, (0, 0.5), 4) == [True, True, False, False]
    assert guided_steps(1, (0, 1), 3) == [False] * 3
    assert Request("x", guidance_range=(0.5, 1)).guided_steps(4) == [False, False, True, True]
