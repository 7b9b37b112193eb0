"""What can be asked of a pipeline: known from an engine's manifest, or from the options, before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from runtime.control.adapters import check_name
from runtime.engines.manifest import NAME, Manifest, adapter_names
from runtime.engines.ports import SAMPLE, Profile, most_words
from runtime.errors import InputError
from runtime.sampling.request import Request


@dataclass(frozen=True)
class Capabilities:
    """What a pipeline can draw.

    adapters: the names that regions may ask for; None where they are not known yet. side: in pixels, of a picture whose
    size is not asked for; None where it is not known yet. profile: the sizes that the UNet was built for, None for any.
    whole_steps: what computes every step whole, so that nothing can be kept from step to step; None for nothing.
    fixed_text: whether the text encoders give the states of one layer only. encodes: whether a run can start from a
    picture. words: of how many regions the words can take the prompt's place, None for any number.
    """

    adapters: Collection[str] | None = None
    side: int | None = None
    profile: Profile | None = None
    whole_steps: str | None = None
    fixed_text: bool = False
    encodes: bool = True
    words: int | None = None

    def check(self, request: Request) -> None:
        """Raise InputError, naming the field, where the request asks for what cannot be drawn here."""
        for region in request.regions:
            if self.adapters is not None and region.condition is not None:
                check_name(region.adapter, self.adapters, f"{region.label}: adapter")
        if request.cache_interval > 1 and self.whole_steps is not None:
            raise InputError(
                f"cache_interval {request.cache_interval}: {self.whole_steps} computes every step whole; expected 1"
            )
        if request.clip_skip and self.fixed_text:
            raise InputError(
                f"clip_skip {request.clip_skip}: the compiled text encoders have one layer's states; expected 0"
            )
        if request.image is not None and not self.encodes:
            raise InputError(
                "image: the engines have no vae_encoder; rebuild them with it, or leave the image out"
            )
        if request.outside == "held" and request.image is not None and not request.regions:
            raise InputError(
                "outside held: no region, so nothing of the image may change; expected one with a mask"
            )
        if self.words is not None and len(request.words) > self.words:
            wanted = len(request.words)
            raise InputError(
                f"regions: {wanted} with words, and the engines take {self.words}; rebuild them with "
                f"--regional-prompts {wanted}"
            )
        if self.profile is None:
            return
        sides = zip(("height", "width"), request.size(self.side or 0), strict=True)
        self.profile.check({name: side for name, side in sides if side})
        for guided in set(request.guided_steps(request.run_steps)):
            self.profile.check({"rows": request.rows(guided)})


def of_manifest(manifest: Manifest, adapters: Collection[str] = ()) -> Capabilities:
    """Return what the engines of a folder can draw. adapters: more of them, which are loaded beside the engines.

    Raises InputError where the manifest does not say the model's size.
    """
    side = words = None
    if "unet" in manifest.engines:
        words = most_words(manifest.engines["unet"].inputs)
        sample = next(port for port in manifest.engines["unet"].inputs if port.name == SAMPLE)
        size = manifest.model.get("sample_size")
        if type(size) is not int:
            raise InputError(
                f"{NAME}: the model's sample_size is {size!r}; expected a whole number; {manifest.rebuild}"
            )
        side = size * sample.shape[2].divisor
    adapters = [*adapter_names(manifest), *adapters]
    fixed_text = "text_encoder" in manifest.engines
    encodes = "vae_decoder" not in manifest.engines or "vae_encoder" in manifest.engines
    return Capabilities(adapters, side, manifest.profile, "a compiled UNet", fixed_text, encodes, words)
