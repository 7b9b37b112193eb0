"""Decoding samples in the loader's workers: cut to their buckets, their conditions computed."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from runtime.control.conditions import preprocess
from runtime.control.image_files import decode
from runtime.control.images import ASPECT_TOLERANCE, load_image, to_tensor, warn_of_dark
from runtime.control.masks import read_mask
from runtime.errors import InputError
from runtime.sampling.fields import check_text
from training.config import TrainConfig
from training.data.cache import digest
from training.data.crops import Crop, bucket_sizes, make_crop, nearest_bucket
from training.data.sample import Sample, Source
from training.data.stores import Stores, row_key


class Reader(IterableDataset):
    """Decodes a process's part of a source in the loader's workers, as far as the stores lack it.

    Gives dicts: "broken" with what is wrong with the source; or number, unused, name and error; or number, unused,
    entry (the fields of Entry), and for each variant that lacks something: ids, pixels (3, H, W) uint8 or None,
    condition and mask as PNG or None. "warned": what else there is to say of the sample, for the training process to
    warn of: a worker's own warnings are pages, not lines, and one of each worker.
    """

    def __init__(self, source: Source, stores: Stores, config: TrainConfig, part: int, parts: int):
        self.source, self.stores, self.config, self.part, self.parts = source, stores, config, part, parts
        sizes = bucket_sizes(config.resolution, config.bucket_step, config.max_aspect)
        self.buckets = sizes if config.buckets else [(config.resolution,) * 2]

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for i, sample in self.source.read(self.part + self.parts * number, self.parts * workers):
                yield {"number": i, "unused": sample.unused, **self._item_or_error(sample)}
        except (
            InputError
        ) as error:  # of the source itself; raised in a worker it would come wrapped in a traceback
            yield {"broken": str(error)}

    def _item_or_error(self, sample: Sample) -> dict:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", UserWarning)
            try:
                item = self._item(sample)
            except InputError as error:
                item = {"name": sample.name, "error": str(error)}
        ours = [w for w in found if w.category is UserWarning]
        for other in (w for w in found if w not in ours):  # a library's: said as it would have been
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        return item | {"warned": [str(w.message) for w in ours]}

    def _item(self, sample: Sample) -> dict:
        if sample.error:
            raise InputError(sample.error)
        if not isinstance(sample.caption, str) or not sample.caption.strip():
            raise InputError("no caption")
        check_text(sample.caption, "caption")
        key = digest(sample.image, sample.condition or b"", sample.mask or b"")
        image = _decode(sample.image, "image")
        if min(image.size) < 16:
            raise InputError(f"image: {image.width} x {image.height} px; expected sides of 16 or more")
        size = image.height, image.width
        bucket = nearest_bucket(size, self.buckets)
        crops = [make_crop(size, bucket, key, v, self.config.flip) for v in range(self.config.crops)]
        variants = [self._variant(row_key(key, v), sample, image, crop) for v, crop in enumerate(crops)]
        return {"entry": (sample.name, key, sample.caption, bucket), "variants": [v for v in variants if v]}

    def _variant(self, key: str, sample: Sample, image: Image.Image, crop: Crop) -> dict | None:
        stores, made = self.stores, {"key": key, "ids": crop.time_ids}
        needed = {store.kind for store in stores.all() if store is not stores.text and key not in store}
        if not needed:
            return None
        pixels = crop.apply(image.convert("RGB"))
        if "latents" in needed:
            made["pixels"] = torch.from_numpy(np.moveaxis(np.asarray(pixels), 2, 0).copy())
        if "conditions" in needed:
            if sample.condition is None:
                made["condition"] = _png(preprocess(self.config.condition, pixels))
            else:
                ready = _decode(sample.condition, "condition")
                warn_of_dark(to_tensor(ready), "condition")
                made["condition"] = _png(crop.apply(_fits(ready, image, "condition")))
        if "masks" in needed:
            made["mask"] = _png(self._mask(sample.mask, image, crop))
        return made

    def _mask(self, data: bytes, image: Image.Image, crop: Crop) -> Image.Image:
        if self.config.mask_kind == "segmentation":
            labels = _open(data, "mask")
            if labels.mode not in ("1", "L", "P", "I", "I;16"):
                raise InputError(f"mask: a picture of mode {labels.mode}; expected labels in one channel")
            # a palette's indices are the labels, not its colours
            values = np.asarray(labels).astype(np.int32)
            if values.min() < 0 or values.max() > 65535:
                raise InputError(f"mask: labels from {values.min()} to {values.max()}; expected 0 to 65535")
            labels = _fits(Image.fromarray(values), image, "mask")
            return crop.apply(labels, Image.Resampling.NEAREST)
        mask = (read_mask(_open(data, "mask"))[0, 0] * 255).round().byte().numpy()
        return crop.apply(_fits(Image.fromarray(mask), image, "mask"), Image.Resampling.BOX)


def decode_png(row: dict[str, Tensor]) -> Tensor:
    """Return (1, C, H, W) of a stored PNG: float32 in [0, 1], labels of a segmentation as they are."""
    pixels = cv2.imdecode(row["png"].numpy(), cv2.IMREAD_UNCHANGED)
    pixels = pixels[..., ::-1] if pixels.ndim == 3 else pixels[..., None]  # OpenCV's colours are BGR
    tensor = torch.from_numpy(np.moveaxis(pixels, 2, 0).astype(np.float32))[None]
    return tensor / 255 if pixels.dtype == np.uint8 else tensor


def _png(image: Image.Image) -> Tensor:
    """Encoded, uint8; labels of a segmentation in 16 bits."""
    pixels = np.asarray(image)
    pixels = pixels.astype(np.uint16) if image.mode == "I" else pixels
    pixels = pixels[..., ::-1] if pixels.ndim == 3 else pixels  # OpenCV's colours are BGR
    return torch.from_numpy(cv2.imencode(".png", pixels)[1].reshape(-1))


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise InputError(f"{name}: none")
    return decode(io.BytesIO(data), name)


def _decode(data: bytes, name: str) -> Image.Image:
    return load_image(_open(data, name), name)


def _fits(picture: Image.Image, image: Image.Image, name: str) -> Image.Image:
    """Return the picture, if it has the image's aspect ratio."""
    if abs(picture.width * image.height / (picture.height * image.width) - 1) > ASPECT_TOLERANCE:
        raise InputError(
            f"{name}: {picture.width} x {picture.height} px, the image has {image.width} x {image.height}"
        )
    return picture
