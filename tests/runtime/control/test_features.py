"""runtime.control.features: the control made of the features of the regions' adapters."""

import pytest
import torch

from kernels import ops
from runtime.control.features import Control, acting_steps, activity, strengths
from runtime.control.masks import mask_pyramid
from runtime.control.region import Region, pack
from runtime.errors import InputError
from tests.runtime.loading.test_adapter import CHANNELS, SIZE, make_adapter
from tests.support.tolerances import assert_close


def regions_of(*regions, size=SIZE):
    return pack(list(regions), *size)


def build(packed, adapters=None, steps=4, **options):
    options = {"device": "cpu", "dtype": torch.float32, "channels": CHANNELS} | options
    return Control.build(packed, adapters or {"canny": make_adapter()}, steps, **options)


def counted(adapter):
    calls = []
    adapter.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    return adapter, calls


def half_mask():
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., : SIZE[1] // 2 + 3] = 1
    return mask


def test_no_regions_is_no_control():
    assert build([]) is None


def test_levels_masks_and_gated_features_follow_the_definition():
    conditions = torch.rand(2, 1, 1, *SIZE)
    soft = torch.rand(1, 1, *SIZE)
    packed = regions_of(
        Region(conditions[0], mask=half_mask(), scale=0.7, levels=(1, 0.5, -2, 0)),
        Region(conditions[1], mask=soft, scale=-1.5),
        Region(conditions[0], scale=0.25),
    )
    adapter = make_adapter()
    control = build(packed, {"canny": adapter})
    maps = [adapter(item.condition) for item in packed]
    sizes = [f.shape[2:] for f in maps[0]]
    assert [tuple(s) for s in sizes] == [(3, 5), (3, 5), (2, 3), (2, 3)]
    masks = [mask_pyramid(half_mask(), sizes), mask_pyramid(soft, sizes), [torch.ones(1, 1, 1, 1)] * 4]
    scales = [[0.7, 0.35, -1.4, 0.0], [-1.5] * 4, [0.25] * 4]
    for level, (gated, (features, given, s)) in enumerate(zip(control.gated(0), control.at(0), strict=True)):
        expected = sum(scales[r][level] * masks[r][level] * maps[r][level] for r in range(3))
        assert_close(f"gated level {level}", gated, expected)
        for r in range(3):
            assert_close(f"features of level {level}, region {r}", features[r], maps[r][level])
        assert given[2] is None and given[0].dtype == s.dtype == torch.float32 and s.shape == (3,)


def test_features_are_gated_once_for_all_steps_of_the_same_strengths(monkeypatch):
    summed = []
    inject = ops.inject
    monkeypatch.setattr(ops, "inject", lambda *args, **options: summed.append(1) or inject(*args, **options))
    conditions = torch.rand(2, 1, 1, *SIZE)
    control = build(regions_of(Region(conditions[0]), Region(conditions[1], start=0.25, end=0.75)), steps=8)
    assert control.segments == [0, 0, 2, 2, 2, 2, 0, 0]
    for step in range(8):
        first, both = (control.features[0][r] for r in range(2))
        expected = first + both if control.segments[step] else first
        assert_close(f"step {step}", control.gated(step)[0], expected)
    assert len(summed) == 3 * len(CHANNELS)  # alone, both, alone


def test_gated_features_are_zero_where_the_mask_is_zero():
    mask = half_mask()
    control = build(regions_of(Region(torch.rand(1, 1, *SIZE), mask=mask)))
    for gated, size in zip(control.gated(0), [(3, 5), (3, 5), (2, 3), (2, 3)], strict=True):
        outside = mask_pyramid(mask, [size])[0] == 0
        assert outside.any() and (gated[outside.expand_as(gated)] == 0).all()
        assert (gated[~outside.expand_as(gated)] != 0).any()


def test_nearest_mode_reaches_the_masks():
    packed = regions_of(Region(torch.rand(1, 1, *SIZE), mask=torch.rand(1, 1, *SIZE)))
    area, nearest = (build(packed, mode=mode).at(0)[0][1][0] for mode in ("area", "nearest"))
    assert torch.equal(nearest, mask_pyramid(packed[0].mask, [(3, 5)], "nearest")[0])
    assert not torch.equal(area, nearest)


