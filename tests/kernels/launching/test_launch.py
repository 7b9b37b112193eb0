"""kernels.launching.launch: strides as the kernels take them, and block sizes."""

import pytest
import torch
import triton

from kernels.launching import launch


def test_both_layouts_are_pixels_without_a_copy():
    x = torch.zeros(2, 3, 4, 5)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert launch.as_pixels(x) == (x, (60, 1, 20))
    assert launch.as_pixels(nhwc) == (nhwc, (60, 3, 1))
    assert launch.channels_inner((60, 3, 1)) and not launch.channels_inner((60, 1, 20))


def test_slices_of_batch_and_channels_are_no_copy():
    x = torch.zeros(4, 6, 4, 5)[1::2, 1:4]
    same, strides = launch.as_pixels(x)
    assert same is x and strides == (240, 1, 20)


def test_one_row_has_stride_0():
    assert launch.as_pixels(torch.zeros(1, 3, 4, 5))[1] == (0, 1, 20)


@pytest.mark.parametrize(
    "cut", [(slice(None), slice(0, 3)), (slice(0, 4, 2), slice(None))], ids=["columns", "rows"]
)
def test_a_cut_image_is_copied(cut):
    x = torch.arange(20.0).view(1, 1, 4, 5)[(..., *cut)]
    copy, strides = launch.as_pixels(x)
    assert not launch.is_pixels(x) and torch.equal(copy, x) and strides[1] == 1


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (1, 1)], ids=str)
def test_lines_are_never_copied(size):
    x = torch.zeros(2, 3, 7, 7)[..., : size[0], : size[1]]
    same, strides = launch.as_pixels(x)
    assert same is x
    if max(size) > 1:
        assert strides[1] == (1 if size[0] == 1 else 7)


@pytest.mark.parametrize(
    ("pixels", "channels", "strides", "block"),
    [
        (4096, 320, (0, 320, 1), (32, 64)),
        (4096, 320, (0, 1, 4096), (512, 4)),
        (1, 3, (0, 3, 1), (1, 4)),
        (7, 96, (0, 96, 1), (8, 128)),
        (5, 2, (0, 1, 5), (8, 2)),
    ],
    ids=["nhwc", "nchw", "tiny", "width no multiple of 64", "tiny nchw"],
)
def test_tiles(pixels, channels, strides, block):
    sizes = launch.tile(pixels, channels, strides, itemsize=2)
    assert (sizes["BLOCK_P"], sizes["BLOCK_C"]) == block


@pytest.mark.parametrize(("images", "rows"), [(1, 4), (8, 4), (16, 8), (32, 16), (512, 16)])
def test_strips_are_short_where_programs_are_few(images, rows):
    sizes = launch.strip(4 * 128, 128, images)
    assert (sizes["ROWS"], sizes["BLOCK"]) == (rows, 128)
    assert launch.strip(3, 2, 1) == {"ROWS": 4, "BLOCK": 4, "num_warps": 1}


def test_host_arithmetic_is_tritons():
    for n in (1, 2, 3, 4, 5, 127, 128, 129, 2**40 + 1):
        assert launch.power_of_2(n) == triton.next_power_of_2(n)
        assert launch.cdiv(n, 4) == triton.cdiv(n, 4)


@pytest.mark.parametrize("width", [320, 640, 960, 1280, 1920, 2560])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_of_groups_begin_where_a_vector_may(width, itemsize):
    sizes = launch.group_blocks(2, 4096, width, 32, True, itemsize)
    chunk = sizes["chunk"]
    assert sizes["GROUP"] * sizes["GROUPS"] * itemsize % launch.VECTOR_BYTES == 0
    assert 32 % sizes["GROUPS"] == 0 and chunk % sizes["BLOCK_P"] == 0
    assert -(-4096 // chunk) <= launch.MOST_CHUNKS


@pytest.mark.parametrize("size", [1, 17, 128 * 128, 1000 * 1000])
def test_group_norm_fills_the_gpu_at_batch_1(size):
    sizes = launch.group_blocks(1, size, 320, 32, True, 2)
    programs = -(-size // sizes["chunk"]) * (32 // sizes["GROUPS"])
    assert programs >= min(132, -(-size // sizes["BLOCK_P"]))


def test_tickets_are_zeros():
    assert launch.tickets(torch.device("cpu"), 3).tolist() == [0, 0, 0]


def test_grad_is_needed_only_where_it_is_recorded():
    x = torch.zeros(1, requires_grad=True)
    assert launch.needs_grad([torch.zeros(1), x]) and not launch.needs_grad(torch.zeros(1), None, 3)
    with torch.no_grad():
        assert not launch.needs_grad(x)
