"""runtime.model.unet against diffusers' UNet2DConditionModel, and the promises its docstrings make."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from kernels import ops
from runtime.errors import InputError
from runtime.loading.single_file import SDXL_CONFIGS
from runtime.model.config import UNetConfig
from runtime.model.unet import UNet
from tests.support.tolerances import assert_close

TEXT_TOKENS, POOLED = 11, 20
SDXL = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")


def config(channels, down=SDXL, **options):
    """A diffusers config with SDXL's options, small; the up blocks mirror the down blocks."""
    up = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    defaults = {
        "layers_per_block": 1,
        "transformer_layers_per_block": (1,) * len(channels),
        "attention_head_dim": (2,) * len(channels),
        "cross_attention_dim": 32,
        "use_linear_projection": True,
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    }
    return (
        defaults | {"block_out_channels": channels, "down_block_types": down, "up_block_types": up} | options
    )


CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
# name -> (config, latent height, latent width)
CASES = {
    "embedded": (
        config(
            (64, 96, 160),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(2, 3, 5),
            cross_attention_dim=128,
            norm_num_groups=32,
        ),
        16,
        16,
    ),
    "two layers, odd height": (
        config((16, 32, 48), layers_per_block=2, transformer_layers_per_block=(1, 2, 3), attention_head_dim=(1, 4, 3)),
        9,
        16,
    ),
    "convolution projection, eight channels": (
        config((16, 32, 32), in_channels=8, out_channels=8, use_linear_projection=False, attention_head_dim=4),
        12,
        20,
    ),
    "two levels, attention at both, odd": (
        config((16, 24), (CROSS, CROSS), cross_attention_dim=20, norm_eps=1e-6),
        7,
        15,
    ),
    "four levels, other embedding": (
        config(
            (16, 16, 24, 32), (PLAIN, CROSS, PLAIN, CROSS), layers_per_block=(1, 2, 1, 2),
            flip_sin_to_cos=False, freq_shift=1, out_channels=5,
        ),
        19,
        24,
    ),
    "no attention at the last level": (config((16, 32), (CROSS, PLAIN)), 8, 10),
}  # fmt: skip


def build(name):
    """A diffusers UNet whose every parameter is random (zero biases would hide a mistake), and ours over it."""
    torch.manual_seed(0)
    reference = UNet2DConditionModel(**CASES[name][0]).eval().requires_grad_(False)
    for parameter in reference.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return reference, UNet.from_diffusers(reference).requires_grad_(False)


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    return *build(request.param), request.param


@pytest.fixture(scope="module")
def small():
    """Reference, ours and the name of the cheapest case with SDXL's structure."""
    name = "two layers, odd height"
    return *build(name), name


def inputs(name, batch, seed=1):
    options, height, width = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    time_ids = torch.tensor([[1024.0, 768, 16, 0, 1024, 768], [512.0, 512, 0, 32, 640, 480]]).repeat(batch, 1)
    return {
        "sample": torch.randn(batch, options.get("in_channels", 4), height, width, generator=generator),
        "timesteps": torch.tensor([737.5]),
        "text": torch.randn(batch, TEXT_TOKENS, options["cross_attention_dim"], generator=generator),
        "pooled": torch.randn(batch, POOLED, generator=generator),
        "time_ids": time_ids[:batch],
    }


