"""training.data.prepare, with reader, encode and stores: what is cached is what training needs, each computed once.

On the embedded model and small pictures, 64 pixels wide.
"""

import copy
import dataclasses
import json
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

from runtime.control.conditions import DEPTH_MODEL_VARIABLE, preprocess
from runtime.errors import InputError
from runtime.loading.load import load_model
from runtime.text.encode import encode_prompts
from tests.support.depth_model import save_depth_model
from tests.support.tolerances import assert_close
from training.config import TrainConfig
from training.data import encode, workers
from training.data.cache import Store
from training.data.crops import make_crop
from training.data.encode import Encoder
from training.data.prepare import prepare
from training.data.reader import Reader, decode_png
from training.data.sample import Sample
from training.data.sources import open_source
from training.data.stores import CACHE_DTYPES, Stores, row_key, text_key
from training.embedded.scenes import write_scenes


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Of pictures this small a second thread does less than waiting for it takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return load_model("embedded")


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def folder(tmp_path):
    """Four scenes of 64 x 64 pixels, captioned, the last one cut to 64 x 40."""
    made = tmp_path / "scenes"
    write_scenes(made, 4)
    for path in sorted(made.glob("*.png")):
        Image.open(path).resize((64, 64)).save(path)
    Image.open(path).crop((0, 10, 64, 50)).save(path)
    return made


@pytest.fixture
def config(folder, tmp_path):
    (tmp_path / "out").mkdir()
    options = {"resolution": 64, "bucket_step": 16, "workers": 0, "max_skipped": 0.0}
    return TrainConfig(data=str(folder), out=str(tmp_path / "out"), **options)


@pytest.fixture
def run(model, accelerator, config):
    """Prepares with some options changed: the entries and the stores, freshly opened."""

    def prepared(source=None, model=model, **options):
        changed = dataclasses.replace(config, **options)
        cache = Path(changed.out) / "cache"
        stores = Stores.open(cache, changed, model)
        return prepare(source or open_source(changed), stores, cache, model, changed, accelerator), stores

    return prepared


@pytest.fixture
def refused(run):
    def message(*arguments, **options):
        with pytest.raises(InputError) as caught:
            run(*arguments, **options)
        return str(caught.value)

    return message


@pytest.fixture
def encoded(model):
    """How many images and prompts went through the model since."""
    count = Counter()
    watched = {"images": model.vae.encoder, "prompts": model.text_encoders[0]}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: count.update({name: len((*args, *kwargs.values())[0])}),
            with_kwargs=True,
        )
        for name, module in watched.items()
    ]
    yield count
    for hook in hooks:
        hook.remove()


def crops_of(entries, folder, config):
    """Every entry's crops as pictures: (key of the row, the crop, the picture)."""
    for entry in entries:
        image = Image.open(folder / entry.name).convert("RGB")
        for variant in range(config.crops):
            crop = make_crop((image.height, image.width), entry.bucket, entry.key, variant, config.flip)
            yield row_key(entry.key, variant), crop, crop.apply(image)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_latents_are_the_vaes_of_the_crop_rounded_to_the_caches_dtype(dtype, run, model, folder, config):
    config = dataclasses.replace(config, crops=2, flip=True, cache_dtype=dtype)
    entries, stores = run(crops=2, flip=True, cache_dtype=dtype)
    assert [e.bucket for e in entries] == [(64, 64)] * 3 + [(48, 80)] and len(stores.latents) == 8
    for key, crop, picture in crops_of(entries, folder, config):
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.inference_mode():
            expected = model.vae.encode(pixels).latent_dist
        row = stores.latents.get(key)
        assert row["mean"].dtype == row["std"].dtype == CACHE_DTYPES[dtype]
        for name in ("mean", "std"):
            rounded = getattr(expected, name)[0].to(CACHE_DTYPES[dtype])
            kind = {"fp32": "unet"}.get(dtype, "op")  # in a batch sums are taken in another order
            assert_close(name, row[name], rounded, kind)
        assert tuple(row["ids"].tolist()) == crop.time_ids


