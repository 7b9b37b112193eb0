"""benchmarks.quality.samples: held-out scenes and folders as samples, and their masks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality.samples import MASK_KINDS, folder_samples, held_out_samples, make_mask
from runtime.control.conditions import preprocess
from runtime.errors import InputError
from training.embedded.world import HELD_OUT, render


def picture(seed, size=(48, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n")
    return tmp_path


def test_scenes_come_with_every_mask_and_are_held_out():
    samples = list(held_out_samples(2))
    assert [(s.number, s.mask_kind) for s in samples] == [(i, kind) for i in (0, 1) for kind in MASK_KINDS]
    for s in samples:
        assert s.condition.shape == s.mask.shape == (1, 128, 128)
        assert s.prompt == s.scene.caption and np.array_equal(s.picture, render(s.scene))
        assert any((thing.shape, thing.colour) in HELD_OUT for thing in s.scene.things)


def test_a_scenes_condition_is_its_edges():
    sample = next(held_out_samples(1, condition="canny"))
    edges = np.asarray(preprocess("canny", Image.fromarray(sample.picture)))
    assert np.array_equal((sample.condition[0].numpy() * 255).astype(np.uint8), edges)


def test_fixed_masks_are_the_originals_square_and_the_left_half():
    centre, half = make_mask("centre", 0, 512, 512)[0], make_mask("half", 0, 64, 32)[0]
    wanted = torch.zeros(512, 512)
    wanted[128:384, 128:384] = 1
    assert torch.equal(centre, wanted)
    assert half[:, :16].all() and not half[:, 16:].any()


def test_random_masks_follow_from_the_number():
    masks = [make_mask("random", number, 64, 64) for number in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert all(0.1 < m.mean() < 1 and set(m.unique().tolist()) == {0, 1} for m in masks)


def test_a_folder_gives_square_pictures_and_their_prompts(folder):
    samples = list(folder_samples(str(folder), 32, 2, ["half"]))
    assert [(s.number, s.prompt, s.mask_kind) for s in samples] == [
        (0, "picture 0", "half"),
        (1, "picture 1", "half"),
    ]
    assert samples[0].picture.shape == (32, 32, 3) and samples[0].condition.shape == (1, 32, 32)
    assert samples[0].scene is None


def test_a_picture_is_cut_from_the_middle(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    assert (next(folder_samples(str(tmp_path), 32, 1, ["half"])).picture == 255).all()


def test_ready_conditions_and_painted_masks_are_taken(folder, tmp_path_factory):
    others = tmp_path_factory.mktemp("others")
    for i in range(3):
        for name, level in (("conditions", 51), ("masks", 255)):
            (others / name).mkdir(exist_ok=True)
            Image.new("L", (40, 48), level).save(others / name / f"{i}.png")
    options = {"conditions": str(others / "conditions"), "masks_from": str(others / "masks")}
    samples = list(folder_samples(str(folder), 32, 3, ["half", "centre"], **options))
    assert len(samples) == 3 and all(s.mask_kind == "painted" and s.mask.eq(1).all() for s in samples)
    assert all(torch.allclose(s.condition, torch.tensor(0.2)) for s in samples)


def test_bad_folders_are_named(folder):
    with pytest.raises(InputError, match="no such folder"):
        next(folder_samples("nowhere", 32, 1, ["half"]))
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1\.png"):
        list(folder_samples(str(folder), 32, 3, ["half"]))
    (folder / "2.txt").unlink()
    (folder / "1.png").unlink()
    with pytest.raises(InputError, match=r"2\.png.*prompt"):
        list(folder_samples(str(folder), 32, 3, ["half"]))


def test_captions_of_a_table_are_read(folder):
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"line {i}"}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert next(folder_samples(str(folder), 32, 1, ["half"])).prompt == "line 0"