def test_each_adapter_runs_once_for_each_condition():
    shared, other = torch.rand(1, 1, *SIZE), torch.rand(1, 1, *SIZE)
    (canny, canny_calls), (depth, depth_calls) = counted(make_adapter()), counted(make_adapter(seed=1))
    packed = regions_of(
        Region(shared),
        Region(shared, mask=half_mask()),
        Region(other),
        Region(shared, adapter="depth"),
        Region(shared, mask=half_mask(), mask_condition=True),  # sees a blanked condition
    )
    control = build(packed, {"canny": canny, "depth": depth}, steps=30)
    assert len(canny_calls) == 3 and len(depth_calls) == 1
    for step in range(30):
        control.at(step)
        control.gated(step)
    assert len(canny_calls) == 3
    features = control.at(0)[0][0]
    assert features[0] is features[1] and not torch.equal(features[0], features[4])


@pytest.mark.parametrize(("given", "wanted"), [(1, 3), (3, 1), (1, 1), (3, 3)])
def test_condition_gets_the_channels_that_the_adapter_reads(given, wanted):
    condition = torch.rand(1, given, *SIZE)
    adapter, calls = counted(make_adapter(in_channels=wanted))
    build(regions_of(Region(condition)), {"canny": adapter})
    luminance = (
        0.299 * condition[:, :1] + 0.587 * condition[:, given // 2 :][:, :1] + 0.114 * condition[:, -1:]
    )
    expected = {(1, 3): condition.expand(1, 3, -1, -1), (3, 1): luminance}.get((given, wanted), condition)
    assert_close("condition", calls[0], expected)


def test_strengths_follow_start_end_and_levels():
    regions = [
        Region("x", scale=2.0, levels=(1, 0.5, 0, -1)),
        Region("x", scale=3.0, start=0.25, end=0.75),
        Region("x", start=0.5, end=0.5),
        Region("x", scale=-1.0, end=0.3),
    ]
    table = strengths(regions, 4)
    assert table.shape == (4, 4, 4) and table.dtype == torch.float32
    assert table[:, 0].tolist() == [[2, 0, 0, -1], [2, 3, 0, 0], [2, 3, 0, 0], [2, 0, 0, 0]]
    assert table[0, :, 0].tolist() == [2, 1, 0, -2]


@pytest.mark.parametrize("steps", [1, 3, 30, 49])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.4), (0.3, 1.0), (0.2, 0.6)])
def test_active_steps_are_those_of_diffusers_controlnet(steps, start, end):
    kept = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    one = [0.0] * steps  # where diffusers would have none: the step at the middle
    one[min(int((start + end) / 2 * steps), steps - 1)] = 1.0
    expected = kept if any(kept) else one
    assert strengths([Region("x", start=start, end=end)], steps)[:, 0, 0].tolist() == expected


def test_no_step_at_all_where_start_is_end():
    assert not strengths([Region("x", start=0.5, end=0.5)], 7).any()


def test_scales_are_views_of_one_table():
    control = build(regions_of(Region(torch.rand(1, 1, *SIZE))), steps=5)
    for step in range(5):
        for _, _, scales in control.at(step):
            assert scales.untyped_storage().data_ptr() == control.strengths.untyped_storage().data_ptr()


def test_features_are_in_the_models_dtype():
    adapters = {"canny": make_adapter().to(torch.bfloat16)}
    packed = regions_of(Region(torch.rand(1, 1, *SIZE), mask=half_mask()))
    control = build(packed, adapters, dtype=torch.bfloat16)
    features, masks, _ = control.at(0)[0]
    assert features[0].dtype == torch.bfloat16 and masks[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("region", "options", "message"),
    [
        ({"adapter": "depth"}, {}, "adapter 'depth' is unknown; expected one of: canny, pose"),
        (
            {},
            {"channels": (8, 12, 16, 32)},
            r"\(8, 12, 16, 16\) channels, the UNet expects \(8, 12, 16, 32\)",
        ),
        ({"adapter": "pose"}, {}, "adapter 'pose' reads 4 channels, expected 1 or 3"),
    ],
)
def test_adapter_that_does_not_fit_is_named(region, options, message):
    adapters = {"canny": make_adapter(), "pose": make_adapter(in_channels=4)}
    with pytest.raises(InputError, match=message):
        build(regions_of(Region(torch.rand(1, 1, *SIZE), **region)), adapters, **options)