def test_text_is_the_encoders_of_every_caption_and_of_none(run, model):
    entries, stores = run(cache_dtype="fp32")
    captions = {"", *(entry.caption for entry in entries)}
    assert len(stores.text) == len(captions) == 5
    for caption in captions:
        with torch.inference_mode():
            states, pooled = encode_prompts(model, [caption])
        row = stores.text.get(text_key(caption))
        assert_close("states", row["states"], states[0], "unet")
        assert_close("pooled", row["pooled"], pooled[0], "unet")


@pytest.mark.parametrize("condition", ["canny", "color"])
def test_conditions_are_computed_from_the_crop(condition, run, folder, config):
    config = dataclasses.replace(config, crops=2, flip=True)
    entries, stores = run(crops=2, flip=True, condition=condition)
    for key, _, picture in crops_of(entries, folder, config):
        expected = np.atleast_3d(np.asarray(preprocess(condition, picture)))
        found = decode_png(stores.conditions.get(key))[0].permute(1, 2, 0)
        assert np.array_equal((found * 255).round().byte().numpy(), expected)


@pytest.fixture
def depth_models(tmp_path):
    """Two folders of depth models with other weights."""
    return [save_depth_model(tmp_path / f"depth-{seed}", seed) for seed in range(2)]


def test_depth_of_another_model_is_not_used(depth_models, run, monkeypatch):
    def stored(model):
        monkeypatch.setenv(DEPTH_MODEL_VARIABLE, str(model)) if model else monkeypatch.delenv(
            DEPTH_MODEL_VARIABLE
        )
        try:
            entries, stores = run(condition="depth")
        except InputError as error:
            if "needs another package" in str(error):
                pytest.skip(str(error))
            raise
        return [bytes(stores.conditions.get(row_key(e.key, 0))["png"].numpy()) for e in entries]

    first = stored(depth_models[0])
    assert stored(None) == first  # all is there: a machine without the model can train on it
    assert stored(depth_models[1]) != first
    assert stored(depth_models[0]) == first


@pytest.fixture
def beside(folder, tmp_path):
    """A folder of pictures for the images, made by a function of each one's number and size."""

    def write(make, name="beside"):
        other = tmp_path / name
        other.mkdir()
        for number, path in enumerate(sorted(folder.glob("*.png"))):
            with Image.open(path) as image:
                make(number, image.size).save(other / path.name)
        return str(other)

    return write


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
@pytest.mark.parametrize("factor", [1, 2])
def test_ready_conditions_are_cut_as_their_images(mode, channels, factor, beside, run, folder, config):
    def noise(number, size):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        return Image.fromarray(pixels).convert(mode).resize((size[0] * factor, size[1] * factor))

    config = dataclasses.replace(config, crops=2, flip=True)
    edges = beside(noise)
    entries, stores = run(condition_from=edges, crops=2, flip=True)
    for (key, crop, _), entry in zip(crops_of(entries, folder, config), np.repeat(entries, 2), strict=True):
        expected = np.atleast_3d(np.asarray(crop.apply(Image.open(Path(edges) / entry.name))))
        found = decode_png(stores.conditions.get(key))[0].permute(1, 2, 0)
        assert found.shape[-1] == channels
        assert np.array_equal((found * 255).round().byte().numpy(), expected)


def test_masks_are_cut_as_their_images_and_stay_soft(beside, run, config):
    def half(_, size):
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.paste(51, (0, 0, 8, size[1]))
        return mask

    entries, stores = run(mask_from=beside(half), crops=2, flip=True)
    left = decode_png(stores.masks.get(row_key(entries[0].key, 0)))
    right = decode_png(stores.masks.get(row_key(entries[0].key, 1)))
    assert left.shape == (1, 1, 64, 64) and left.unique().tolist() == pytest.approx([0, 0.2, 1])
    assert (
        left[..., :8].mean() == pytest.approx(0.2)
        and left[..., 8:32].mean() == 1
        and left[..., 32:].max() == 0
    )
    assert torch.equal(right, left.flip(3))


