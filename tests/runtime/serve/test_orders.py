"""runtime.serve.orders: bodies as requests, with what was given, and not more than there is memory for."""

import base64
import json

import pytest
from PIL import Image

from runtime import LocalControlPipeline
from runtime.serve.files import Files
from runtime.serve.limits import Limits
from runtime.serve.orders import Orders, parse
from runtime.serve.refusals import Refusal
from runtime.serve.schema import Generate
from tests.support.server import pipe, png
from tests.support.tiny import make_adapter, make_pipeline

PICTURE = base64.b64encode(png(Image.effect_noise((64, 64), 50))).decode()


def orders(folder, on=None, **limits):
    limits = Limits(**limits)
    return Orders((on or pipe()).capabilities, Files(folder, limits), limits)


def body(**fields):
    return parse(Generate, json.dumps({"prompt": "a", **fields}).encode())


def test_fields_reach_the_request(tmp_path):
    given = {"steps": 9, "guidance": 3, "guidance_range": [0, 0.5], "seed": 4, "height": 80, "width": 48, "images": 2,
             "scheduler": "euler_a", "negative_prompt": "b", "mask_resize": "nearest", "clip_skip": 1,
             "guidance_rescale": 0.5, "cache_interval": 2, "prompt_syntax": "a1111"}  # fmt: skip
    request = orders(tmp_path).order(body(**given)).request
    for name, value in given.items():
        found = getattr(request, {"images": "images_per_prompt"}.get(name, name))
        assert found == (tuple(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize(
    "raw", ['{"prompt": "a", "seed": 1, "seed": 2}', '{"prompt": "a", "regions": [{"scale": 1, "scale": 0}]}']
)
def test_a_field_that_is_given_twice_is_refused(raw):
    name = "seed" if "seed" in raw else "scale"
    with pytest.raises(Refusal, match=f"body: '{name}' is given twice") as error:
        parse(Generate, raw.encode())
    assert error.value.status == 422


def test_a_preset_gives_way_to_what_is_given(tmp_path):
    request = orders(tmp_path).order(body(preset="lcm4", steps=6)).request
    assert (request.scheduler, request.steps, request.guidance) == ("lcm", 6, 1.0)


def test_defaults_are_those_of_the_request(tmp_path):
    request = orders(tmp_path).order(body()).request
    assert (request.steps, request.guidance, request.scheduler, request.seed) == (30, 5.0, None, None)


def test_an_image_to_start_from_and_an_outside_that_is_held(tmp_path):
    order = orders(tmp_path).order(
        body(image=PICTURE, outside="held", regions=[{"prompt": "b", "mask": PICTURE}])
    )
    assert order.request.image.shape == (1, 1, 64, 64) and order.request.outside == "held"
    assert len(order.image) == 64 and order.regions[0]["mask"] == order.image


def test_a_condition_without_an_adapter_takes_the_first_there_is(tmp_path):
    other = LocalControlPipeline.from_diffusers(make_pipeline(), {"sketch": make_adapter()})
    made = orders(tmp_path, other)
    assert made.order(body(regions=[{"condition": PICTURE}])).request.regions[0].adapter == "sketch"
    assert orders(tmp_path).default_adapter == "canny"


def test_a_picture_that_is_named_twice_is_decoded_once(tmp_path):
    region = {"condition": PICTURE, "mask": PICTURE}
    one, many = (orders(tmp_path).order(body(regions=[region] * n)).bytes for n in (1, 8))
    assert many - one == 7 * 64 * 64 * 16  # what is packed of each; the picture itself counts once


def test_more_than_there_is_memory_for_is_refused(tmp_path):
    region = {"condition": PICTURE, "mask": PICTURE}
    with pytest.raises(Refusal, match="take more than 1 MiB") as caught:
        orders(tmp_path, queue_mib=1).order(body(regions=[region] * 16, height=128, width=128))
    assert caught.value.field == "regions"


def test_what_is_kept_of_a_job_has_its_pictures_as_files(tmp_path):
    made = orders(tmp_path)
    kept = made.kept(body(image=PICTURE, regions=[{"condition": PICTURE, "mask": PICTURE}]))
    name = kept.image
    assert len(name) == 64 and kept.regions[0].condition == kept.regions[0].mask == name
    assert [path.name for path in (tmp_path).glob("*/*")] == [name]
    assert made.kept(kept) == kept
    assert made.order(kept).image == name
