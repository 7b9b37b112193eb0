"""The edges of predicted and true latents, row by row, and the adjoint of that: the parts of `sobel_z0_loss`.

With replicate padding smoothing by [1, 2, 1] is a symmetric matrix (its first row is [3, 1, 0, ...]), its own adjoint.
The adjoint of v[x+1] - v[x-1] is u[x-1] - u[x+1], where a tap beyond the border is -u of the border pixel.
"""

import triton
import triton.language as tl

from kernels import reference

# compile-time codes, in the order of checks.EDGES and checks.PREDICTION_TYPES
SOBEL, LAPLACIAN, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
EPSILON, V_PREDICTION = tl.constexpr(0), tl.constexpr(1)
EPS = tl.constexpr(reference.SOBEL_EPS)


@triton.jit
def planes_at(latents, strides, b, channel):
    """Where this program's channels begin in model output, z_t and z0, and its sample in the mask."""
    b = tl.cast(b, tl.int64)
    return (
        latents[0] + b * strides[0][0] + channel * strides[0][1],
        latents[1] + b * strides[1][0] + channel * strides[1][1],
        latents[2] + b * strides[2][0] + channel * strides[2][1],
        latents[3] + b * strides[3][0],
    )


@triton.jit
def load_clamped(plane, strides, y, x, height, width):
    """The plane at row y and columns x, replicated beyond its borders."""
    y = tl.minimum(tl.maximum(y, 0), height - 1)
    x = tl.minimum(tl.maximum(x, 0), width - 1)
    return tl.load(plane + tl.cast(y, tl.int64) * strides[2] + x * strides[3]).to(tl.float32)


@triton.jit
def load_mask(planes, strides, y, x, height, width):
    return load_clamped(planes[3], strides[3], y, x, height, width)


@triton.jit
def load_z0(planes, strides, y, x, height, width, a, s, PREDICTION: tl.constexpr):
    """The predicted and the true latent."""
    predicted = load_clamped(planes[0], strides[0], y, x, height, width)
    if PREDICTION == EPSILON:
        predicted = (load_clamped(planes[1], strides[1], y, x, height, width) - s * predicted) / a
    elif PREDICTION == V_PREDICTION:
        predicted = a * load_clamped(planes[1], strides[1], y, x, height, width) - s * predicted
    return predicted, load_clamped(planes[2], strides[2], y, x, height, width)


@triton.jit
def prediction_slope(a, s, PREDICTION: tl.constexpr):
    """d z0 / d output."""
    if PREDICTION == EPSILON:
        return -s / a
    elif PREDICTION == V_PREDICTION:
        return -s
    else:
        return 1.0


@triton.jit
def noise_difference(planes, strides, y, x, height, width, a, s, PREDICTION: tl.constexpr):
    """Output minus the target that z_t = a z0 + s eps implies: eps, a eps - s z0, or z0."""
    output = load_clamped(planes[0], strides[0], y, x, height, width)
    target = load_clamped(planes[2], strides[2], y, x, height, width)
    if PREDICTION == EPSILON or PREDICTION == V_PREDICTION:  # noqa: SIM109, no `in` in Triton
        noise = (load_clamped(planes[1], strides[1], y, x, height, width) - a * target) / s
        if PREDICTION == EPSILON:
            target = noise
        else:
            target = a * noise - s * target
    return output - target


@triton.jit
def row_sums(planes, strides, y, x, height, width, a, s, EDGES: tl.constexpr, PREDICTION: tl.constexpr):
    """What row y gives to the edges at columns x: two horizontal sums of the prediction, two of the truth."""
    predicted, true = load_z0(planes, strides, y, x, height, width, a, s, PREDICTION)
    if EDGES == NONE:
        return predicted, predicted, true, true
    left, true_left = load_z0(planes, strides, y, x - 1, height, width, a, s, PREDICTION)
    right, true_right = load_z0(planes, strides, y, x + 1, height, width, a, s, PREDICTION)
    d, m = _across(left, predicted, right, EDGES)
    true_d, true_m = _across(true_left, true, true_right, EDGES)
    return d, m, true_d, true_m


@triton.jit
def _across(left, middle, right, EDGES: tl.constexpr):
    if EDGES == SOBEL:
        return right - left, left + 2 * middle + right
    else:
        return left + middle + right, middle


@triton.jit
def _gradients(d_up, d, d_low, m_up, m_low):
    return (d_up + 2 * d + d_low) / 8, (m_low - m_up) / 8


@triton.jit
def edge_of(d_up, d, d_low, m_up, m, m_low, EDGES: tl.constexpr):
    """The edges of the middle row: Sobel magnitude, Laplacian, or the latent itself."""
    if EDGES == SOBEL:
        gx, gy = _gradients(d_up, d, d_low, m_up, m_low)
        return tl.sqrt(gx * gx + gy * gy + EPS)
    elif EDGES == LAPLACIAN:
        return ((d_up - 3 * m) + (d - 3 * m) + (d_low - 3 * m)) / 16  # 0 where all is flat
    else:
        return m


@triton.jit
def edge_slope(up, mid, low, EDGES: tl.constexpr):
    """Half the derivative of the squared difference, to the two gradients of the prediction (or twice to the edge)."""
    found = edge_of(up[0], mid[0], low[0], up[1], mid[1], low[1], EDGES)
    difference = found - edge_of(up[2], mid[2], low[2], up[3], mid[3], low[3], EDGES)
    if EDGES == SOBEL:
        gx, gy = _gradients(up[0], mid[0], low[0], up[1], low[1])
        return difference * gx / found, difference * gy / found
    else:
        return difference, difference


@triton.jit
def adjoint_across(al, am, ar, bl, bm, br, first, last, EDGES: tl.constexpr):
    if EDGES == SOBEL:
        p = tl.where(first, -am, al) - tl.where(last, -am, ar)
        return p, tl.where(first, bm, bl) + 2 * bm + tl.where(last, bm, br)
    elif EDGES == LAPLACIAN:
        return tl.where(first, am, al) + am + tl.where(last, am, ar), am
    else:
        return am, am


@triton.jit
def adjoint_down(p_up, p, p_low, q_up, q, q_low, first, last, EDGES: tl.constexpr):
    p_up, p_low = tl.where(first, p, p_up), tl.where(last, p, p_low)
    if EDGES == SOBEL:
        difference = tl.where(first, -q, q_up) - tl.where(last, -q, q_low)
        return (p_up + 2 * p + p_low + difference) / 8
    elif EDGES == LAPLACIAN:
        return (p_up + p + p_low - 9 * q) / 16
    else:
        return q