def labels_in(stores, entry):
    return decode_png(stores.masks.get(row_key(entry.key, 0))).unique().tolist()


def test_segmentation_keeps_a_palettes_indices_and_not_its_colours(beside, run):
    def painted(number, size):
        image = Image.new("P", size, 3)
        image.putpalette([0, 0, 0, 9, 9, 9, 250, 0, 0, 9, 9, 9])  # 1 and 3 look the same
        image.paste(1, (0, 0, size[0] // 2, size[1]))
        return image

    entries, stores = run(mask_from=beside(painted), mask_kind="segmentation")
    assert [labels_in(stores, entry) for entry in entries] == [[1, 3]] * 4


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (lambda p: Image.fromarray((p * 255).astype(np.uint8)), [0, 255]),
        (lambda p: Image.fromarray((p * 700).astype(np.uint16)), [0, 700]),
        (lambda p: Image.fromarray(p.astype(bool)), [0, 1]),
    ],
    ids=["8 bits", "16 bits", "1 bit"],
)
def test_labels_of_any_depth_are_kept_as_numbers(make, labels, beside, run):
    def picture(_, size):
        return make(np.arange(size[0]) // (size[0] // 2) * np.ones((size[1], 1), int))

    entries, stores = run(mask_from=beside(picture), mask_kind="segmentation")
    assert [labels_in(stores, entry) for entry in entries] == [labels] * 4


def test_entries_are_the_samples_in_the_sources_order(run, folder):
    entries, _ = run()
    assert [e.name for e in entries] == [f"{i:06d}.png" for i in range(4)]
    assert [e.caption for e in entries] == [(folder / f"{i:06d}.txt").read_text().strip() for i in range(4)]


class Unreadable:
    unused = ()
    """A source that must not be read."""

    def __init__(self, like):
        self.fingerprint = like.fingerprint

    def read(self, part=0, parts=1):
        raise AssertionError("was read")


def test_a_second_pass_reads_no_sample_and_computes_nothing(run, config, encoded):
    entries, _ = run()
    encoded.clear()
    again, _ = run(Unreadable(open_source(config)))
    again_cache_only, _ = run(Unreadable(open_source(config)), require_cache=True)
    assert again == again_cache_only == entries and encoded == {}


def test_of_a_source_that_has_grown_only_the_new_image_is_encoded(run, folder, encoded):
    before, _ = run()
    encoded.clear()
    write_scenes(folder.parent / "more", 6)
    for ending in ("png", "txt"):
        (folder.parent / "more" / f"000005.{ending}").rename(folder / f"new.{ending}")
    after, stores = run()
    assert encoded == {"images": 1, "prompts": 1}
    assert after[:4] == before and after[4].name == "new.png" and len(stores.latents) == 5


def test_of_a_new_caption_only_the_text_is_encoded(run, folder, encoded):
    run()
    encoded.clear()
    (folder / "000001.txt").write_text("a red square at night")
    entries, stores = run()
    assert encoded == {"prompts": 1} and entries[1].caption == "a red square at night"
    assert text_key("a red square at night") in stores.text


def test_another_condition_encodes_no_image(run, encoded):
    run()
    encoded.clear()
    _, stores = run(condition="sketch")
    assert encoded == {} and len(stores.conditions) == 4


def test_an_image_that_is_there_twice_is_encoded_once(run, folder, encoded):
    (folder / "twin.png").write_bytes((folder / "000000.png").read_bytes())
    (folder / "twin.txt").write_text("another caption")
    entries, _ = run()
    assert encoded["images"] == 4 and len(entries) == 5
    assert entries[4].key == entries[0].key and entries[4].caption != entries[0].caption


@pytest.mark.parametrize("kind", ["latents", "text", "conditions"])
def test_a_damaged_shard_is_made_again_and_nothing_else(kind, run, encoded, config):
    entries, stores = run()
    before = {row_key(e.key, 0): stores.latents.get(row_key(e.key, 0)) for e in entries}
    (shard,) = getattr(stores, kind).folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-9])
    encoded.clear()
    again, stores = run()
    assert again == entries and getattr(stores, kind).discarded == 1
    assert encoded == {"latents": {"images": 4}, "text": {"prompts": 5}, "conditions": {}}[kind]
    assert stores.lacking(entries, config.crops) == []
    assert all(torch.equal(before[key]["mean"], stores.latents.get(key)["mean"]) for key in before)


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"name": "a"}]'])
def test_a_torn_list_of_samples_is_made_again(text, run, config, encoded):
    entries, _ = run()
    (index,) = (Path(config.out) / "cache").glob("index-*.json")
    index.write_text(text)
    encoded.clear()
    assert run()[0] == entries and encoded == {}
    assert len(json.loads(index.read_text())) == 4


