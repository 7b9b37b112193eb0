"""runtime.serve.web.openai: asked by OpenAI's own client."""

import base64
import io
import json

import numpy as np
import openai
import pytest
from PIL import Image
from PIL.ImageCms import ImageCmsProfile, createProfile

from runtime.serve.web.openai import partial_steps
from tests.support.server import SMALL, pipe, png, running

OWN = {"steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve")) as client:
        yield client


@pytest.fixture
def images(server):
    made = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0)
    yield made.images
    made.close()


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def expected(**settings):
    options = {**SMALL, **settings}
    return pipe()(options.pop("prompt"), **options).images[0]


def test_generations(images):
    found = images.generate(model="localcontrol", prompt="a red star", n=2, size="64x64", extra_body=OWN)
    assert len(found.data) == 2 and found.size == "64x64" and found.output_format == "png"
    assert opened(found.data[0].b64_json).tobytes() == expected(images_per_prompt=2).tobytes()


def test_a_region_and_another_format(images):
    mask = base64.b64encode(png(Image.new("L", (64, 64), 255))).decode()
    regions = [{"prompt": "a blue circle", "mask": mask}]
    found = images.generate(
        prompt="a red star",
        output_format="webp",
        output_compression=50,
        extra_body={**OWN, "regions": regions},
    )
    assert opened(found.data[0].b64_json).format == "WEBP"


def test_generations_as_a_stream(images):
    options = {"size": "64x64", "stream": True, "partial_images": 2, "extra_body": {**OWN, "steps": 9}}
    found = list(images.generate(prompt="a red star", **options))
    kinds = [event.type for event in found]
    assert kinds[-1] == "image_generation.completed" and kinds.count("image_generation.partial_image") >= 1
    assert opened(found[0].b64_json).size == (64, 64) and found[0].partial_image_index == 0
    assert opened(found[-1].b64_json).tobytes() == expected(steps=9).tobytes()


def test_edits_draw_where_the_mask_is_transparent(images):
    """The left half is to be drawn: there it changes; on the right every pixel stays as it was."""
    photo = Image.effect_noise((72, 56), 50).convert("RGB")
    alpha = Image.new("L", photo.size, 255)
    alpha.paste(0, (0, 0, 32, 56))
    mask = photo.copy()
    mask.putalpha(alpha)
    found = images.edit(image=png(photo), mask=png(mask), prompt="a red star", extra_body=OWN)
    drawn, before = np.asarray(opened(found.data[0].b64_json)), np.asarray(photo)
    assert drawn.shape == before.shape
    assert (drawn[:, 32:] == before[:, 32:]).all() and (drawn[:, :32] != before[:, :32]).any()
    assert found.model_extra["localcontrol"]["pixels_changed_outside"] == 0
    own = images.edit(image=png(mask), prompt="a red star", extra_body=OWN)
    assert (np.asarray(opened(own.data[0].b64_json))[:, 32:] == before[:, 32:]).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_edits_pixels_keep_their_meaning_in_every_format(images, kind):
    photo, profile = Image.effect_noise((64, 64), 50).convert("RGB"), createProfile("sRGB")
    photo.info["icc_profile"] = ImageCmsProfile(profile).tobytes()
    mask = photo.copy()
    mask.putalpha(Image.linear_gradient("L").resize((64, 64)))
    found = images.edit(image=png(photo), mask=png(mask), prompt="a", output_format=kind, extra_body=OWN)
    drawn = opened(found.data[0].b64_json)
    assert drawn.format == kind.upper() and drawn.info["icc_profile"] == photo.info["icc_profile"]


def test_an_edit_without_a_mask_changes_the_whole(images):
    photo = Image.effect_noise((64, 64), 50).convert("RGB")
    found = images.edit(image=png(photo), prompt="a red star", extra_body=OWN)
    expected = pipe()("a red star", image=photo, strength=0.6, **OWN).images[0]
    assert opened(found.data[0].b64_json).tobytes() == expected.tobytes()


def test_an_edit_as_a_stream(images):
    photo = Image.effect_noise((64, 64), 50).convert("RGB")
    found = list(images.edit(image=png(photo), prompt="a", stream=True, extra_body=OWN))
    assert [event.type for event in found] == ["image_edit.completed"]