def control_sizes(name):
    """(C, h, w) of each level: a plain block's control comes after its downsampler, the others' before it."""
    options, height, width = CASES[name]
    channels, kinds = options["block_out_channels"], options["down_block_types"]
    last = len(channels) - 1
    shifts = [level + (kind == PLAIN and level < last) for level, kind in enumerate(kinds)] + [last]
    return [
        (c, -(-height // 2**s), -(-width // 2**s))
        for c, s in zip((*channels, channels[-1]), shifts, strict=True)
    ]


def make_control(name, rows, seed=2):
    """Two regions, the second one unmasked, at every level."""
    generator = torch.Generator().manual_seed(seed)
    control = []
    for channels, height, width in control_sizes(name):
        features = [torch.randn(rows, channels, height, width, generator=generator) for _ in range(2)]
        mask = torch.rand(1, 1, height, width, generator=generator)
        control.append((features, [mask, None], torch.tensor([0.8, -0.3])))
    return control


def residuals(control, batch):
    """What diffusers' pipeline would hand over: the sum of the gated features, copied for every row of the batch."""
    sums = []
    for features, masks, scales in control:
        gated = sum(s * f * (1 if m is None else m) for f, m, s in zip(features, masks, scales, strict=True))
        sums.append(gated.repeat(batch // len(gated), 1, 1, 1))
    return sums


def run_reference(unet, x, control=None):
    added = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]}
    extra = None if control is None else residuals(control, len(x["sample"]))
    sample = x["sample"].clone()
    call = {"added_cond_kwargs": added, "down_intrablock_additional_residuals": extra, "return_dict": False}
    return unet(sample, x["timesteps"], x["text"], **call)[0]


def arguments(unet, x, control=None):
    time = [projection[0] for projection in unet.embed_time(x["timesteps"], x["pooled"], x["time_ids"])]
    return x["sample"], time, unet.project_text(x["text"]), control


def run_ours(unet, x, control=None):
    return unet(*arguments(unet, x, control))


@pytest.mark.parametrize(
    ("batch", "rows"), [(1, 1), (2, 1), (4, 2)], ids=["one", "guidance", "guidance-of-two"]
)
@pytest.mark.parametrize("controlled", [False, True], ids=["free", "control"])
@torch.no_grad()
def test_equals_diffusers(pair, batch, rows, controlled):
    reference, ours, name = pair
    x = inputs(name, batch)
    control = make_control(name, rows) if controlled else None
    expected = run_reference(reference, x, control)
    assert_close("prediction", run_ours(ours, x, control), expected, "unet")
    if controlled:  # the comparison means something: the control changes the prediction
        assert (expected - run_reference(reference, x)).abs().max() > 1e-2


def test_control_gradients_equal_diffusers(pair):
    reference, ours, name = pair
    x, weight = inputs(name, 2), None
    gradients = []
    for run, unet in ((run_reference, reference), (run_ours, ours)):
        control = make_control(name, 1)
        leaves = [feature.requires_grad_() for features, _, _ in control for feature in features]
        out = run(unet, x, control)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        gradients.append(torch.autograd.grad((out * weight).sum(), leaves))
    for i, (expected, actual) in enumerate(zip(*gradients, strict=True)):
        assert_close(f"gradient of level {i // 2}, region {i % 2}", actual, expected, "unet gradient")
        assert expected.abs().max() > 0


@torch.no_grad()
def test_bfloat16_is_near_float32(small):
    reference, _, name = small
    x, control = inputs(name, 2), make_control(name, 1)
    expected = run_reference(reference, x, control)
    ours = UNet.from_diffusers(copy.deepcopy(reference).to(torch.bfloat16))
    x = {key: value if key in ("timesteps", "time_ids") else value.bfloat16() for key, value in x.items()}
    control = [([f.bfloat16() for f in features], masks, scales) for features, masks, scales in control]
    actual = run_ours(ours, x, control)
    assert actual.dtype == torch.bfloat16
    assert_close("prediction", actual, expected, "unet")


@torch.no_grad()
def test_scale_zero_and_mask_zero_change_nothing(small):
    _, ours, name = small
    x = inputs(name, 2)
    free = run_ours(ours, x)
    control = make_control(name, 1)
    silent = [(features, masks, torch.zeros(2)) for features, masks, _ in control]
    outside = [(features, [torch.zeros_like(masks[0])] * 2, scales) for features, masks, scales in control]
    assert torch.equal(run_ours(ours, x, silent), free)
    assert torch.equal(run_ours(ours, x, outside), free)


@torch.no_grad()
def test_inputs_are_not_written(small):
    _, ours, name = small
    call = arguments(ours, inputs(name, 2), make_control(name, 1))
    before = copy.deepcopy(call)
    ours(*call)
    for kept, given in zip(tensors(before), tensors(call), strict=True):
        assert torch.equal(kept, given)


def tensors(nested):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nested) if leaf is not None]


def test_parameters_are_shared_and_named_as_in_diffusers(small):
    reference, ours, _ = small
    mine, theirs = ours.state_dict(), reference.state_dict()
    assert set(mine) == set(theirs)
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in theirs)