@pytest.fixture
def other_vae(model):
    """The model with the last bit of one weight of its VAE changed."""
    vae = copy.deepcopy(model.vae)
    with torch.no_grad():
        weight = vae.encoder.conv_in.weight[0, 0, 0, :1]
        weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))
    return dataclasses.replace(model, vae=vae)


def test_latents_of_another_vae_are_not_used(run, other_vae, encoded):
    _, first = run()
    encoded.clear()
    _, second = run(model=other_vae)
    assert second.latents.folder != first.latents.folder and len(second.latents) == 4
    assert encoded == {}  # neither the text again, nor anything by the first VAE


def test_a_cache_that_is_required_and_empty_lacks_the_list_of_samples(refused, config):
    assert refused(require_cache=True) == f"cache {Path(config.out) / 'cache'}: it lacks the list of samples"


def test_a_cache_that_is_required_is_told_by_what_it_was_made_with(run, refused, other_vae, model):
    _, stores = run()
    said = refused(model=other_vae, require_cache=True)
    vaes = [
        Stores.open(stores.latents.folder.parent, TrainConfig(), m).latents.settings["vae"]
        for m in (model, other_vae)
    ]
    assert (
        f"it lacks the list of samples; it has {stores.latents.folder.name}: vae '{vaes[0]}', now '{vaes[1]}'"
        in said
    )


def test_a_cache_that_is_required_says_how_much_it_lacks_of_what(run, refused, encoded):
    _, stores = run()
    for store in (stores.latents, stores.text):
        for shard in store.folder.glob("*.safetensors"):
            shard.unlink()
    encoded.clear()
    assert refused(require_cache=True).endswith("cache: it lacks 4 latents, 5 text")
    assert encoded == {}


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-500]), "truncated"),
        (lambda p: p.write_bytes(b""), "image: none"),
        (lambda p: p.write_bytes(b"a text"), "image: the image is not an image in a known format"),
        (lambda p: Image.new("L", (64, 8)).save(p), "image: 64 x 8 px; expected sides of 16 or more"),
        (lambda p: Image.new("L", (20_000, 10_000)).save(p), "too many pixels"),
        (lambda p: p.with_suffix(".txt").write_text(" \n"), "no caption"),
        (lambda p: p.with_suffix(".txt").unlink(), "no caption"),
    ],
    ids=["truncated", "empty", "a text", "tiny", "huge", "blank caption", "no caption"],
)
def test_a_sample_that_cannot_be_used_is_skipped_and_listed(harm, why, run, folder, config, capsys):
    harm(folder / "000001.png")
    entries, _ = run(max_skipped=0.25)
    assert [e.name for e in entries] == ["000000.png", "000002.png", "000003.png"]
    listed = (Path(config.out) / "skipped.txt").read_text()
    assert listed.startswith("000001.png: ") and why in listed and listed.count("\n") == 1
    assert "skipped 1 of 4 samples, listed in" in capsys.readouterr().out


