"""kernels.checks: what does not fit is said in one line, by name."""

import pytest
import torch

from kernels import reference
from tests.support.kernel_cases import loss_case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(2, 4, 3)},
            r"hidden must be a float \(G\*B, C, H, W\), got float32 \(2, 4, 3\)",
        ),
        ({"hidden": torch.zeros(4, 4, 3, 3, dtype=torch.int64)}, "hidden must be a float .* got int64"),
        ({"hidden": torch.zeros(3, 4, 3, 3)}, "hidden's batch 3 is not a multiple of the features' batch 2"),
        ({"features": [torch.zeros(2, 4, 3, 2)]}, r"features\[0\] must be .* got float32 \(2, 4, 3, 2\)"),
        ({"features": [torch.zeros(2, 8, 3, 3)]}, r"features\[0\] must be a float \(2 or 1, 4, 3, 3\)"),
        ({"features": [torch.zeros(2, 4, 3, 3, dtype=torch.uint8)]}, r"features\[0\] .* got uint8"),
        ({"features": [torch.zeros(2, 4, 3, 3)] * 2}, "2 features need as many masks, got 1"),
        ({"masks": [torch.zeros(2, 4, 3, 3)]}, r"masks\[0\] must be a float \(2 or 1, 1, 3, 3\)"),
        ({"masks": [torch.zeros(2, 1, 3, 3, dtype=torch.bool)]}, r"masks\[0\] .* got bool"),
        ({"scales": torch.zeros(2)}, r"scales must be a float \(1,\), one a region, got float32 \(2,\)"),
        ({"scales": torch.zeros(1, dtype=torch.int64)}, "scales must be a float .* got int64"),
    ],
)
def test_inject_says_what_does_not_fit(change, message):
    call = {
        "hidden": torch.zeros(4, 4, 3, 3),
        "features": [torch.zeros(2, 4, 3, 3)],
        "masks": [torch.zeros(1, 1, 3, 3)],
        "scales": torch.zeros(1),
    }
    with pytest.raises(ValueError, match=f"inject: .*{message}"):
        reference.inject(**(call | change))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 4, 5), "model_output must be a float"),
        (
            1,
            torch.zeros(2, 4, 4, 5),
            r"noisy must be \(2, 4, 5, 4\), as model_output, got float32 \(2, 4, 4, 5\)",
        ),
        (2, torch.zeros(1, 4, 5, 4), "latents must be"),
        (3, torch.zeros(2, 4, 5, 4), r"mask must be \(2 or 1, 1, 5, 4\)"),
        (4, torch.zeros(1), r"alpha must be \(2,\), one a sample"),
        (5, torch.tensor(0.5), r"sigma must be \(2,\)"),
    ],
)
def test_loss_says_what_does_not_fit(index, value, message):
    case = list(loss_case())
    case[index] = value
    with pytest.raises(ValueError, match=f"sobel_z0_loss: {message}"):
        reference.sobel_z0_loss(*case)


@pytest.mark.parametrize("op", [reference.sobel_z0_loss, reference.noise_and_z0_loss])
def test_losses_know_their_names(op):
    with pytest.raises(ValueError, match="'epsilon', 'v_prediction' or 'sample', got 'flow'"):
        op(*loss_case(), "flow")
    with pytest.raises(ValueError, match="edges must be 'sobel', 'laplacian' or 'none', got 'canny'"):
        op(*loss_case(), edges="canny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 3)}, r"x must be a float \(B, C, H, W\), got float32 \(2, 6, 3\)"),
        ({"x": torch.zeros(2, 6, 3, 3, dtype=torch.int64)}, "x must be a float .* got int64"),
        ({"num_groups": 4}, "num_groups must divide the 6 channels, got 4"),
        ({"num_groups": 0}, "num_groups must divide the 6 channels, got 0"),
        ({"weight": torch.zeros(5)}, r"weight must be a float \(6,\), got float32 \(5,\)"),
        ({"bias": torch.zeros(6, 1)}, r"bias must be a float \(6,\), got float32 \(6, 1\)"),
        ({"bias": torch.zeros(6, dtype=torch.int64)}, "bias must be a float .* got int64"),
        ({"offset": torch.zeros(6)}, r"offset must be a float \(2 or 1, 6\), got float32 \(6,\)"),
        ({"offset": torch.zeros(3, 6)}, r"offset must be a float \(2 or 1, 6\), got float32 \(3, 6\)"),
        ({"offset": torch.zeros(2, 6, dtype=torch.int64)}, "offset must be a float .* got int64"),
    ],
)
def test_group_norm_silu_says_what_does_not_fit(change, message):
    call = {"x": torch.zeros(2, 6, 3, 3), "weight": torch.ones(6), "bias": torch.zeros(6), "num_groups": 3}
    with pytest.raises(ValueError, match=f"group_norm_silu: {message}"):
        reference.group_norm_silu(**(call | change))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 5), None, r"x must be a float \(..., 2 C\), got float32 \(2, 5\)"),
        (torch.tensor(1.0), None, r"x must be a float .* got float32 \(\)"),
        (torch.zeros(2, 6, dtype=torch.int32), None, "x must be a float .* got int32"),
        (torch.zeros(2, 6), torch.zeros(3), r"bias must be a float \(6,\), got float32 \(3,\)"),
        (torch.zeros(2, 6), torch.zeros(6, dtype=torch.bool), "bias must be a float .* got bool"),
    ],
    ids=["odd", "number", "int x", "half a bias", "bool bias"],
)
def test_geglu_says_what_does_not_fit(x, bias, message):
    with pytest.raises(ValueError, match=f"geglu: {message}"):
        reference.geglu(x, bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sample": torch.zeros(2, 4, 3)},
            r"sample must be a float32 \(B, C, h, w\), got float32 \(2, 4, 3\)",
        ),
        ({"sample": torch.zeros(2, 4, 3, 5).half()}, "sample must be a float32 .* got float16"),
        (
            {"output": torch.zeros(6, 4, 3, 5)},
            r"output must be a float \(2, 4, 3, 5\), or with twice the rows",
        ),
        ({"output": torch.zeros(4, 4, 3, 5, dtype=torch.int8)}, "output must be a float .* got int8"),
        ({"previous": torch.zeros(1, 4, 3, 5)}, r"previous must be as sample, float32 \(2, 4, 3, 5\)"),
        ({"previous": torch.zeros(2, 4, 3, 5).half()}, "previous must be as sample, .* got float16"),
        ({"coefficients": torch.zeros(5)}, r"coefficients must be a float \(6,\), got float32 \(5,\)"),
        ({"coefficients": torch.zeros(6, dtype=torch.int64)}, "coefficients must be a float .* got int64"),
    ],
)
def test_guidance_step_says_what_does_not_fit(change, message):
    call = {
        "sample": torch.zeros(2, 4, 3, 5),
        "output": torch.zeros(4, 4, 3, 5),
        "coefficients": torch.zeros(6),
        "previous": torch.zeros(2, 4, 3, 5),
    }
    with pytest.raises(ValueError, match=f"guidance_step: {message}"):
        reference.guidance_step(**(call | change))
