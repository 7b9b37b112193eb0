"""runtime.control.profile: profiles of RGB alone, and transparency that is there."""

import warnings

import pytest
import torch
from PIL import Image, ImageCms

from runtime.control.profile import rgb_profile, warn_of_transparency

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_a_profile_is_of_rgb_or_none(tmp_path):
    image = Image.new("RGB", (4, 4))
    assert rgb_profile(image) is None and rgb_profile(torch.zeros(3, 4, 4)) is None
    image.save(tmp_path / "rgb.png", icc_profile=SRGB)
    assert rgb_profile(tmp_path / "rgb.png") == rgb_profile(str(tmp_path / "rgb.png")) == SRGB
    image.info["icc_profile"] = SRGB[:16] + b"CMYK" + SRGB[20:]
    assert rgb_profile(image) is None


@pytest.mark.parametrize(("alpha", "warned"), [(255, 0), (254, 1)])
def test_only_what_is_not_opaque_is_transparent(alpha, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_transparency(Image.new("RGBA", (4, 4), (9, 9, 9, alpha)), "image")
        warn_of_transparency(Image.new("RGB", (4, 4)), "image")
    assert len(caught) == warned