def test_more_skipped_samples_than_allowed_stop_the_run_with_the_first_reason(refused, folder, config):
    for i in (1, 3):
        (folder / f"{i:06d}.png").write_bytes(b"")
    listed = Path(config.out) / "skipped.txt"
    assert refused(max_skipped=0.49) == (
        f"data {folder}: 2 of 4 samples cannot be used, more than max_skipped 0.49; they are listed in {listed}; "
        "the first: 000001.png: image: none"
    )
    assert [line.partition(":")[0] for line in listed.read_text().splitlines()] == [
        "000001.png",
        "000003.png",
    ]


def test_what_was_computed_before_a_run_was_stopped_for_skipped_samples_is_kept(
    run, refused, folder, encoded
):
    (folder / "000001.png").write_bytes(b"")
    refused()
    encoded.clear()
    run(max_skipped=0.5)
    assert encoded == {}


def test_the_list_of_skipped_samples_goes_when_they_are_mended(run, folder, config):
    good = (folder / "000001.png").read_bytes()
    (folder / "000001.png").write_bytes(b"")
    run(max_skipped=0.5)
    (folder / "000001.png").write_bytes(good)
    assert len(run()[0]) == 4 and not (Path(config.out) / "skipped.txt").exists()


def test_a_source_of_which_nothing_can_be_used_is_refused(refused, folder):
    for image in folder.glob("*.png"):
        image.write_bytes(b"")
    said = refused(max_skipped=1.0)
    assert said == f"data {folder}: none of 4 samples can be used; the first: 000000.png: image: none"


def test_captions_that_are_no_text_are_none(run, folder):
    captions = [None, 5, ["a"], "a scene"]
    lines = [json.dumps({"file_name": f"{i:06d}.png", "text": caption}) for i, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    entries, _ = run(max_skipped=0.8)
    assert [e.name for e in entries] == ["000003.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_faint_mask_is_warned_of_in_the_training_process(workers, beside, run, capfd):
    greys = np.random.default_rng(0).integers(0, 9, (400, 400), np.uint8)
    masks = beside(lambda number, size: Image.fromarray(greys[: size[1], : size[0]]))
    with pytest.warns(UserWarning, match="^mask: its brightest value is 8 of 255, so the control is faint"):
        run(mask_from=masks, workers=workers)
    assert "UserWarning" not in capfd.readouterr().err


def test_a_librarys_warning_of_another_kind_is_not_lost(run, monkeypatch):
    item = Reader._item

    def noisy(self, sample):
        warnings.warn("invalid value encountered in cast", RuntimeWarning, stacklevel=1)
        return item(self, sample)

    monkeypatch.setattr(Reader, "_item", noisy)
    with pytest.warns(RuntimeWarning, match="invalid value encountered in cast"):
        run(workers=0)


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint8, 1), (np.uint16, 1), (np.uint16, 255)])
def test_conditions_that_are_nearly_black_are_warned_of(dtype, largest, beside, run):
    edges = beside(lambda number, size: Image.fromarray(np.eye(*size[::-1], dtype=dtype) * dtype(largest)))
    with pytest.warns(UserWarning, match="condition: (nearly black|black in 8 bits), its brightest value is"):
        run(condition_from=edges)


def test_a_condition_of_another_shape_than_its_image_is_skipped(beside, run, config):
    edges = beside(lambda number, size: Image.new("L", (size[0], size[1] + (32 if number == 2 else 0))))
    entries, _ = run(condition_from=edges, max_skipped=0.25)
    assert [e.name for e in entries] == ["000000.png", "000001.png", "000003.png"]
    listed = (Path(config.out) / "skipped.txt").read_text()
    assert listed == "000002.png: condition: 64 x 96 px, the image has 64 x 64\n"


