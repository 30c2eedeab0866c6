"""The gradient of MFA's chain in one pass, for narrow widths.

For each tile it recomputes the maps and differentiates them in registers. Each program takes a fixed run of tiles and writes
one slab of weight gradients; a second kernel adds the slabs in a fixed order, and writes them in the dtypes of the weights.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs as config
from .common import launch, named, precision, product, rounded, sigmoid, strides, vector, weight_tile
from .products import back, new_map, split, squeezed_map, unbounded, weight_slabs

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def column(values, width, D: tl.constexpr):
    """Values of one sample, `width`, as a column of a tile; the padding is zero."""
    row = tl.arange(0, D)
    return tl.load(values + row, mask=row < width, other=0.0)[:, None]


@triton.jit
def chain_back_kernel(
    z,
    conv1,
    conv2,
    conv3,
    conv4,
    clia1,
    bias1,
    bias2,
    bias3,
    clia_bias1,
    grads,
    where,
    dz,
    slabs,
    sums,
    samples,
    tiles,
    total,
    n,
    z_b,
    z_c,
    z_n,
    dz_b,
    dz_c,
    dz_n,
    zero,
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
):
    """dz, and the sums over TILES tiles of the gradients of conv1, conv2, conv3 and clia.conv1 (`4 D D`, `4 D`).

    grads `5 b WIDTH`, in the order h1, h2, h3, h4, t: of h1, h3 and t at every position, of h2 at its maximum, of h4 at its
    maximum and before σ. where `2 b WIDTH`. Weights and biases as in the forward chain. Q: the dtype of gradients in products.
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
        mask = (row < WIDTH)[:, None] & ok
        still, g, step = item * zero, grads + b * WIDTH, samples * WIDTH
        at2 = tl.load(where + b * WIDTH + row, mask=row < WIDTH, other=-1)[:, None] == p[None, :]
        at4 = tl.load(where + step + b * WIDTH + row, mask=row < WIDTH, other=-1)[:, None] == p[None, :]
        none = tl.zeros((D, POSITIONS), tl.float32)
        a = tl.load(z + b * z_b + row[:, None] * z_c + p[None, :] * z_n, mask=mask, other=0.0)
        h1 = rounded(
            sigmoid(
                product(weight_tile(conv1, still, WIDTH, dtype, WIDTH, WIDTH, D, D), a, none, PRECISION)
                + vector(bias1, still, WIDTH, D)[:, None]
            ),
            dtype,
        )
        h2 = sigmoid(
            product(weight_tile(conv2, still, WIDTH, dtype, WIDTH, WIDTH, D, D), h1, none, PRECISION)
            + vector(bias2, still, WIDTH, D)[:, None]
        )
        h12 = rounded(h1.to(tl.float32) + h2, dtype)
        h3 = sigmoid(
            product(weight_tile(conv3, still, WIDTH, dtype, WIDTH, WIDTH, D, D), h12, none, PRECISION)
            + vector(bias3, still, WIDTH, D)[:, None]
        )
        q4 = rounded(tl.where(at4, column(g + 3 * step, WIDTH, D), 0.0), Q)
        d3 = product(tl.trans(weight_tile(conv4, still, WIDTH, dtype, WIDTH, WIDTH, D, D)), q4, none, PRECISION) + column(
            g + 2 * step, WIDTH, D
        )
        q = tl.where(ok, d3 * h3 * (1.0 - h3), 0.0)
        db3 += tl.sum(q, 1)
        q = rounded(q, Q)
        dw3 = product(q, tl.trans(h12), dw3, PRECISION)
        s = product(tl.trans(weight_tile(conv3, still, WIDTH, dtype, WIDTH, WIDTH, D, D)), q, none, PRECISION)
        q = tl.where(ok, (s + tl.where(at2, column(g + 1 * step, WIDTH, D), 0.0)) * h2 * (1.0 - h2), 0.0)
        db2 += tl.sum(q, 1)
        q = rounded(q, Q)
        dw2 = product(q, tl.trans(h1), dw2, PRECISION)
        d1 = product(tl.trans(weight_tile(conv2, still, WIDTH, dtype, WIDTH, WIDTH, D, D)), q, s, PRECISION) + column(
            g, WIDTH, D
        )
        slope = h1.to(tl.float32)
        q = tl.where(ok, d1 * slope * (1.0 - slope), 0.0)
        db1 += tl.sum(q, 1)
        q = rounded(q, Q)
        dw1 = product(q, tl.trans(a), dw1, PRECISION)
        down = product(tl.trans(weight_tile(conv1, still, WIDTH, dtype, WIDTH, WIDTH, D, D)), q, none, PRECISION)
        t = sigmoid(
            product(weight_tile(clia1, still, WIDTH, dtype, WIDTH, WIDTH, D, D), a, none, PRECISION)
            + vector(clia_bias1, still, WIDTH, D)[:, None]
        )
        q = tl.where(ok, column(g + 4 * step, WIDTH, D) * t * (1.0 - t), 0.0)
        dbl += tl.sum(q, 1)
        q = rounded(q, Q)
        dwl = product(q, tl.trans(a), dwl, PRECISION)
        down = product(tl.trans(weight_tile(clia1, still, WIDTH, dtype, WIDTH, WIDTH, D, D)), q, down, PRECISION)
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


