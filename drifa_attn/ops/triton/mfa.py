"""The five pooled maps of MFA and their gradients as Triton kernels (the equations of HIFA and CLIA, Fig. 2).

Up to `WIDEST_CHAIN` channels, one kernel reads `x` once and moves nothing else of size `b c n`. Wider, each layer is a matrix
product of its own. Backward recomputes the maps from `x`.
Differs: the gradient of a maximum goes to the first of tied positions alone, where ties are those before σ.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from drifa_attn.ops import tail as tails
from drifa_attn.ops.chunked import gain_of
from drifa_attn.ops.tail import Tail, cast_like, written

from . import configs as config
from .common import (
    Pools,
    finish,
    higher,
    launch,
    named,
    partials,
    peak,
    precision,
    product,
    rounded,
    sigmoid,
    vector,
    weight_tile,
)
from .mfa_backward import chain_backward
from .products import (
    MAX,
    MEAN,
    Pull,
    Slot,
    back,
    layer,
    new_map,
    rows_of,
    sample_chunks,
    squeeze_back,
    squeezed_map,
    summed,
    tiles_of,
    unbounded,
    weight_gradient,
)
from .tail import tail_forward
from .tail_backward import tail_backward

Weights = Sequence[Tensor]

POOLS = Pools(stats=5, peaks=0b01010, negated=0, sigmoids=0b01010)  # mean h1, max h2, mean h3, max h4, mean t


@triton.jit
def chain_layer(weight, bias, zero, h, dtype: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """`W h + bias` of one layer of the chain; the padding of both is zero."""
    w = weight_tile(weight, zero, WIDTH, dtype, WIDTH, WIDTH, D, D)
    z = product(w, h, tl.zeros((D, h.shape[1]), tl.float32), PRECISION)
    return z + vector(bias, zero, WIDTH, D)[:, None]


@triton.jit
def chain_kernel(
    x,
    conv1,
    conv2,
    conv3,
    conv4,
    clia1,
    bias1,
    bias2,
    bias3,
    bias4,
    clia_bias1,
    squeeze,
    squeeze_bias,
    parts,
    spots,
    n,
    c,
    x_b,
    x_c,
    x_n,
    zero,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """All five layers of TILES tiles of positions of one sample: writes sums and maxima before σ to `parts`, and `spots`.

    The weights are WIDTH wide; their tiles are D wide, in the dtype of `x`. `zero` is 0, see `weight_tile`.
    """
    chunks = tl.cdiv(n, POSITIONS * TILES)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    dtype = x.dtype.element_ty
    row = tl.arange(0, D)
    sum1 = tl.zeros((D,), tl.float32)
    sum3 = tl.zeros((D,), tl.float32)
    sum_t = tl.zeros((D,), tl.float32)
    top2 = tl.full((D,), float("-inf"), tl.float32)
    top4 = tl.full((D,), float("-inf"), tl.float32)
    at2 = tl.zeros((D,), tl.int32)
    at4 = tl.zeros((D,), tl.int32)
    for tile in tl.range(TILES, num_stages=1):  # prefetching the weights of the next tile does not fit
        p = (chunk * TILES + tile) * POSITIONS + tl.arange(0, POSITIONS)
        ok = (p < n)[None, :]
        live = tl.where(ok, 1.0, 0.0)
        none = tile * zero
        here = x + b * x_b + p[None, :] * x_n
        if squeeze is not None:
            total = tl.zeros((D, POSITIONS), tl.float32)
            for first in range(0, c, DEPTH):
                k = first + tl.arange(0, DEPTH)
                s = tl.load(squeeze + row[:, None] * c + k[None, :], mask=(row < WIDTH)[:, None] & (k < c)[None, :], other=0.0)
                s = rounded(s.to(tl.float32), dtype)
                a = tl.load(here + k[:, None] * x_c, mask=(k < c)[:, None] & ok, other=0.0)
                total = product(s, a, total, PRECISION)
            total += vector(squeeze_bias, none, WIDTH, D)[:, None]
            if dtype == tl.float16:  # whose range may not hold z
                z = total
            else:
                z = rounded(total, dtype)
        else:
            z = tl.load(here + row[:, None] * x_c, mask=(row < c)[:, None] & ok, other=0.0)
        sum_t += tl.sum(sigmoid(chain_layer(clia1, clia_bias1, none, z, dtype, WIDTH, D, PRECISION)) * live, 1)
        h = sigmoid(chain_layer(conv1, bias1, none, z, dtype, WIDTH, D, PRECISION))
        sum1 += tl.sum(h * live, 1)
        h1 = rounded(h, dtype)
        h = chain_layer(conv2, bias2, none, h1, dtype, WIDTH, D, PRECISION)
        top, at = peak(h, ok, p)
        top2, at2 = higher(top2, at2, top, at)
        h12 = rounded(sigmoid(h) + h1.to(tl.float32), dtype)
        h = sigmoid(chain_layer(conv3, bias3, none, h12, dtype, WIDTH, D, PRECISION))
        sum3 += tl.sum(h * live, 1)
        top, at = peak(chain_layer(conv4, bias4, none, rounded(h, dtype), dtype, WIDTH, D, PRECISION), ok, p)
        top4, at4 = higher(top4, at4, top, at)
    slot = b * chunks + chunk
    tl.store(parts + (slot * 5 + 0) * D + row, sum1)
    tl.store(parts + (slot * 5 + 1) * D + row, top2)
    tl.store(parts + (slot * 5 + 2) * D + row, sum3)
    tl.store(parts + (slot * 5 + 3) * D + row, top4)
    tl.store(parts + (slot * 5 + 4) * D + row, sum_t)
    tl.store(spots + (slot * 2 + 0) * D + row, at2)
    tl.store(spots + (slot * 2 + 1) * D + row, at4)


def chain_parts(
    x: Tensor, weights: Weights, biases: Weights, squeeze_weight: Tensor | None, squeeze_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums and maxima of every chunk, and the positions of the maxima: see `chain_kernel`."""
    (b, c, n), d = x.shape, weights[0].shape[0]
    padded = config.power_of_two(d)
    chosen = config.chain(x, padded, (x.dtype if squeeze_weight is None else unbounded(x)).itemsize)
    chunks = triton.cdiv(n, chosen.positions * chosen.tiles)
    parts, spots = partials(x, POOLS, chunks, padded)
    launch(
        chain_kernel,
        b * chunks,
        x,
        x=x,
        **named("conv1 conv2 conv3 conv4 clia1", weights),
        **named("bias1 bias2 bias3 bias4 clia_bias1", biases),
        squeeze=None if squeeze_weight is None else squeeze_weight.contiguous(),
        squeeze_bias=None if squeeze_bias is None else squeeze_bias.contiguous(),
        parts=parts,
        spots=spots,
        n=n,
        c=c,
        x_b=x.stride(0),
        x_c=x.stride(1),
        x_n=x.stride(2),
        zero=0,
        WIDTH=d,
        D=padded,
        PRECISION=precision(),
        POSITIONS=chosen.positions,
        TILES=chosen.tiles,
        DEPTH=min(chosen.depth, config.power_of_two(c)),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return parts, spots


def chain_forward(
    x: Tensor, weights: Weights, biases: Weights, squeeze_weight: Tensor | None, squeeze_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`mfa_forward` in one pass."""
    return finish(x, POOLS, *chain_parts(x, weights, biases, squeeze_weight, squeeze_bias), weights[0].shape[0])


def layerwise_forward(
    x: Tensor, weights: Weights, biases: Weights, squeeze_weight: Tensor | None, squeeze_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`mfa_forward` with one product per layer."""
    d = weights[0].shape[0]
    (conv1, conv2, conv3, conv4, local) = zip(
        [w.to(x.dtype).contiguous() for w in weights], [v.contiguous() for v in biases], strict=True
    )
    parts, spots = partials(x, POOLS, tiles_of(x), d)
    h1, h12, h3 = (new_map(x, d, x.dtype) for _ in range(3))
    z = squeezed_map(x, squeeze_weight, squeeze_bias)
    layer(z, *local, slot=Slot(MEAN, parts, spots, 4))
    layer(z, *conv1, slot=Slot(MEAN, parts, spots, 0), out=h1)
    layer(h1, *conv2, slot=Slot(MAX, parts, spots, 1, 0), other=h1, out_sum=h12)
    layer(h12, *conv3, slot=Slot(MEAN, parts, spots, 2), out=h3)
    layer(h3, *conv4, slot=Slot(MAX, parts, spots, 3, 1))
    return finish(x, POOLS, parts, spots, d)


def mfa_forward(
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    places: bool = True,
) -> tuple[Tensor, Tensor]:
    """The five pooled maps of HIFA and CLIA, and the positions of the two maxima, which it finds with or without `places`.

    Weights and biases are those of conv1, conv2, conv3, conv4 and clia.conv1. The squeeze, or None, is the reduction
    `z = lin(squeeze, x)` before them.

    Shape: x `b c n` of any strides, weights `d d`, biases `d`, squeeze `d c` and `d`; -> stats `5 b d` float32 (mean h1,
    max h2, mean h3, max h4, mean t), where `2 b d` int32 (first position of max h2 and of max h4, before σ).
    """
    chained = weights[0].shape[0] <= config.WIDEST_CHAIN
    return (chain_forward if chained else layerwise_forward)(x, weights, biases, squeeze_weight, squeeze_bias)


def mfa_gain_forward(
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    head: Weights,
    measured: Weights,
    expand: Weights,
    alpha: Tensor | None,
    places: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gain of MFA, `b c`, and what `mfa_forward` gives: the chain and the tail, one launch each, or a launch per layer."""
    inputs, tail = (x, weights, biases, squeeze_weight, squeeze_bias), Tail(head, measured, expand, alpha)
    if weights[0].shape[0] <= config.WIDEST_CHAIN:
        return tail_forward(x, *chain_parts(*inputs), tail)
    stats, where = layerwise_forward(*inputs)
    return gain_of(stats, tail), stats, where


def mfa_gain_backward(
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    head: Weights,
    measured: Weights,
    expand: Weights,
    alpha: Tensor | None,
    stats: Tensor,
    where: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None, list[Tensor]]:
    """The gradients of `mfa_gain_forward` for that of the gain: those of `mfa_backward`, then those of the tail's weights."""
    tail, n = Tail(head, measured, expand, alpha), x.shape[2]
    if weights[0].shape[0] <= config.WIDEST_CHAIN:
        reaching, through = tail_backward(grad, x, stats, tail)
    else:
        grads, through = tails.backward(grad, stats, tail)
        reaching = reaching_maps(grads, stats, n)
    return *maps_backward(reaching, x, weights, biases, squeeze_weight, squeeze_bias, where), through


def layerwise_core(
    z: Tensor, weights: Weights, biases: Weights, grads: Tensor, where: Tensor, dz: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Write the gradient of `z` to `dz` and give those of the five weights and biases, in float32, one product per layer.

    grads, `b d` each: of h1, h3 and t at every position, of h2 at its maximum, of h4 at its maximum and before σ.
    """
    d = weights[0].shape[0]
    conv1, conv2, conv3, conv4, local = weights
    bias1, bias2, bias3, _, bias_local = biases
    g1, g2, g3, g4, gl = grads
    h1, h2, h12, h3 = (new_map(z, d, conv1.dtype) for _ in range(4))
    q1, q2, q3, ql = (new_map(z, d, unbounded(z)) for _ in range(4))
    q4 = new_map(z, d, unbounded(z)).zero_().scatter_(2, where[1][..., None].long(), g4[..., None].to(unbounded(z)))
    layer(z, conv1, bias1, out=h1)
    layer(h1, conv2, bias2, out=h2, out_sum=h12, other=h1)
    layer(h12, conv3, bias3, out=h3)
    parts = z.new_empty(4, z.shape[0], tiles_of(z), 1, d, dtype=torch.float32)
    layer(z, local, bias_local, slot=Slot(MEAN, parts[3], parts[3]), out=ql, pull=Pull(gl))
    back([(conv4, q4)], q3, pull=Pull(g3), h=h3, parts=parts[2])
    back([(conv3, q3)], q2, pull=Pull(None, g2[:, None], where[0][:, None]), h=h2, parts=parts[1])
    back([(conv2, q2), (conv3, q3)], q1, pull=Pull(g1), h=h1, parts=parts[0])
    back([(conv1, q1), (local, ql)], dz)
    db1, db2, db3, db_local = parts.sum((1, 2, 3))
    of_z = rows_of(z)
    pairs = ((q1, of_z), (q2, rows_of(h1)), (q3, rows_of(h12)), (q4, rows_of(h3)), (ql, of_z))
    return [weight_gradient(q, a) for q, a in pairs], [db1, db2, db3, g4.sum(0), db_local]


def mfa_backward(
    grads: Tensor,
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    stats: Tensor,
    where: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """The gradients of `mfa_forward`, recomputed from `x` a few samples at a time.

    Shape: grads and stats `5 b d`, where `2 b d`; -> those of x, weights, biases and, None without a squeeze, its two.
    """
    return maps_backward(reaching_maps(grads, stats, x.shape[2]), x, weights, biases, squeeze_weight, squeeze_bias, where)


def reaching_maps(grads: Tensor, stats: Tensor, n: int) -> Tensor:
    """The gradients of the maps from those of the statistics, `5 b d`: what `layerwise_core` takes."""
    reaching = grads.new_empty(grads.shape, dtype=torch.float32).copy_(grads)
    reaching[::2].div_(n)  # of the means
    torch.ops.aten.sigmoid_backward.grad_input(reaching[3], stats[3], grad_input=reaching[3])
    return reaching


def maps_backward(
    reaching: Tensor,
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    where: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """The gradients of x, weights, biases and squeeze from those that reach the maps: the chain, or a few samples at a time."""
    chain = config.chain_back(x, config.power_of_two(weights[0].shape[0]))
    if chain is not None:
        return chain_backward(chain, reaching, x, weights, biases, squeeze_weight, squeeze_bias, where)
    d, dx = weights[0].shape[0], torch.empty_like(x)
    weights_, biases_ = [w.to(x.dtype).contiguous() for w in weights], [v.contiguous() for v in biases]

    def samples(s: slice) -> list[Tensor]:
        z = squeezed_map(x[s], squeeze_weight, squeeze_bias)
        dz = dx[s] if squeeze_weight is None else new_map(z, d, unbounded(x))
        dw, db = layerwise_core(z, weights_, biases_, reaching[:, s], where[:, s], dz)
        through = [] if squeeze_weight is None else squeeze_back(dz, x[s], squeeze_weight, dx[s])
        return [*dw, *db, *through]

    gradients = summed(samples(s) for s in sample_chunks(x, d))
    dw, db = cast_like(gradients[:5], weights), written([torch.empty_like(bias) for bias in biases], gradients[5:10])
    if squeeze_weight is None or squeeze_bias is None:
        return dx, dw, db, None, None
    dsw, dsb = cast_like(gradients[10:], [squeeze_weight, squeeze_bias])
    return dx, dw, db, dsw, dsb