def test_norms_are_diffusers(pair):
    """An epsilon of 1e-5 for 1e-6 would hide in the predictions' tolerance."""
    reference, ours, _ = pair
    theirs = dict(reference.named_modules())
    norms = [(n, m) for n, m in ours.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    for name, norm in norms:
        assert repr(norm) == repr(theirs[name]), name
    assert len(norms) == sum(isinstance(m, (nn.GroupNorm, nn.LayerNorm)) for m in theirs.values())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_load_is_strict(small, change):
    _, ours, _ = small
    state = dict(ours.state_dict())
    if change == "missing":
        del state["mid_block.attentions.0.proj_in.bias"]
    elif change == "unexpected":
        state["position_net.weight"] = torch.zeros(1)
    else:
        state["conv_in.weight"] = state["conv_in.weight"][:-1]
    with pytest.raises(
        RuntimeError, match="mid_block.attentions.0.proj_in.bias|position_net.weight|conv_in.weight"
    ):
        UNet(ours.config).load_state_dict(state)


def sdxl_base():
    """The config of SDXL base 1.0."""
    return json.loads((SDXL_CONFIGS / "unet" / "config.json").read_text())


def test_full_sdxl_structure():
    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(sdxl_base())
    ours = UNet.from_diffusers(reference)
    assert sum(p.numel() for p in ours.parameters()) == 2_567_463_684  # SDXL base 1.0
    assert ours.config.control_channels == (320, 640, 1280, 1280)
    sample = torch.empty(2, 4, 128, 128, device="meta")
    time = ours.embed_time(*(torch.empty(s, device="meta") for s in [(30,), (2, 1280), (2, 6)]))
    text = ours.project_text(torch.empty(2, 77, 2048, device="meta"))
    assert len(time) == 17 and len(text) == 70
    sizes = [(320, 64), (640, 64), (1280, 32), (1280, 32)]  # the adapter's, for 1024 x 1024 pixels
    with torch.no_grad():
        control = [
            ([torch.empty(1, c, s, s, device="meta")], None, torch.empty(1, device="meta")) for c, s in sizes
        ]
        assert ours(sample, [t[0] for t in time], text, control).shape == sample.shape


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", None),
        ("time_cond_proj_dim", 256),
        ("mid_block_type", "UNetMidBlock2D"),
        ("reverse_transformer_layers_per_block", [[4, 4, 10], [2, 1, 1], 1]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("act_fn", "gelu"),
        ("norm_num_groups", None),
        ("attention_head_dim", None),
        ("block_out_channels", None),
        ("layers_per_block", (2, 2)),
        ("transformer_layers_per_block", ([1, 1], 2, 10)),
        ("cross_attention_dim", (32, 32, 64)),
        ("down_block_types", ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")),
        ("some_future_option", "on"),
    ],
)
def test_unsupported_config_is_named(key, value):
    with pytest.raises(InputError) as error:
        UNetConfig.from_diffusers(sdxl_base() | {key: value})
    assert f"{key} = {value!r}" in str(error.value)


def test_config_ignores_diffusers_bookkeeping():
    plain = UNetConfig.from_diffusers(sdxl_base())
    assert (
        UNetConfig.from_diffusers(sdxl_base() | {"_class_name": "UNet2DConditionModel", "new": None}) == plain
    )


@torch.no_grad()
def test_all_steps_at_once_equal_each_step(small):
    _, ours, name = small
    x = inputs(name, 2)
    steps = torch.tensor([999.0, 500.5, 0.0])
    together = ours.embed_time(steps, x["pooled"], x["time_ids"])
    for i, step in enumerate(steps):
        alone = ours.embed_time(step[None], x["pooled"], x["time_ids"])
        for r, (a, b) in enumerate(zip(alone, together, strict=True)):
            assert_close(f"resnet {r}, step {i}", b[i], a[0])


@torch.no_grad()
def test_nothing_constant_is_computed_in_the_loop(small):
    """One forward calls no text projection and no time embedding."""
    _, ours, name = small
    call = arguments(ours, inputs(name, 2))
    called = []
    once = ("attn2.to_k", "attn2.to_v", "time_emb_proj", "time_embedding", "add_embedding")
    handles = [
        m.register_forward_hook(lambda *_, name=n: called.append(name))
        for n, m in ours.named_modules()
        if n.endswith(once)
    ]
    ours(*call)
    for handle in handles:
        handle.remove()
    assert handles and not called


@torch.no_grad()
def test_activations_stay_channels_last(small):
    _, ours, name = small
    call = arguments(ours, inputs(name, 2), make_control(name, 1))
    layouts = {}

    def record(module, args, name):
        layouts[name] = args[0].is_contiguous(memory_format=torch.channels_last)

    handles = [
        m.register_forward_pre_hook(lambda m, a, name=n: record(m, a, name))
        for n, m in ours.named_modules()
        if isinstance(m, (nn.Conv2d, nn.GroupNorm))
    ]
    ours(*call)
    for handle in handles:
        handle.remove()
    assert layouts and all(layouts.values()), [name for name, ok in layouts.items() if not ok]


@torch.no_grad()
def test_control_needs_a_level_for_each_block(small):
    _, ours, name = small
    call = arguments(ours, inputs(name, 1), make_control(name, 1)[:3])
    with pytest.raises(ValueError, match="4 levels .* got 3"):
        ours(*call)


@torch.no_grad()
def test_control_goes_through_the_ops(small, monkeypatch):
    _, ours, name = small
    calls = []
    inject = ops.inject
    monkeypatch.setattr(ops, "inject", lambda *a, **k: calls.append(k["inplace"]) or inject(*a, **k))
    run_ours(ours, inputs(name, 1), make_control(name, 1))
    assert calls == [True] * 4
    with torch.enable_grad():
        run_ours(ours, inputs(name, 1), make_control(name, 1))
    assert calls[4:] == [False] * 4


@torch.no_grad()
def test_compiles_and_exports_without_graph_breaks():
    name = "no attention at the last level"
    ours = build(name)[1]
    call = arguments(ours, inputs(name, 2), make_control(name, 1))
    expected = ours(*call)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_close("compiled", compiled(*call), expected, "unet")
    exported = torch.export.export(ours, call).module()
    assert_close("exported", exported(*call), expected, "unet")
