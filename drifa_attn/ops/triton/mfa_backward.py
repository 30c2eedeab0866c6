"""The gradient of MFA's chain in one pass, for narrow widths.

For each tile it recomputes the maps and differentiates them in registers. Each program takes a fixed run of tiles and writes
one slab of weight gradients; the slabs are then added in a fixed order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from . import configs as config
from .common import launch, packed, precision, product, rounded, sigmoid, strides
from .products import layer, new_map, unbounded

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def weight_tile(weights, index: tl.constexpr, D: tl.constexpr):
    """The weight of one layer, from `l D D`."""
    row = tl.arange(0, D)
    return tl.load(weights + index * D * D + row[:, None] * D + row[None, :])


@triton.jit
def vector(vectors, index: tl.constexpr, D: tl.constexpr):
    """One row of `l D`, as a column of a tile."""
    return tl.load(vectors + index * D + tl.arange(0, D))[:, None]


@triton.jit
def chain_back_kernel(
    z,
    weights,
    biases,
    grads,
    where,
    dz,
    slabs,
    sums,
    tiles,
    total,
    n,
    d,
    z_b,
    z_c,
    z_n,
    dz_b,
    dz_c,
    dz_n,
    zero,
    Q: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
):
    """dz, and the sums over TILES tiles of the gradients of conv1, conv2, conv3 and clia.conv1 (`4 D D`, `4 D`).

    grads `b 5 D`, in the order h1, h2, h3, h4, t: of h1, h3 and t at every position, of h2 at its maximum, of h4 at its
    maximum and before σ. where `b 2 D`. weights and biases as in the forward chain. Q: the dtype of gradients in products.
    """
    dtype: tl.constexpr = z.dtype.element_ty
    row = tl.arange(0, D)
    dw1 = tl.zeros((D, D), tl.float32)
    dw2 = tl.zeros((D, D), tl.float32)
    dw3 = tl.zeros((D, D), tl.float32)
    dwl = tl.zeros((D, D), tl.float32)
    db1 = tl.zeros((D,), tl.float32)
    db2 = tl.zeros((D,), tl.float32)
    db3 = tl.zeros((D,), tl.float32)
    dbl = tl.zeros((D,), tl.float32)
    first = tl.program_id(0) * TILES
    for item in tl.range(first, tl.minimum(first + TILES, total), num_stages=1):
        b = (item // tiles).to(tl.int64)
        p = item % tiles * POSITIONS + tl.arange(0, POSITIONS)
        ok = (p < n)[None, :]
        mask = (row < d)[:, None] & ok
        w, v, g = weights + item * zero, biases + item * zero, grads + b * 5 * D
        at2 = tl.load(where + b * 2 * D + row)[:, None] == p[None, :]
        at4 = tl.load(where + (b * 2 + 1) * D + row)[:, None] == p[None, :]
        none = tl.zeros((D, POSITIONS), tl.float32)
        a = tl.load(z + b * z_b + row[:, None] * z_c + p[None, :] * z_n, mask=mask, other=0.0)
        h1 = rounded(sigmoid(product(weight_tile(w, 0, D), a, none, PRECISION) + vector(v, 0, D)), dtype)
        h2 = sigmoid(product(weight_tile(w, 1, D), h1, none, PRECISION) + vector(v, 1, D))
        h12 = rounded(h1.to(tl.float32) + h2, dtype)
        h3 = sigmoid(product(weight_tile(w, 2, D), h12, none, PRECISION) + vector(v, 2, D))
        q4 = rounded(tl.where(at4, vector(g, 3, D), 0.0), Q)
        d3 = product(tl.trans(weight_tile(w, 3, D)), q4, none, PRECISION) + vector(g, 2, D)
        q = tl.where(ok, d3 * h3 * (1.0 - h3), 0.0)
        db3 += tl.sum(q, 1)
        q = rounded(q, Q)
        dw3 = product(q, tl.trans(h12), dw3, PRECISION)
        s = product(tl.trans(weight_tile(w, 2, D)), q, none, PRECISION)
        q = tl.where(ok, (s + tl.where(at2, vector(g, 1, D), 0.0)) * h2 * (1.0 - h2), 0.0)
        db2 += tl.sum(q, 1)
        q = rounded(q, Q)
        dw2 = product(q, tl.trans(h1), dw2, PRECISION)
        d1 = product(tl.trans(weight_tile(w, 1, D)), q, s, PRECISION) + vector(g, 0, D)
        slope = h1.to(tl.float32)
        q = tl.where(ok, d1 * slope * (1.0 - slope), 0.0)
        db1 += tl.sum(q, 1)
        q = rounded(q, Q)
        dw1 = product(q, tl.trans(a), dw1, PRECISION)
        down = product(tl.trans(weight_tile(w, 0, D)), q, none, PRECISION)
        t = sigmoid(product(weight_tile(w, 4, D), a, none, PRECISION) + vector(v, 4, D))
        q = tl.where(ok, vector(g, 4, D) * t * (1.0 - t), 0.0)
        dbl += tl.sum(q, 1)
        q = rounded(q, Q)
        dwl = product(q, tl.trans(a), dwl, PRECISION)
        down = product(tl.trans(weight_tile(w, 4, D)), q, down, PRECISION)
        there = dz + b * dz_b + row[:, None] * dz_c + p[None, :] * dz_n
        tl.store(there, rounded(down, dz.dtype.element_ty), mask=mask)
    slab = slabs + tl.program_id(0).to(tl.int64) * 4 * D * D + row[:, None] * D + row[None, :]
    tl.store(slab, dw1)
    tl.store(slab + D * D, dw2)
    tl.store(slab + 2 * D * D, dw3)
    tl.store(slab + 3 * D * D, dwl)
    bias_sum = sums + tl.program_id(0) * 4 * D + row
    tl.store(bias_sum, db1)
    tl.store(bias_sum + D, db2)
    tl.store(bias_sum + 2 * D, db3)
    tl.store(bias_sum + 3 * D, dbl)


def conv4_gradient(z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], at_top: Tensor, where4: Tensor) -> Tensor:
    """The weight gradient of conv4, from h3 at the `b d` positions of the maxima of h4: the chain over these alone."""
    d = weights[0].shape[0]
    a = z.gather(2, where4[:, None].long().expand(-1, d, -1))
    h1, h12, h3 = (new_map(a, d, weights[0].dtype) for _ in range(3))
    layer(a, weights[0], biases[0], out=h1)
    layer(h1, weights[1], biases[1], out_sum=h12, other=h1)
    layer(h12, weights[2], biases[2], out=h3)
    return (rearrange(at_top, "b o -> b 1 o") * h3.float()).sum(0).mT


def chain_backward(
    chosen: config.Chain,
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grads: Tensor,
    where: Tensor,
    dz: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Write the gradient of `z` to `dz` and give those of the five weights and biases, in float32.

    weights in the dtype of the products, biases float32; grads `5 b d` as `chain_back_kernel` takes them.
    """
    (b, d, n), padded = z.shape, config.power_of_two(weights[0].shape[0])
    tiles = triton.cdiv(n, chosen.positions)
    per_program = triton.cdiv(b * tiles, config.PROGRAMS)
    programs = triton.cdiv(b * tiles, per_program)
    slabs = z.new_empty(programs, 4, padded, padded, dtype=torch.float32)
    sums = z.new_empty(programs, 4, padded, dtype=torch.float32)
    launch(
        chain_back_kernel,
        programs,
        z,
        z=z,
        weights=packed(weights, padded, weights[0].dtype),
        biases=packed(biases, padded, torch.float32),
        grads=F.pad(grads.transpose(0, 1), [0, padded - d]).contiguous(),
        where=F.pad(where.transpose(0, 1), [0, padded - d], value=-1).contiguous(),
        dz=dz,
        slabs=slabs,
        sums=sums,
        tiles=tiles,
        total=b * tiles,
        n=n,
        d=d,
        **strides("z", z),
        **strides("dz", dz),
        zero=0,
        Q=TRITON_DTYPES[unbounded(z)],
        D=padded,
        PRECISION=precision(),
        POSITIONS=chosen.positions,
        TILES=per_program,
        num_warps=chosen.warps,
    )
    dw1, dw2, dw3, dwl = slabs.sum(0)[:, :d, :d]
    db1, db2, db3, dbl = sums.sum(0)[:, :d]
    dw4 = conv4_gradient(z, weights, biases, grads[3], where[1])
    return [dw1, dw2, dw3, dw4, dwl], [db1, db2, db3, grads[3].sum(0), dbl]