BAD = {
    "size": ({"size": "64by64"}, "size"),
    "a size": ({"size": "63x64"}, "size"),
    "n": ({"n": 0}, "n"),
    "many": ({"n": 5}, "n"),
    "an address": ({"response_format": "url"}, "response_format"),
    "quality": ({"quality": "hd"}, "quality"),
    "background": ({"background": "transparent"}, "background"),
    "style": ({"style": "vivid"}, "style"),
    "partial images": ({"partial_images": 2}, "partial_images"),
    "steps": ({"extra_body": {"steps": 1000}}, "steps"),
    "another field": ({"extra_body": {"cfg": 1}}, "cfg"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_done_is_said(images, name):
    options, field = BAD[name]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        images.generate(prompt="a", **options)
    assert caught.value.param == field and caught.value.type == "invalid_request_error"


def test_another_model_is_not_there(images):
    with pytest.raises(openai.NotFoundError, match="this server has"):
        images.generate(model="dall-e-3", prompt="a")


def test_bad_edits(images, server):
    photo, other = png(Image.new("RGB", (64, 64))), png(Image.new("RGBA", (32, 32)))
    for options, match in (
        ({"mask": other}, "mask: 32 x 32 px; expected the image's 64 x 64"),
        ({"mask": photo}, "mask: no pixel is transparent"),
        ({"extra_body": {"outside": "held"}}, "outside 'held': it follows from the mask"),
        ({"extra_body": {"input_fidelity": "high"}}, "input_fidelity: unknown field"),
    ):
        with pytest.raises(openai.UnprocessableEntityError, match=match):
            images.edit(image=photo, prompt="a", **options)
    assert server.error(415, "/v1/images/edits", {"prompt": "a"})["param"] == "Content-Type"
    broken = server.post("/v1/images/edits", b"x", Content_Type="multipart/form-data; boundary=b")
    assert broken[0] in (400, 422) and json.loads(broken[2])["error"]["message"]


def form(**parts):
    """A form's body, of boundary B; what is bytes is a file."""
    lines = []
    for name, value in parts.items():
        file = f'; filename="{name}.png"' if isinstance(value, bytes) else ""
        lines += [f'--B\r\nContent-Disposition: form-data; name="{name}"{file}\r\n'.encode()]
        lines += [value if file else value.encode()]
    return b"\r\n".join([*lines, b"--B--\r\n"])


def test_a_form_that_is_cut_off_is_not_drawn_without_its_mask(server):
    """Nor is one refused whose last boundary ends it without the two dashes."""
    photo = Image.new("RGB", (64, 64), "white")
    body = form(prompt="a red star", steps="3", image=png(photo), mask=png(Image.new("LA", (64, 64), 0)))
    kind = "Multipart/Form-Data; boundary=B"
    for whole in (body, body + b"an epilogue", body[:-4]):
        assert server.post("/v1/images/edits", whole, Content_Type=kind)[0] == 200
    for cut in (body[:-20], body[:-7], body[:30], b""):
        assert server.error(400, "/v1/images/edits", cut, Content_Type=kind)["param"] == "body"


def test_a_form_in_no_codec_of_text_is_refused(server):
    kind = "multipart/form-data; boundary=B; charset=undefined"
    error = server.error(415, "/v1/images/edits", form(prompt="a red star"), Content_Type=kind)
    assert error["param"] == "Content-Type"


def test_a_mask_is_refused_by_its_header_and_where_it_is_cut(images):
    photo, mask = png(Image.new("RGB", (64, 64))), png(Image.new("RGBA", (64, 64)))
    large = png(Image.new("LA", (5000, 10)))
    for given, match in ((large, "mask: 5000 x 10 px; expected at most"), (mask[:60], "mask: .* damaged")):
        with pytest.raises(openai.UnprocessableEntityError, match=match):
            images.edit(image=photo, mask=given, prompt="a")


def test_an_edit_takes_regions_too(images):
    photo = Image.effect_noise((64, 64), 50).convert("RGB")
    regions = json.dumps([{"prompt": "a heart"}])
    found = images.edit(image=png(photo), prompt="a", extra_body={**OWN, "regions": regions, "strength": 0.5})
    assert found.data and found.model_extra["localcontrol"]["region_steps"]
    with pytest.raises(openai.UnprocessableEntityError, match="regions: expected JSON"):
        images.edit(image=png(photo), prompt="a", extra_body={"regions": "["})


def test_an_error_on_the_way_is_an_event(images, server, monkeypatch):
    monkeypatch.setattr(
        server.service.engine, "_step", lambda group: {a.run: RuntimeError("x") for a in group}
    )
    with pytest.raises(openai.APIError, match="RuntimeError"):
        list(images.generate(prompt="a", stream=True, extra_body=OWN))


def test_previews_are_spread():
    assert partial_steps(0, 30) == [] and partial_steps(2, 30) == [10, 20] and partial_steps(3, 2) == [1, 2]
