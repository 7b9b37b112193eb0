"""training.embedded.shapes: the detector on pictures whose shapes are known."""

from dataclasses import replace

import numpy as np
import pytest

from training.embedded.evaluate import held_out_scenes
from training.embedded.shapes import adherence, shown_shapes
from training.embedded.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, render, sample_scene

SCENES = [sample_scene(80_000_000 + i) for i in range(40)] + held_out_scenes(40)


def test_it_finds_what_is_drawn():
    found = [adherence(render(scene), scene) for scene in SCENES]
    assert np.mean([f.shapes for f in found]) >= 0.97
    assert np.mean([f.colours for f in found]) == np.mean([f.background for f in found]) == 1.0


def test_it_does_not_find_what_is_not_drawn():
    found = []
    for scene in SCENES:
        others = [s for s in SHAPES if s not in {t.shape for t in scene.things}]
        asked = tuple(replace(t, shape=others[i % len(others)]) for i, t in enumerate(scene.things))
        found.append(adherence(render(scene), replace(scene, things=asked)).shapes)
    assert np.mean(found) <= 0.02


def test_shares_count_the_things_asked_for():
    scene = next(s for s in SCENES if len(s.things) == 2)
    absent = next(c for c in COLOURS if c not in {t.colour for t in scene.things})
    asked = replace(scene, things=(scene.things[0], replace(scene.things[1], colour=absent)))
    found = adherence(render(scene), asked)
    assert (found.colours, found.shapes) == (0.5, 0.5)
    other = next(b for b in BACKGROUNDS if b != scene.background)
    assert not adherence(render(scene), replace(scene, background=other)).background


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("radius", "turn"), [(0.12, 0.3), (0.3, -0.3)])
def test_every_shape_at_its_smallest_and_largest(shape, radius, turn):
    picture = render(Scene((Thing(shape, "blue", 0.4, 0.6, radius, turn),), "snow", 3))
    assert [(s.shape, s.colour) for s in shown_shapes(picture)] == [(shape, "blue")]


def test_a_spot_that_is_like_no_shape_has_none():
    picture = render(Scene((), "snow", 3))
    picture[50:62, 20:110] = COLOURS["blue"]  # a bar
    assert [(s.shape, s.colour) for s in shown_shapes(picture)] == [(None, "blue")]