@triton.jit
def conv4_kernel(
    z,
    conv1,
    conv2,
    conv3,
    bias1,
    bias2,
    bias3,
    grads,
    where,
    slabs,
    sums,
    samples,
    z_b,
    z_c,
    z_n,
    zero,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """The gradients of conv4 and its bias, summed over SAMPLES samples: `D D`, `D`.

    The gradient of h4 lies at one position per channel, so the chain runs over these positions alone: column o of the tiles is
    the position where h4 has its maximum in channel o. grads and where as in `chain_back_kernel`.
    """
    dtype: tl.constexpr = z.dtype.element_ty
    row, step = tl.arange(0, D), samples * WIDTH
    total = tl.zeros((D, D), tl.float32)
    total_bias = tl.zeros((D,), tl.float32)
    for item in tl.range(SAMPLES, num_stages=1):
        b = (tl.program_id(0) * SAMPLES + item).to(tl.int64)
        still, live = item * zero, (row < WIDTH) & (b < samples)
        at = tl.load(where + step + b * WIDTH + row, mask=live, other=0)
        g4 = tl.load(grads + 3 * step + b * WIDTH + row, mask=live, other=0.0)
        mask = (row < WIDTH)[:, None] & live[None, :]
        a = tl.load(z + b * z_b + row[:, None] * z_c + at[None, :] * z_n, mask=mask, other=0.0)
        none = tl.zeros((D, D), tl.float32)
        w = weight_tile(conv1, still, WIDTH, dtype, WIDTH, WIDTH, D, D)
        h1 = rounded(sigmoid(product(w, a, none, PRECISION) + vector(bias1, still, WIDTH, D)[:, None]), dtype)
        w = weight_tile(conv2, still, WIDTH, dtype, WIDTH, WIDTH, D, D)
        h2 = sigmoid(product(w, h1, none, PRECISION) + vector(bias2, still, WIDTH, D)[:, None])
        w = weight_tile(conv3, still, WIDTH, dtype, WIDTH, WIDTH, D, D)
        h12 = rounded(h1.to(tl.float32) + h2, dtype)
        h3 = sigmoid(product(w, h12, none, PRECISION) + vector(bias3, still, WIDTH, D)[:, None])
        total += h3 * g4[None, :]
        total_bias += g4
    tl.store(slabs + tl.program_id(0) * D * D + row[None, :] * D + row[:, None], total)
    tl.store(sums + tl.program_id(0) * D + row, total_bias)


@triton.jit
def write_vector(sums, db, count, step, row, width):
    """Write the sum over `count` programs of the gradient of a vector, in their order and its dtype."""
    place = sums + row
    total = tl.zeros(row.shape, tl.float32)
    for _ in range(count):
        total += tl.load(place, mask=row < width, other=0.0)
        place += step
    tl.store(db + row, rounded(total, db.dtype.element_ty), mask=row < width)


@triton.jit
def write_weight(slabs, dw, count, STEP: tl.constexpr, row, WIDTH: tl.constexpr, D: tl.constexpr):
    """Write the sum over `count` programs of some rows of the gradient of a weight, in their order and its dtype."""
    k = tl.arange(0, D)
    place = slabs + row[:, None] * D + k[None, :]
    total = tl.zeros((row.shape[0], D), tl.float32)
    for _ in range(count):
        total += tl.load(place)
        place += STEP  # pointers, so that no offset exceeds 32 bits
    mask = (row < WIDTH)[:, None] & (k < WIDTH)[None, :]
    tl.store(dw + row[:, None] * WIDTH + k[None, :], rounded(total, dw.dtype.element_ty), mask=mask)


@triton.jit
def chain_sums_kernel(
    slabs,
    sums,
    slabs4,
    sums4,
    slabs_z,
    sums_z,
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
    count,
    splits,
    size,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    """The gradients of the chain's weights and biases, and of the squeeze's, from the sums of the programs before it.

    `count` programs of `chain_back_kernel` wrote slabs and sums, `splits` of `conv4_kernel` slabs4 and sums4, and as many of
    `weight_kernel` slabs_z, `splits size`, and sums_z, `splits D`. A program writes PART elements of the squeeze's gradient.
    """
    layer = tl.program_id(0) // (D // ROWS)
    row = tl.program_id(0) % (D // ROWS) * ROWS + tl.arange(0, ROWS)
    if layer == 0:
        write_weight(slabs, conv1, count, 4 * D * D, row, WIDTH, D)
        write_vector(sums, bias1, count, 4 * D, row, WIDTH)
    elif layer == 1:
        write_weight(slabs + D * D, conv2, count, 4 * D * D, row, WIDTH, D)
        write_vector(sums + D, bias2, count, 4 * D, row, WIDTH)
    elif layer == 2:
        write_weight(slabs + 2 * D * D, conv3, count, 4 * D * D, row, WIDTH, D)
        write_vector(sums + 2 * D, bias3, count, 4 * D, row, WIDTH)
    elif layer == 3:
        write_weight(slabs + 3 * D * D, clia1, count, 4 * D * D, row, WIDTH, D)
        write_vector(sums + 3 * D, clia_bias1, count, 4 * D, row, WIDTH)
    elif layer == 4:
        write_weight(slabs4, conv4, splits, D * D, row, WIDTH, D)
        write_vector(sums4, bias4, splits, D, row, WIDTH)
        if squeeze is not None:
            write_vector(sums_z, squeeze_bias, splits, D, row, WIDTH)
    elif squeeze is not None:
        write_vector(slabs_z, squeeze, splits, size, (tl.program_id(0) - 5 * (D // ROWS)) * PART + tl.arange(0, PART), size)


def chain_backward(
    chosen: config.Chain,
    grads: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    where: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """The gradients of x, weights, biases and squeeze; grads `5 b d` and where `2 b d` as `chain_back_kernel` takes them."""
    d, dx, z = weights[0].shape[0], torch.empty_like(x), squeezed_map(x, squeeze_weight, squeeze_bias)
    dz = dx if squeeze_weight is None else new_map(z, d, unbounded(x))
    (b, _, n), padded = z.shape, config.power_of_two(d)
    tiles = triton.cdiv(n, chosen.positions)
    per_program = triton.cdiv(b * tiles, config.PROGRAMS)
    programs = triton.cdiv(b * tiles, per_program)
    slabs = x.new_empty(programs, 4, padded, padded, dtype=torch.float32)
    sums = x.new_empty(programs, 4, padded, dtype=torch.float32)
    if padded == 64:  # where registers are few: a tile of float32 weights would spill
        weights = [w.to(x.dtype) for w in weights]
    own = named("conv1 conv2 conv3 conv4 clia1", weights) | named("bias1 bias2 bias3 bias4 clia_bias1", biases)
    launch(
        chain_back_kernel,
        programs,
        x,
        z=z,
        **{name: t for name, t in own.items() if name != "bias4"},
        grads=grads,
        where=where,
        dz=dz,
        slabs=slabs,
        sums=sums,
        samples=b,
        tiles=tiles,
        total=b * tiles,
        n=n,
        **strides("z", z),
        **strides("dz", dz),
        zero=0,
        Q=TRITON_DTYPES[unbounded(x)],
        WIDTH=d,
        D=padded,
        PRECISION=precision(),
        POSITIONS=chosen.positions,
        TILES=per_program,
        num_warps=chosen.warps,
    )
    each, splits = split(b)
    slabs4 = x.new_empty(splits, padded, padded, dtype=torch.float32)
    sums4 = x.new_empty(splits, padded, dtype=torch.float32)
    launch(
        conv4_kernel,
        splits,
        x,
        z=z,
        **{name: own[name] for name in ("conv1", "conv2", "conv3", "bias1", "bias2", "bias3")},
        grads=grads,
        where=where,
        slabs=slabs4,
        sums=sums4,
        samples=b,
        **strides("z", z),
        zero=0,
        WIDTH=d,
        D=padded,
        PRECISION=precision(),
        SAMPLES=each,
        num_warps=4,
    )
    slabs_z = sums_z = None
    if squeeze_weight is not None:
        back([(squeeze_weight.to(x.dtype).contiguous(), dz)], dx)
        slabs_z, sums_z = weight_slabs(dz, x, padded)
    dw, db = ([torch.empty_like(t, memory_format=torch.contiguous_format) for t in some] for some in (weights, biases))
    dsw, dsb = (None if t is None else t.new_empty(t.shape) for t in (squeeze_weight, squeeze_bias))
    rows, part, size = min(16, padded), 1024, 0 if dsw is None else dsw.numel()
    launch(
        chain_sums_kernel,
        5 * padded // rows + triton.cdiv(size, part),
        x,
        slabs=slabs,
        sums=sums,
        slabs4=slabs4,
        sums4=sums4,
        slabs_z=slabs_z,
        sums_z=sums_z,
        **named("conv1 conv2 conv3 conv4 clia1", dw),
        **named("bias1 bias2 bias3 bias4 clia_bias1", db),
        squeeze=dsw,
        squeeze_bias=dsb,
        count=programs,
        splits=splits,
        size=size,
        WIDTH=d,
        D=padded,
        ROWS=rows,
        PART=part,
        num_warps=4,
    )
    return dx, dw, db, dsw, dsb