def test_adapter_of_another_type_is_named():
    full = make_adapter(kind="full_adapter", stride=8)
    with pytest.raises(
        InputError, match="adapter 'canny': its type is full_adapter, expected full_adapter_xl"
    ):
        build(regions_of(Region(torch.rand(1, 1, *SIZE))), {"canny": full})


def test_keyframes_are_strengths_at_the_steps():
    region = Region(torch.rand(1, 1, *SIZE), scale="0:1.0,0.5:0.3", levels=(1, 2, 1, 1), start=0.2, end=0.9)
    found = strengths([region], 10)
    expected = [0, 0, 0.72, 0.58, 0.44, 0.3, 0.3, 0.3, 0.3, 0]
    assert torch.allclose(found[:, 0, 0], torch.tensor(expected))
    assert torch.allclose(found[:, 1, 0], 2 * torch.tensor(expected))
    assert build(regions_of(region), steps=10).segments == [0, 0, 2, 3, 4, 5, 5, 5, 5, 0]


def test_an_end_of_keyframes_is_what_is_left_of_the_strength():
    fading = Region(torch.rand(1, 1, *SIZE), scale=2.0, start=0.25, end=[(0.5, 1), (0.75, 0.5), (1, 0)])
    assert strengths([fading], 8)[:, 0, 0].tolist() == [0, 0, 2, 2, 2, 1.5, 1, 0.5]
    assert activity([fading], 8)[:, 0].tolist() == [0, 0, 1, 1, 1, 0.75, 0.5, 0.25]


def test_an_end_that_leaves_nothing_is_refused():
    for end in ("0:1,0.5:0", "0:0"):
        with pytest.raises(InputError, match=f"region: end {end} leaves nothing from start 0.9 on; expected"):
            Region(torch.rand(1, 1, *SIZE), start=0.9, end=end)


def test_halves_have_their_own_strength():
    regions = regions_of(
        Region(torch.rand(1, 1, *SIZE), half_mask(), uncond_scale=0.25, end=0.5),
        Region(torch.rand(1, 1, *SIZE), scale=2),
    )
    control = build(regions, steps=2, images=3)
    alone = [build(regions[r : r + 1], steps=2).gated(0) for r in range(2)]
    for level, gated in enumerate(control.gated(0, 6)):
        assert gated.shape[0] == 6
        for row in range(6):
            share = 0.25 if row < 3 else 1.0
            assert_close("gated", gated[row : row + 1], share * alone[0][level] + alone[1][level])
    assert [len(gated) for gated in control.gated(0, 3)] == [1] * 4  # without guidance: the pictures' alone
    assert torch.equal(control.gated(1, 3)[0], alone[1][0])
    assert control.segments == [0, 1]
    same = build(regions_of(Region(torch.rand(1, 1, *SIZE), uncond_scale=1.0)), images=3)
    assert same.unguided is None and [len(gated) for gated in same.gated(0, 6)] == [1] * 4


@pytest.mark.filterwarnings("ignore:.*all zero")
def test_a_region_acts_in_the_steps_in_which_it_does_something():
    picture, black = torch.rand(1, 1, *SIZE), torch.zeros(1, 1, *SIZE)
    expected = {
        Region(picture, end=0.5): [0, 1],
        Region(picture, scale=0): [],
        Region(picture, levels=(0, 0, 0, 0)): [],
        Region(picture, levels=(0, 0, 0, 0), prompt="a star", start=0.5): [2, 3],
        Region(picture, black): [],
        Region(mask=black, prompt="a star"): [],
        Region([picture, picture], [black, half_mask()]): [0, 1, 2, 3],
    }
    assert acting_steps(regions_of(*expected), 4) == list(expected.values())
