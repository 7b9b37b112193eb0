"""training.data.rows: every sample in its turn, and everything random about it by its number in the run alone.

The cache holds made-up rows in which every value tells where it comes from.
"""

from collections import Counter
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.control.adapters import fit_channels
from training.config import TrainConfig
from training.data.cache import Store
from training.data.masks import random_mask
from training.data.rows import Part, Plan, Rows, make_loader
from training.data.stores import Entry, Stores, row_key, text_key

SQUARE, WIDE = (64, 64), (32, 96)
BUCKETS = [SQUARE] * 7 + [WIDE] * 4
CROPS = 2
TIMESTEPS, SCALING = 1000, 0.5

PLANS = st.builds(
    Plan,
    st.lists(st.sampled_from([SQUARE, WIDE, (96, 32)]), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(0, 2**40),
)


def epoch_of(plan, number):
    return [plan[step] for step in range(number * plan.per_epoch, (number + 1) * plan.per_epoch)]


@given(plan=PLANS, epoch=st.integers(0, 5))
def test_an_epoch_shows_every_row_and_fills_up_each_buckets_last_step(plan, epoch):
    shown = Counter(row for step in epoch_of(plan, epoch) for _, row in step)
    assert sorted(shown) == list(range(sum(len(rows) for rows in plan.rows)))
    for rows in plan.rows:
        times = [shown[row] for row in rows]
        assert max(times) - min(times) <= 1  # none is shown again before all others
        assert sum(times) - len(rows) < plan.samples or len(rows) < plan.samples


@given(buckets=st.lists(st.sampled_from([SQUARE, WIDE]), min_size=1, max_size=30), samples=st.integers(1, 8))
def test_the_samples_of_a_step_share_a_bucket(buckets, samples):
    plan = Plan(buckets, samples, seed=0)
    for step in epoch_of(plan, 0):
        assert len(step) == samples and len({buckets[row] for _, row in step}) == 1


@given(plan=PLANS, first=st.integers(0, 50))
def test_slots_are_numbered_through_the_run(plan, first):
    numbers = [number for step in range(first, first + 5) for number, _ in plan[step]]
    assert numbers == list(range(first * plan.samples, (first + 5) * plan.samples))


@given(plan=PLANS, order=st.permutations(range(12)))
def test_a_step_is_the_same_whenever_it_is_asked_for(plan, order):
    straight = [plan[step] for step in range(12)]
    assert {step: plan[step] for step in order} == dict(enumerate(straight))


def test_epochs_and_seeds_shuffle_rows_and_buckets_anew():
    plan = Plan(BUCKETS * 4, 4, seed=0)
    epochs = [epoch_of(plan, number) for number in range(4)] + [epoch_of(Plan(BUCKETS * 4, 4, seed=1), 0)]
    rows = [[row for step in epoch for _, row in step] for epoch in epochs]
    buckets = [[step[0][1] % len(BUCKETS) >= 7 for step in epoch] for epoch in epochs]
    assert len({tuple(r) for r in rows}) == 5 and len({tuple(b) for b in buckets}) > 2


@given(parts=st.integers(1, 4), accumulate=st.integers(1, 3), size=st.integers(1, 3), first=st.integers(0, 9))
@settings(max_examples=50)
def test_processes_and_batches_share_out_each_step(parts, accumulate, size, first):
    plan = Plan(BUCKETS, parts * accumulate * size, seed=0)
    batches = [list(islice(Part(plan, first, p, parts, accumulate), 3 * accumulate)) for p in range(parts)]
    for i in range(3):
        step = [batch for part in batches for batch in part[i * accumulate : (i + 1) * accumulate]]
        assert all(len(batch) == size for batch in step)
        assert sorted(slot for batch in step for slot in batch) == plan[first + i]


def picture(entry, crop, channels=1):
    """A condition that no other crop has."""
    noise = np.random.default_rng([entry, crop]).integers(0, 256, (*BUCKETS[entry], channels), np.uint8)
    return torch.from_numpy(cv2.imencode(".png", noise[..., ::-1])[1].reshape(-1))


def labels(entry):
    """Two segments, 3 and 700, side by side."""
    height, width = BUCKETS[entry]
    left = np.where(np.arange(width) < width // 2, 3, 700).astype(np.uint16)
    return torch.from_numpy(cv2.imencode(".png", np.tile(left, (height, 1)))[1].reshape(-1))


@pytest.fixture
def stores(tmp_path):
    """Latents are 10 * entry + crop, with no spread; text is the entry's number, -1 without a prompt."""
    made = Stores(*(Store(tmp_path, kind, {}) for kind in ("latents", "text", "conditions")), None)
    for entry, (height, width) in enumerate(BUCKETS):
        made.text.add(text_key(f"caption {entry}"), text(entry))
        for crop in range(CROPS):
            key = row_key(f"{entry}", crop)
            mean = torch.full((4, height // 8, width // 8), 10.0 * entry + crop, dtype=torch.float16)
            ids = torch.tensor([entry, crop, 3, 4, 5, 6])
            made.latents.add(key, {"mean": mean, "std": torch.zeros_like(mean), "ids": ids})
            made.conditions.add(key, {"png": picture(entry, crop)})
    made.text.add(text_key(""), text(-1))
    for store in made.all():
        store.flush()
    return made


def text(number):
    return {
        "states": torch.full((7, 5), number, dtype=torch.bfloat16),
        "pooled": torch.full((3,), float(number)),
    }


@pytest.fixture
def rows(stores):
    """Rows of the cache with some options."""

    def make(channels=1, **options):
        config = TrainConfig(**{"crops": CROPS, "workers": 0, "prompt_drop": 0.0, **options})
        entries = [Entry(f"{i}.png", f"{i}", f"caption {i}", bucket) for i, bucket in enumerate(BUCKETS)]
        return Rows(entries, stores, config, TIMESTEPS, SCALING, channels)

    return make


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def crop_of(sample):
    return int(sample["time_ids"][1])


def test_a_sample_is_what_its_entrys_crop_has_in_the_cache(rows):
    for number in range(20):
        sample = rows()[number, 8]
        crop = crop_of(sample)
        assert sample["latents"].unique().tolist() == [(80 + crop) * SCALING]
        assert sample["time_ids"].tolist() == [8, crop, 3, 4, 5, 6]
        assert torch.equal(
            sample["condition"], torch.from_numpy(cv2.imdecode(picture(8, crop).numpy(), 0))[None] / 255
        )
        assert sample["text"].unique().tolist() == sample["pooled"].unique().tolist() == [8]


def test_a_sample_has_the_shapes_and_dtypes_that_training_reads(rows):
    sample = rows()[0, 8]
    shapes = {name: tuple(value.shape) for name, value in sample.items()}
    assert shapes == {
        "latents": (4, 4, 12), "noise": (4, 4, 12), "condition": (1, 32, 96), "mask": (1, 32, 96), "text": (7, 5),
        "pooled": (3,), "time_ids": (6,), "t": (),
    }  # fmt: skip
    assert sample["t"].dtype == torch.int64 and sample["text"].dtype == torch.bfloat16
    assert all(
        sample[name].dtype == torch.float32 for name in ("latents", "noise", "condition", "mask", "time_ids")
    )


def test_a_sample_follows_from_its_slot_alone(rows):
    first = [rows()[number, 1] for number in range(10)]
    np.random.seed(1)
    torch.manual_seed(1)
    made = rows()
    assert all(equal(made[number, 1], first[number]) for number in reversed(range(10)))


@pytest.mark.parametrize("what", ["noise", "mask", "t"])
def test_another_slot_or_seed_draws_anew(what, rows):
    drawn = [rows(mask_full=0.0)[number, 1][what] for number in range(8)]
    drawn.append(rows(seed=1, mask_full=0.0)[0, 1][what])
    assert len({value.numpy().tobytes() for value in drawn}) == 9


def test_latents_are_drawn_from_the_vaes_distribution(rows, stores):
    mean, std = torch.rand(4, 8, 8), torch.rand(4, 8, 8) + 0.1
    for crop in range(CROPS):
        stores.latents.add(row_key("0", crop), {"mean": mean, "std": std, "ids": torch.zeros(6)})
    samples = [rows()[number, 0] for number in range(400)]
    eps = torch.stack([(s["latents"] / SCALING - mean) / std for s in samples])
    noise = torch.stack([s["noise"] for s in samples])
    for values in (eps, noise):
        assert values.mean().item() == pytest.approx(0, abs=0.02) and values.std().item() == pytest.approx(
            1, abs=0.02
        )
        assert values.mean(0).abs().max() < 5 / 400**0.5
    assert (eps * noise).mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_prompts_are_dropped_in_a_share_of_the_samples(share, rows):
    made = rows(prompt_drop=share)
    samples = [made[number, 2] for number in range(500)]
    dropped = [bool((s["text"] == -1).all() and (s["pooled"] == -1).all()) for s in samples]
    assert np.mean(dropped) == pytest.approx(share, abs=0.06 * (share % 1 > 0))
    assert all(dropped[i] or (s["text"] == 2).all() for i, s in enumerate(samples))


def test_every_crop_has_its_turn(rows):
    made = rows()
    assert np.mean([crop_of(made[number, 3]) for number in range(500)]) == pytest.approx(0.5, abs=0.06)
    assert {crop_of(rows(crops=1)[number, 3]) for number in range(50)} == {0}


@pytest.mark.parametrize(("sampling", "mean"), [("uniform", 0.5), ("cubic", 0.75)])
def test_timesteps_are_of_the_schedule_and_drawn_as_asked(sampling, mean, rows):
    made = rows(timesteps=sampling)
    drawn = np.array([int(made[number, 0]["t"]) for number in range(800)])
    assert drawn.min() >= 0 and drawn.max() < TIMESTEPS
    assert drawn.mean() / TIMESTEPS == pytest.approx(mean, abs=0.03)  # of 1 - u^3: 3/4


def test_features_take_the_whole_condition_and_a_random_mask(rows):
    drawn = [rows(control="features")[number, 8] for number in range(20)]
    assert 0 < np.mean([float(s["mask"].mean()) for s in drawn]) < 1
    assert all(float(s["condition"][s["mask"] == 0].sum()) > 0 for s in drawn if (s["mask"] == 0).any())


def test_input_blanks_the_condition_outside_of_the_same_masks(rows):
    for number in range(20):
        free, blanked = (rows(control=control, mask_soft=0.5)[number, 8] for control in ("features", "input"))
        assert torch.equal(blanked["mask"], free["mask"])
        assert torch.equal(blanked["condition"], free["condition"] * free["mask"])


def test_everywhere_has_no_mask(rows):
    sample, free = (rows(control=control)[0, 8] for control in ("everywhere", "features"))
    assert torch.equal(sample["mask"], torch.ones(1, 32, 96)) and torch.equal(
        sample["condition"], free["condition"]
    )


def test_random_masks_are_of_the_options(rows):
    options = {
        "mask_shapes": ("box",),
        "mask_count": 1,
        "mask_min_area": 0.5,
        "mask_soft": 0.0,
        "mask_full": 0.0,
    }
    masks = [rows(**options)[number, 8]["mask"] for number in range(20)]
    assert all(mask.mean() >= 0.5 and set(mask.unique().tolist()) <= {0, 1} for mask in masks)
    expected = random_mask(np.random.default_rng(7), 32, 96, TrainConfig(**options))
    _, mask = rows(**options).control(rows().entries[8], row_key("8", 0), np.random.default_rng(7))
    assert torch.equal(mask, expected[0])


@pytest.mark.parametrize(("stored", "read"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_the_condition_has_as_many_channels_as_the_adapter_reads(stored, read, rows, stores):
    for crop in range(CROPS):
        stores.conditions.add(row_key("0", crop), {"png": picture(0, crop, stored)})
    sample = rows(channels=read)[0, 0]
    noise = np.random.default_rng([0, crop_of(sample)]).integers(0, 256, (*SQUARE, stored), np.uint8)
    expected = fit_channels(torch.from_numpy(noise).permute(2, 0, 1)[None] / 255, read)[0]
    assert sample["condition"].shape == (read, *SQUARE)
    assert torch.allclose(sample["condition"], expected, atol=1e-6)


@pytest.fixture
def with_masks(stores, tmp_path):
    stores.masks = Store(tmp_path, "masks", {})
    return stores


def test_masks_of_the_data_are_taken_as_they_are(rows, with_masks):
    for crop in range(CROPS):
        with_masks.masks.add(row_key("0", crop), {"png": picture(0, 50 + crop)})
    sample = rows(mask_from="masks")[0, 0]
    expected = cv2.imdecode(picture(0, 50 + crop_of(sample)).numpy(), cv2.IMREAD_UNCHANGED)
    assert torch.equal(sample["mask"], torch.from_numpy(expected)[None] / 255)


def test_segments_of_the_data_become_masks_of_whole_labels(rows, with_masks):
    for crop in range(CROPS):
        with_masks.masks.add(row_key("8", crop), {"png": labels(8)})
    options = {"mask_from": "masks", "mask_kind": "segmentation", "mask_count": 1, "mask_full": 0.0}
    masks = [rows(**options)[number, 8]["mask"] for number in range(20)]
    assert {tuple(mask[0, 0].tolist()) for mask in masks} == {(1,) * 48 + (0,) * 48, (0,) * 48 + (1,) * 48}
    assert all(torch.equal(mask, mask[:, :1].expand_as(mask)) for mask in masks)


def batches(rows, samples, count, first=0, part=0, parts=1):
    plan = Plan(BUCKETS, samples, rows.config.seed)
    return list(islice(make_loader(rows, plan, first, part, parts, pin=False), count))


def joined(parts):
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_two_processes_take_the_samples_of_one_with_the_doubled_batch(rows):
    """Noise, masks, timesteps, crops and dropped prompts included."""
    options = {"prompt_drop": 0.5, "mask_soft": 0.5}
    one = batches(rows(**options, batch=4), 4, 6)
    two = [batches(rows(**options, batch=2), 4, 6, part=part, parts=2) for part in (0, 1)]
    assert all(len(batch["t"]) == 2 for part in two for batch in part)
    assert all(equal(whole, joined(parts)) for whole, *parts in zip(one, *two, strict=True))


@pytest.mark.parametrize("parts", [1, 2])
def test_batches_that_are_added_up_are_those_of_a_larger_one(parts, rows):
    one = batches(rows(), 4, 3)
    added = [
        batches(rows(accumulate=4 // parts), 4, 12 // parts, part=part, parts=parts) for part in range(parts)
    ]
    for i, whole in enumerate(one):
        step = [part[i * 4 // parts + k] for k in range(4 // parts) for part in added]
        assert equal(whole, joined(step))


@pytest.mark.parametrize("first", [1, 3, 5, 12])
def test_a_run_that_goes_on_takes_the_batches_it_would_have_taken(first, rows):
    whole = batches(rows(prompt_drop=0.5), 3, first + 4)
    later = batches(rows(prompt_drop=0.5), 3, 4, first=first)
    assert all(equal(one, other) for one, other in zip(whole[first:], later, strict=True))


def test_workers_take_the_batches_that_none_would_take(rows):
    alone, worked = (batches(rows(workers=workers, prompt_drop=0.5), 4, 5) for workers in (0, 2))
    assert all(equal(one, other) for one, other in zip(alone, worked, strict=True))


def test_a_run_of_another_seed_takes_other_batches(rows):
    first, second = (batches(rows(seed=seed), 4, 3) for seed in (0, 1))
    assert not any(
        torch.equal(one["noise"], other["noise"]) for one, other in zip(first, second, strict=True)
    )


def test_only_the_method_differs_between_presets(rows):
    """The same samples, latents, noise, timesteps, prompts and masks, whatever the mask gates."""
    for number in range(10):
        free, blanked, whole = (
            rows(control=c, prompt_drop=0.5)[number, 4] for c in ("features", "input", "everywhere")
        )
        for name in ("latents", "noise", "text", "time_ids", "t"):
            assert torch.equal(free[name], whole[name]) and torch.equal(free[name], blanked[name])
