"""The drawn world: the same scene for a seed, held-out pairs held out, captions that say what is drawn."""

import numpy as np
import pytest

from training.embedded.world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene, Thing, render, sample_scene

SCENES = [sample_scene(seed) for seed in range(400)]


def test_it_is_as_large_as_promised():
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8
    assert len(BACKGROUNDS) >= 5
    assert {len(scene.things) for scene in SCENES} == {1, 2, 3}


def test_every_shape_and_colour_is_held_out_once():
    assert sorted(shape for shape, _ in HELD_OUT) == sorted(SHAPES)
    assert sorted(colour for _, colour in HELD_OUT) == sorted(COLOURS)


def test_training_scenes_show_every_other_pair_and_no_held_out_one():
    pairs = {(t.shape, t.colour) for scene in SCENES for t in scene.things}
    assert not pairs & HELD_OUT
    assert len(pairs) == len(SHAPES) * len(COLOURS) - len(HELD_OUT)


def test_held_out_scenes_have_one_held_out_pair():
    for seed in range(100):
        scene = sample_scene(seed, held_out=True)
        assert [(t.shape, t.colour) in HELD_OUT for t in scene.things] == [True] + [False] * (
            len(scene.things) - 1
        )


def test_a_seed_gives_the_same_scene_and_picture():
    assert sample_scene(5) == sample_scene(5)
    assert np.array_equal(render(sample_scene(5)), render(sample_scene(5)))
    assert sample_scene(5) != sample_scene(6)


def test_captions_name_every_object_and_the_background():
    things = tuple(
        Thing(s, c, 0.5, 0.5, 0.2, 0.0) for s, c in (("star", "orange"), ("ring", "blue"), ("heart", "red"))
    )
    assert Scene(things, "night", 0).caption == "an orange star, a blue ring and a red heart at night"
    assert Scene(things[:1], "meadow", 0).caption == "an orange star in a meadow"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_where_and_as_large_as_it_says(shape):
    size, thing = 128, Thing(shape, "red", 0.4, 0.6, 0.25, 0.2)
    difference = render(Scene((thing,), "snow", 3), size).astype(int) - render(Scene((), "snow", 3), size)
    rows, columns = np.nonzero(np.abs(difference).sum(2) > 30)
    reach = np.hypot(columns + 0.5 - 0.4 * size, rows + 0.5 - 0.6 * size)
    assert 0.8 < reach.max() / (0.25 * size) < 1.15
    assert len(rows) > 600
    assert abs(columns.mean() - 0.4 * size) < 4
    assert abs(rows.mean() - 0.6 * size) < 7  # a heart's middle is above its tip's


def test_a_ring_has_a_hole():
    thing = Thing("ring", "red", 0.5, 0.5, 0.3, 0.0)
    assert (
        np.abs(
            render(Scene((thing,), "snow", 3))[64, 64].astype(int) - render(Scene((), "snow", 3))[64, 64]
        ).max()
        < 2
    )


def test_edges_of_shapes_are_antialiased():
    image = render(Scene((Thing("circle", "blue", 0.5, 0.5, 0.3, 0.0),), "snow", 3)).astype(int)
    assert len(np.unique(image[64, :, 0])) > 6  # a hard edge has two values on a nearly flat row