@pytest.mark.parametrize(
    ("kind", "content", "why"),
    [
        ("mask", None, "mask: none"),
        ("mask", b"a text", "mask: the image is not an image in a known format"),
        ("segmentation", None, "mask: none"),
        ("segmentation", b"a text", "mask: the image is not an image in a known format"),
        ("segmentation", "truncated", "mask: the image is damaged or truncated"),
        ("segmentation", "colours", "mask: a picture of mode RGB; expected labels in one channel"),
        ("segmentation", "numbers", "mask: labels from 7 to 70000; expected 0 to 65535"),
    ],
)
def test_a_mask_that_cannot_be_used_is_skipped(kind, content, why, beside, run, config):
    labels = np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8)
    masks = Path(beside(lambda number, size: Image.fromarray(labels[: size[1], : size[0]])))
    bad = masks / "000001.png"
    made = {None: b"", "truncated": bad.read_bytes()[:-1000], "colours": None}.get(content, content)
    if content == "numbers":
        numbers = np.full((64, 64), 7, np.int32)
        numbers[0] = 70000
        Image.fromarray(numbers).save(bad, format="TIFF")
    elif made is None:
        Image.new("RGB", (64, 64)).save(bad)
    else:
        bad.write_bytes(made)
    entries, _ = run(mask_from=str(masks), mask_kind=kind, max_skipped=0.25)
    assert [e.name for e in entries] == ["000000.png", "000002.png", "000003.png"]
    assert (Path(config.out) / "skipped.txt").read_text().startswith(f"000001.png: {why}")


def test_latents_that_are_not_finite_name_the_vae(refused, model):
    vae = copy.deepcopy(model.vae)
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(float("inf"))
    assert "the VAE's latents are not finite in torch.float32" in refused(
        model=dataclasses.replace(model, vae=vae)
    )


def test_latents_that_the_caches_type_cannot_hold_name_its_option(refused, model):
    vae = copy.deepcopy(model.vae)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e6)
    said = refused(model=dataclasses.replace(model, vae=vae))
    assert "cache_dtype fp16: the latents reach " in said and "use --cache-dtype bf16 or fp32" in said


def test_files_that_nothing_reads_are_counted_and_listed(run, folder, config, capsys):
    (folder / "notes.md").write_text("a")
    run()
    listed = Path(config.out) / "unused.txt"
    said = f"1 files or names are not used, listed in {listed}; the first: notes.md: no image"
    assert said in capsys.readouterr().out and listed.read_text().startswith("notes.md: ")
    (folder / "notes.md").unlink()
    run()
    assert not listed.exists()


def test_images_of_one_bucket_go_through_the_vae_together_up_to_a_limit(run, model, monkeypatch):
    sizes = []
    hook = model.vae.encoder.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    monkeypatch.setattr("training.data.encode.ENCODE_PIXELS", 2 * 64 * 64)
    run()
    hook.remove()
    assert sorted(sizes) == [(1, 3, 48, 80), (1, 3, 64, 64), (2, 3, 64, 64)]


def test_what_is_encoded_together_is_kept_together(run, tmp_path, monkeypatch):
    """Or a pass that was killed would encode the rest in other company, where its last bits are others."""
    monkeypatch.setattr(encode, "ENCODE_PIXELS", 2 * 64 * 64)
    monkeypatch.setattr(encode, "PROMPTS", 2)
    groups, images, prompts, flush = [], Encoder._encode_images, encode.encode_prompts, Store.flush

    def seen_images(encoder, variants):
        groups.append([v["key"] for v in variants])
        images(encoder, variants)

    def seen_prompts(model, captions, reading):
        groups.append(captions)
        return prompts(model, captions, reading)

    def killed(store):
        flush(store)
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "_encode_images", seen_images)
    monkeypatch.setattr(encode, "encode_prompts", seen_prompts)
    run()
    whole = groups.copy()
    groups.clear()
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("training.data.cache.SHARD_BYTES", 1)
    monkeypatch.setattr(Store, "flush", killed)
    for _ in range(3):  # each time after one more shard
        with pytest.raises(KeyboardInterrupt):
            run(out=str(tmp_path / "other"))
    monkeypatch.setattr(Store, "flush", flush)
    run(out=str(tmp_path / "other"))
    assert len(whole) > 4 and all(group in whole for group in groups)


