"""runtime.loading.lora_layers: each kind of file by its definition, written out here once more."""

import pytest
import torch

from runtime.loading.lora_layers import new_weight

OUT, IN, RANK = 12, 8, 4
SHAPES = {"linear": (OUT, IN), "conv": (OUT, IN, 3, 3)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(shape):
    up = random(OUT, RANK, *[1] * (len(shape) - 2))
    return {"up": up, "down": random(RANK, *shape[1:]), "alpha": torch.tensor(6.0)}


def times(m, shape):
    return 6 / RANK * (m["up"].flatten(1) @ m["down"].flatten(1)).reshape(shape)


def close(made, expected):
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, -0.5, 0.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lora(shape, strength):
    weight, m = random(*shape), lora(shape)
    close(new_weight(weight, m, None, strength), weight + strength * times(m, shape))
    del m["alpha"]
    close(new_weight(weight, m, None, strength), weight + strength * times(m, shape) * RANK / 6)
    close(new_weight(weight, m, 0.25, strength), weight + 0.25 * strength * times(m, shape) * RANK / 6)


def test_the_files_alpha_goes_before_the_configurations():
    weight, m = random(*SHAPES["linear"]), lora(SHAPES["linear"])
    close(new_weight(weight, m, 7.0, 1.0), weight + times(m, weight.shape))


def test_a_tucker_decomposition():
    shape = SHAPES["conv"]
    m = {"up": random(OUT, RANK, 1, 1), "mid": random(RANK, RANK, 3, 3), "down": random(RANK, IN, 1, 1)}
    x = random(1, IN, 9, 9)
    chain = torch.conv2d(torch.conv2d(torch.conv2d(x, m["down"]), m["mid"]), m["up"])
    made = new_weight(torch.zeros(shape), {**m, "alpha": torch.tensor(2.0)}, None, 1.0)
    torch.testing.assert_close(torch.conv2d(x, made), chain * 2 / RANK, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loha(shape):
    width = torch.Size(shape[1:]).numel()
    m = {
        f"hada_w{i}_{s}": random(*((OUT, RANK) if s == "a" else (RANK, width))) + i
        for i in (1, 2)
        for s in "ab"
    }
    product = (m["hada_w1_a"] @ m["hada_w1_b"]) * (m["hada_w2_a"] @ m["hada_w2_b"])
    made = new_weight(torch.zeros(shape), {**m, "alpha": torch.tensor(2.0)}, None, 1.0)
    close(made, product.reshape(shape) * 2 / RANK)


def test_lokr():
    weight = torch.zeros(SHAPES["conv"])
    first, second = random(3, 2), random(4, 4, 3, 3)
    expected = torch.stack([torch.kron(first, second[..., i, j]) for i in range(3) for j in range(3)], -1)
    whole = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(5.0)}
    close(
        new_weight(weight, whole, None, 1.0), expected.reshape(weight.shape)
    )  # nothing has a rank: no scale
    a, b = random(4, RANK), random(RANK, 4 * 9)
    product = {
        "lokr_w1": first,
        "lokr_w2_a": a,
        "lokr_w2_b": b.reshape(RANK, 4, 3, 3),
        "alpha": torch.tensor(2.0),
    }
    whole["lokr_w2"] = (a @ b).reshape(4, 4, 3, 3)
    close(new_weight(weight, product, None, 1.0), new_weight(weight, whole, None, 0.5))


@pytest.mark.parametrize(("rank", "kernel"), [(RANK, 3), (1, 1)])
def test_lokr_with_a_tucker_decomposition(rank, kernel):
    left, right, core = random(rank, 8), random(rank, 4), random(rank, rank, kernel, kernel)
    first, second = random(2, 2), torch.einsum("ijxy,ip,jr->xypr", core, left, right)
    expected = torch.stack([torch.kron(first, each) for each in second.flatten(0, 1).contiguous()], -1)
    m = {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right, "lokr_t2": core}
    made = new_weight(torch.zeros(16, 8, kernel, kernel), {**m, "alpha": torch.tensor(2.0)}, None, 1.0)
    close(made, expected.view_as(made) * 2 / rank)


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dora(shape, axis):
    weight, m = random(*shape), lora(shape)
    scale = torch.rand([n if i == axis else 1 for i, n in enumerate(shape)]) + 0.5
    v = weight + times(m, shape)
    rows = v.movedim(axis, 0).flatten(1)
    expected = (rows / rows.norm(dim=1, keepdim=True) * scale.reshape(-1, 1)).reshape_as(v.movedim(axis, 0))
    m["dora_scale"] = scale
    close(new_weight(weight, m, None, 1.0), expected.movedim(0, axis))
    close(new_weight(weight, m, None, 0.0), weight)


def test_a_difference():
    weight = random(OUT, IN)
    close(new_weight(weight, {"diff": torch.ones(OUT, IN)}, None, 0.5), weight + 0.5)


@pytest.mark.parametrize(
    "matrices",
    [
        {"alpha": torch.tensor(1.0)},
        {"up": random(OUT, RANK)},
        {"up": random(OUT, RANK), "down": random(RANK, IN + 1)},
        {"up": random(IN, RANK), "down": random(RANK, OUT)},  # the numbers fit, the shape does not
        {"diff": random(OUT, IN), "up": random(OUT, RANK), "down": random(RANK, IN)},
        {"hada_w1_a": random(OUT, RANK), "hada_w1_b": random(RANK, IN)},
        {"lokr_w1": random(3, 2)},
        {**lora((OUT, IN)), "dora_scale": torch.ones(OUT + 1, 1)},
        {**lora((OUT, IN)), "dora_scale": torch.ones(OUT, IN)},
    ],
    ids=[
        "alpha alone",
        "half",
        "width",
        "turned",
        "two kinds",
        "half a loha",
        "half a lokr",
        "dora",
        "dora of both",
    ],
)
def test_matrices_that_do_not_belong_together_are_refused(matrices):
    with pytest.raises((ValueError, RuntimeError)):
        new_weight(random(OUT, IN), matrices, None, 1.0)


@pytest.mark.parametrize(
    "kinds",
    [
        ("up", "down"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    ],
)
def test_a_rank_of_zero_is_refused(kinds):
    matrices = {
        kind: torch.zeros(0, 4) if kind.endswith(("down", "_b")) else torch.zeros(4, 0) for kind in kinds
    }
    with pytest.raises(ValueError, match="its rank is 0"):
        new_weight(torch.zeros(4, 4), {**matrices, "alpha": torch.tensor(1.0)}, None, 1.0)


@pytest.mark.parametrize("given", [(4, 3, 3, 5), (4, 5, 9), (5, 4, 3, 3)])
def test_a_difference_of_another_order_is_refused(given):
    """As other programs have convolutions, with their channels last: as many numbers, each in another place."""
    with pytest.raises(ValueError, match="it is of shape"):
        new_weight(torch.zeros(4, 5, 3, 3), {"diff": torch.ones(given)}, None, 1.0)


@pytest.mark.parametrize("given", [(4, 5, 3, 3), (4, 45)])
def test_a_difference_may_be_flat(given):
    change = torch.arange(180.0).reshape(given)
    assert torch.equal(
        new_weight(torch.zeros(4, 5, 3, 3), {"diff": change}, None, 1.0), change.view(4, 5, 3, 3)
    )
