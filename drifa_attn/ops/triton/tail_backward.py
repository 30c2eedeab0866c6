"""The gradients of the last steps of MFA as two Triton kernels: those of the pooled maps, and those of the weights.

The first recomputes a sample's vectors and differentiates them. It also writes what the gradients of the weights are sums of,
over samples, which the second adds in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drifa_attn.ops.tail import Tail

from . import configs as config
from .common import launch, named, rounded, vector, weight_tile
from .tail import TILE, deviation, exact_sigmoid, head_of, standardised, tail_arguments, times

OUTER = 32  # rows of a weight whose gradient a program adds


@triton.jit
def transposed_times(w, v):
    """`Wᵀ v`."""
    return tl.sum(w * v[:, None], 0)


@triton.jit
def tail_back_kernel(
    grad,
    stats,
    dense,
    dense_bias,
    conv2,
    conv2_bias,
    global_scale,
    local_scale,
    global_center,
    global_spread,
    local_center,
    local_spread,
    expand,
    expand_bias,
    alpha,
    reaching,
    inner,
    outer,
    samples,
    n,
    c,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """For the gradient of a sample's gain, `b c`: what reaches its maps, and the factors of the weights' gradients.

    reaching `5 b WIDTH`, as `chain_back_kernel` takes it. inner `5 b WIDTH`: the gradients before σ of G and of q, the sum that
    `expand` reads, and those of the two scales, per channel. outer `2 b c`: the gradients before σ of the gate, and of alpha.
    """
    b = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, D)
    step, here = samples * WIDTH, b * WIDTH
    u = vector(stats, here, WIDTH, D) + vector(stats + step, here, WIDTH, D)
    h4 = vector(stats + 3 * step, here, WIDTH, D)
    v, p = vector(stats + 2 * step, here, WIDTH, D) + h4, vector(stats + 4 * step, here, WIDTH, D)
    info, q = head_of(u, v, p, dense, dense_bias, conv2, conv2_bias, WIDTH, D)
    above = standardised(info, global_center, global_spread, WIDTH, D)
    below = standardised(p + q, local_center, local_spread, WIDTH, D)
    scale, scales = tl.load(global_scale).to(tl.float32), vector(local_scale, 0, WIDTH, D)
    s = scale * above + scales * below
    ds = tl.zeros((D,), tl.float32)
    for first in range(0, c, ROWS):
        channel = first + tl.arange(0, ROWS)
        inside = channel < c
        if expand is None:
            z = s
        else:
            mask = inside[:, None] & (row < WIDTH)[None, :]
            e = tl.load(expand + channel[:, None] * WIDTH + row[None, :], mask=mask, other=0.0).to(tl.float32)
            z = times(e, s) + tl.load(expand_bias + channel, mask=inside, other=0.0).to(tl.float32)
        a = exact_sigmoid(z)
        g = tl.load(grad + b * c + channel, mask=inside, other=0.0)
        tl.store(outer + (samples + b) * c + channel, g * a, mask=inside)
        if alpha is not None:
            g *= tl.load(alpha + channel, mask=inside, other=0.0).to(tl.float32)
        g *= a * (1.0 - a)
        tl.store(outer + b * c + channel, g, mask=inside)
        if expand is None:
            ds = g
        else:
            ds += transposed_times(e, g)
    d_info, d_local = scale * ds, scales * ds
    if global_spread is not None:
        d_info /= deviation(global_spread, WIDTH, D)
        d_local /= deviation(local_spread, WIDTH, D)
    d_info *= info * (1.0 - info)
    d_q = d_local * q * (1.0 - q)
    du = transposed_times(weight_tile(dense, 0, 2 * WIDTH, tl.float32, WIDTH, WIDTH, D, D), d_info)
    dv = transposed_times(weight_tile(dense + WIDTH, 0, 2 * WIDTH, tl.float32, WIDTH, WIDTH, D, D), d_info)
    dp = d_local + transposed_times(weight_tile(conv2, 0, WIDTH, tl.float32, WIDTH, WIDTH, D, D), d_q)
    inside = row < WIDTH
    there = reaching + here + row
    tl.store(there, du / n, mask=inside)
    tl.store(there + step, du, mask=inside)
    tl.store(there + 2 * step, dv / n, mask=inside)
    tl.store(there + 3 * step, dv * h4 * (1.0 - h4), mask=inside)
    tl.store(there + 4 * step, dp / n, mask=inside)
    there = inner + here + row
    tl.store(there, d_info, mask=inside)
    tl.store(there + step, d_q, mask=inside)
    tl.store(there + 2 * step, s, mask=inside)
    tl.store(there + 3 * step, ds * above, mask=inside)
    tl.store(there + 4 * step, ds * below, mask=inside)


@triton.jit
def tail_weights_kernel(
    stats,
    inner,
    outer,
    dense,
    dense_bias,
    conv2,
    conv2_bias,
    global_scale,
    local_scale,
    expand,
    expand_bias,
    alpha,
    samples,
    c,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients of the weights behind the pooling, sums over samples, for ROWS rows of dense and conv2, or of expand."""
    blocks: tl.constexpr = tl.cdiv(WIDTH, ROWS)
    k, step = tl.arange(0, D), samples * WIDTH
    wide = (k < WIDTH)[None, :]
    total = tl.zeros((ROWS, D), tl.float32)
    bias = tl.zeros((ROWS,), tl.float32)
    scale = tl.zeros((ROWS,), tl.float32)
    if tl.program_id(0) < blocks:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < WIDTH
        right = tl.zeros((ROWS, D), tl.float32)
        local = tl.zeros((ROWS, D), tl.float32)
        local_bias = tl.zeros((ROWS,), tl.float32)
        for b in range(samples):
            here = inner + b * WIDTH + row
            d_info = tl.load(here, mask=inside, other=0.0)
            d_q = tl.load(here + step, mask=inside, other=0.0)
            of = stats + b * WIDTH
            u = vector(of, 0, WIDTH, D) + vector(of, step, WIDTH, D)
            v = vector(of, 2 * step, WIDTH, D) + vector(of, 3 * step, WIDTH, D)
            total += d_info[:, None] * u[None, :]
            right += d_info[:, None] * v[None, :]
            local += d_q[:, None] * vector(of, 4 * step, WIDTH, D)[None, :]
            bias += d_info
            local_bias += d_q
            scale += tl.load(here + 4 * step, mask=inside, other=0.0)
        mask = inside[:, None] & wide
        there = dense + row[:, None] * 2 * WIDTH + k[None, :]
        tl.store(there, rounded(total, dense.dtype.element_ty), mask=mask)
        tl.store(there + WIDTH, rounded(right, dense.dtype.element_ty), mask=mask)
        tl.store(dense_bias + row, rounded(bias, dense_bias.dtype.element_ty), mask=inside)
        tl.store(conv2 + row[:, None] * WIDTH + k[None, :], rounded(local, conv2.dtype.element_ty), mask=mask)
        tl.store(conv2_bias + row, rounded(local_bias, conv2_bias.dtype.element_ty), mask=inside)
        tl.store(local_scale + row, rounded(scale, local_scale.dtype.element_ty), mask=inside)
        if tl.program_id(0) == 0:
            whole = tl.zeros((D,), tl.float32)
            for b in range(samples):
                whole += vector(inner + b * WIDTH, 3 * step, WIDTH, D)
            one = tl.sum(whole, 0)
            tl.store(global_scale, rounded(one, global_scale.dtype.element_ty))
    else:
        row = (tl.program_id(0) - blocks) * ROWS + tl.arange(0, ROWS)
        inside = row < c
        for b in range(samples):
            g = tl.load(outer + b * c + row, mask=inside, other=0.0)
            scale += tl.load(outer + (samples + b) * c + row, mask=inside, other=0.0)
            bias += g
            if expand is not None:
                total += g[:, None] * vector(inner + b * WIDTH, 2 * step, WIDTH, D)[None, :]
        if expand is not None:
            there = expand + row[:, None] * WIDTH + k[None, :]
            tl.store(there, rounded(total, expand.dtype.element_ty), mask=inside[:, None] & wide)
            tl.store(expand_bias + row, rounded(bias, expand_bias.dtype.element_ty), mask=inside)
        if alpha is not None:
            tl.store(alpha + row, rounded(scale, alpha.dtype.element_ty), mask=inside)


