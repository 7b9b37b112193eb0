"""The measures, on pictures with known answers."""

from dataclasses import replace

import numpy as np
import pytest

from training.embedded.evaluate import HELD_OUT_SEED, colour_shares, held_out_scenes, shows
from training.embedded.world import BACKGROUNDS, COLOURS, HELD_OUT, Scene, Thing, render, sample_scene

SCENES = [sample_scene(60_000_000 + i) for i in range(60)] + held_out_scenes(60)
PICTURES = [render(scene) for scene in SCENES]


def test_the_detector_finds_what_is_drawn():
    assert np.mean([shows(p, s) for p, s in zip(PICTURES, SCENES, strict=True)]) == 1.0


def test_the_detector_misses_what_is_not_drawn():
    rng, found = np.random.default_rng(0), []
    for scene, picture in zip(SCENES[::2], PICTURES[::2], strict=True):  # each is asked for several things
        absent = [c for c in COLOURS if c not in {t.colour for t in scene.things}]
        asked = replace(scene.things[0], colour=str(rng.choice(absent)))
        found.append(shows(picture, replace(scene, things=(asked, *scene.things[1:]))))
        found += [shows(picture, replace(scene, background=b)) for b in BACKGROUNDS if b != scene.background]
    assert np.mean(found) == 0.0


@pytest.mark.parametrize("colour", COLOURS)
def test_shares_are_areas(colour):
    scene = Scene((Thing("circle", colour, 0.5, 0.5, 0.3, 0.0),), "stone", 1)
    area = np.pi * (0.3 * 0.92) ** 2
    shares = colour_shares(render(scene))
    assert abs(shares[colour] - area) < 0.02
    assert shares["stone"] > 0.7


def test_grey_noise_and_blur_show_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    blurred = np.full((128, 128, 3), noise.mean(), np.uint8)
    assert not any(shows(picture, scene) for scene in SCENES[:20] for picture in (noise, blurred))


def test_held_out_scenes_are_no_training_scenes():
    assert HELD_OUT_SEED > 10_000_000 + 1_000_000
    assert all((s.things[0].shape, s.things[0].colour) in HELD_OUT for s in held_out_scenes(50))
