"""A list of pictures in a region: each picture of a call has its own, and is what it is alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import Region
from runtime.control.rows import in_halves, over_rows, per_picture, spread
from runtime.errors import InputError
from tests.support.together import LEFT, LIMIT, SHOWN, pipe

TOP = LEFT.mT.contiguous()
OTHER = SHOWN.flip(3)


def draw(prompt, *regions, **options):
    return pipe()(
        prompt, regions, **{"steps": 3, "height": 64, "width": 64, "output_type": "latent"} | options
    )


def assert_each(found, *alone):
    expected = torch.cat([result.latents for result in alone])
    assert found.latents.shape == expected.shape
    assert float((found.latents - expected).abs().max() / expected.abs().max()) < LIMIT
    assert not torch.equal(found.latents[0], found.latents[1])


KINDS = {
    "masks": (lambda i: {"condition": SHOWN, "mask": (LEFT, TOP)[i]}, {}),
    "conditions": (lambda i: {"condition": (SHOWN, OTHER)[i], "mask": LEFT}, {}),
    "both": (lambda i: {"condition": (SHOWN, OTHER)[i], "mask": (LEFT, TOP)[i]}, {}),
    "grey and colour": (
        lambda i: {"condition": (SHOWN, OTHER.expand(1, 3, -1, -1) * torch.rand(1, 3, 1, 1))[i]},
        {},
    ),
    "condition hidden": (
        lambda i: {"condition": SHOWN, "mask": (LEFT, TOP)[i], "mask_condition": True},
        {},
    ),
    "unguided share": (lambda i: {"condition": SHOWN, "mask": (LEFT, TOP)[i], "uncond_scale": 0.3}, {}),
    "words": (lambda i: {"prompt": "a green heart", "mask": (LEFT, TOP)[i]}, {}),
    "controlnet": (lambda i: {"condition": (SHOWN, OTHER)[i], "mask": (LEFT, TOP)[i], "adapter": "edges"}, {}),
    "controlnet, unguided share": (
        lambda i: {"condition": SHOWN, "mask": (LEFT, TOP)[i], "adapter": "edges", "uncond_scale": 0.3},
        {},
    ),
    "no guidance": (lambda i: {"condition": SHOWN, "mask": (LEFT, TOP)[i], "adapter": "edges"}, {"guidance": 1}),
    "held": (lambda i: {"condition": SHOWN, "mask": (LEFT, TOP)[i]}, {"outside": "held"}),
    "one mask empty": (
        lambda i: {"condition": SHOWN, "mask": (LEFT, 0 * TOP)[i]},
        {"outside": "held"},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*all zero")
@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_is_as_alone(kind):
    torch.manual_seed(0)
    make, options = KINDS[kind]
    singles = [make(0), make(1)]
    lists = {
        name: value if value is singles[1][name] else [value, singles[1][name]]
        for name, value in singles[0].items()
    }
    found = draw("a star", Region(**lists), seed=3, images_per_prompt=2, **options)
    alone = [draw("a star", Region(**one), seed=3 + i, **options) for i, one in enumerate(singles)]
    assert_each(found, *alone)


def test_one_for_each_prompt():
    """Two prompts of two pictures each: a list of two is the prompts', one of four the pictures'."""
    prompts, alone = ["a star", "a circle"], []
    for i in range(4):
        own = Region((SHOWN, OTHER)[i // 2], (LEFT, TOP, 1 - LEFT, 1 - TOP)[i])
        alone.append(draw(prompts[i // 2], own, seed=5 + i))
    region = Region([SHOWN, OTHER], [LEFT, TOP, 1 - LEFT, 1 - TOP])
    assert_each(draw(prompts, region, seed=5, images_per_prompt=2), *alone)


def test_regions_with_and_without_lists():
    regions = [Region(SHOWN, [LEFT, TOP]), Region(OTHER, 1 - LEFT), Region(mask=[TOP, LEFT], prompt="sand")]
    alone = [
        draw("a star", Region(SHOWN, (LEFT, TOP)[i]), regions[1], Region(mask=(TOP, LEFT)[i], prompt="sand"), seed=i)
        for i in range(2)
    ]  # fmt: skip
    assert_each(draw(["a star"] * 2, *regions, seed=0), *alone)


def test_a_batch_is_a_list():
    pictures = torch.cat([LEFT, TOP])
    drawn = [
        draw("a star", Region(SHOWN, mask), seed=3, images_per_prompt=2).latents
        for mask in (
            [LEFT, TOP],
            (LEFT[0, 0], TOP[0]),
            pictures,
            pictures.movedim(1, -1).numpy(),
            [Image.fromarray((m[0, 0].numpy() * 255).astype(np.uint8)) for m in (LEFT, TOP)],
        )
    ]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_a_held_outside_is_each_pictures_own():
    masks = [LEFT, TOP]
    plain = pipe()("a star", steps=2, seed=3, height=64, width=64, images_per_prompt=2, output_type="pt")
    found = pipe()(
        "a star",
        [Region(SHOWN, masks)],
        steps=2,
        seed=3,
        height=64,
        width=64,
        images_per_prompt=2,
        output_type="pt",
        outside="held",
    )
    for picture, mask, own in zip(found.images, masks, plain.images, strict=True):
        outside = (mask[0, 0] == 0).expand(3, -1, -1)
        assert torch.equal(picture[outside], own[outside])
        assert not torch.equal(picture[~outside], own[~outside])


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"mask": [LEFT] * 3}, "region 1 mask: a list of 3; expected one for each of 4 pictures, or of 2 prompts"),
        ({"condition": [SHOWN] * 3}, "region 1 condition: a list of 3; expected one for each of 4"),
        ({"mask": []}, "region 1 mask: an empty list; expected a picture"),
        ({"mask": [LEFT, None]}, "region 1 mask 2: a NoneType is not an image"),
        ({"mask": [LEFT, "none.png"]}, "region 1 mask 2: none.png does not exist"),
        ({"mask": [[0, 1], [1, 0]]}, "region 1 mask 1: a list is not an image"),
    ],
)  # fmt: skip
def test_bad_lists(region, message):
    with pytest.raises(InputError) as error:
        draw(["a", "b"], Region(**{"condition": SHOWN} | region), images_per_prompt=2)
    assert str(error.value).startswith(message)


def test_an_empty_mask_of_a_list_is_named():
    with pytest.warns(UserWarning, match="region 1 mask 2: all zero"):
        draw("a", Region(SHOWN, [LEFT, 0 * LEFT]), images_per_prompt=2, steps=1)


def test_a_file_has_no_lists():
    with pytest.raises(InputError, match="region 2: mask is a list; expected one picture"):
        Region.from_dict({"condition": "a.png", "mask": ["a.png", "b.png"]}, "region 2")


def test_rows():
    one, two = torch.randn(1, 3, 2, 2), torch.randn(2, 3, 2, 2)
    assert per_picture(one, 4) is one
    assert torch.equal(per_picture(two, 4), two[[0, 0, 1, 1]])
    assert (
        spread("a", 4) == list("aaaa")
        and spread("ab", 4) == list("aabb")
        and spread("abcd", 4) == list("abcd")
    )
    assert torch.equal(over_rows(one, 4), one[[0, 0, 0, 0]])
    assert torch.equal(over_rows(two, 4), two[[0, 1, 0, 1]])
    assert torch.equal(in_halves(two, 2 * two, 4, 2), torch.cat([two, 2 * two]))
    assert torch.equal(in_halves(one, two, 4, 2), torch.cat([one, one, two]))
    assert torch.equal(in_halves(one, two[:1], 3, 2), torch.cat([one, two[:1], two[:1]]))