@pytest.mark.parametrize("which", [0, 1])
def test_text_of_another_tokenizer_is_not_used(which, run, model, encoded):
    run()
    tokenizers = [copy.deepcopy(tokenizer) for tokenizer in model.tokenizers]
    again = dataclasses.replace(model, tokenizers=tuple(tokenizers))
    for tokenizer in tokenizers:
        tokenizer(["a text"], padding="max_length")  # its Rust half notes how it was called last
    encoded.clear()
    run(model=again)
    assert encoded == {}
    tokenizers[which].pad_token = tokenizers[which].convert_ids_to_tokens(5)
    run(model=again)
    assert encoded == {"prompts": 5}


@pytest.mark.parametrize("count", [0, 2])
def test_processes_and_their_workers_share_out_the_samples(count, model, config):
    stores = Stores.open(Path(config.out) / "cache", config, model)

    def numbers(part, parts):
        reader = Reader(open_source(config), stores, config, part, parts)
        return [item["number"] for item in DataLoader(reader, batch_size=None, **workers.options(count))]

    assert (numbers(0, 1), numbers(0, 2), numbers(1, 2)) == ([0, 1, 2, 3], [0, 2], [1, 3])


class Broken:
    fingerprint = "broken"

    def __init__(self, image):
        self.image = image

    def read(self, part=0, parts=1):
        yield part, Sample("first", self.image, "a scene")
        raise InputError("data: broke off")


@pytest.mark.parametrize("count", [0, 1])
def test_a_source_that_breaks_off_is_one_line(count, refused, folder):
    source = Broken((folder / "000000.png").read_bytes())
    assert refused(source, workers=count) == "data: broke off"


def as_tars(folder):
    """Two tars: three samples and one."""
    for number, names in enumerate((["000000", "000001", "000002"], ["000003"])):
        with tarfile.open(folder.parent / f"shard-{number}.tar", "w") as tar:
            for name in names:
                tar.add(folder / f"{name}.png", f"{name}.png")
                tar.add(folder / f"{name}.txt", f"{name}.txt")
    return {"data": str(folder.parent / "shard-{0..1}.tar")}


def as_stream(folder):
    """Two parquet files, read as a stream."""
    made = folder.parent / "rows"
    made.mkdir()
    for number, names in enumerate((["000000", "000001", "000002"], ["000003"])):
        rows = {
            "image": [{"bytes": (folder / f"{name}.png").read_bytes(), "path": None} for name in names],
            "text": [(folder / f"{name}.txt").read_text().strip() for name in names],
        }
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        table.to_parquet(made / f"train-{number}.parquet")
    return {"data": f"hf:{made}", "streaming": True}


@pytest.mark.parametrize("source", [lambda folder: {}, as_tars, as_stream], ids=["folder", "tars", "stream"])
def test_workers_prepare_the_same_as_none(source, run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    options = source(folder)
    entries, ours = run(**options)
    others, theirs = run(workers=2, out=str(tmp_path / "other"), **options)
    assert others == entries and len(entries) == 4
    assert [len(store) for store in theirs.all()] == [len(store) for store in ours.all()] == [4, 5, 4]
    for entry in entries:
        picture, text = row_key(entry.key, 0), text_key(entry.caption)
        for kind, key in (("latents", picture), ("conditions", picture), ("text", text)):
            row, other = getattr(ours, kind).get(key), getattr(theirs, kind).get(key)
            assert all(torch.equal(row[name], other[name]) for name in row)