def tail_backward(grad: Tensor, x: Tensor, stats: Tensor, tail: Tail) -> tuple[Tensor, list[Tensor]]:
    """What reaches the maps, `5 b d`, and the gradients of `tail.weights()`, for that of the gain, `b c`."""
    (b, c, n), d = x.shape, stats.shape[2]
    padded = config.power_of_two(d)
    reaching, inner, outer = torch.empty_like(stats), torch.empty_like(stats), x.new_empty(2, b, c, dtype=torch.float32)
    launch(
        tail_back_kernel,
        b,
        x,
        grad=grad.contiguous(),
        stats=stats,
        **tail_arguments(tail),
        reaching=reaching,
        inner=inner,
        outer=outer,
        samples=b,
        n=n,
        c=c,
        WIDTH=d,
        D=padded,
        ROWS=min(TILE // padded, config.power_of_two(c)) if tail.expand else padded,
        num_warps=8 if padded == 128 else 4,
    )
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tail.weights()]
    given = named("dense dense_bias conv2 conv2_bias global_scale local_scale", gradients[:6])
    launch(
        tail_weights_kernel,
        triton.cdiv(d, OUTER) + triton.cdiv(c, OUTER),
        x,
        stats=stats,
        inner=inner,
        outer=outer,
        **given,
        expand=gradients[6] if tail.expand else None,
        expand_bias=gradients[7] if tail.expand else None,
        alpha=None if tail.alpha is None else gradients[-1],
        samples=b,
        c=c,
        WIDTH=d,
        D=padded,
        ROWS=OUTER,
        num_warps=4,
    )
    return reaching, gradients
