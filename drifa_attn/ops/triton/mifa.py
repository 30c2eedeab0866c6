"""The six poolings of one modality of MIFA and their gradients as Triton kernels (for MGIFA and MLIFA, Fig. 3).

One pass over the modality: the poolings of z and of the map t come from the tile that the convolution reads.
Differs: the gradient of an extremum goes to the first of tied positions alone, where ties are those before σ.
"""

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from drifa_attn.ops.tail import cast_like

from . import configs as config
from .common import Pools, finish, higher, launch, partials, peak, precision, product, sigmoid
from .products import (
    MEAN,
    Pull,
    Slot,
    back,
    bias_sums,
    layer,
    new_map,
    rows_of,
    sample_chunks,
    squeeze_back,
    squeezed_map,
    summed,
    unbounded,
    weight_gradient,
)

# min z, mean z, max z, min t, mean t, max t
POOLS = Pools(stats=6, peaks=0b101101, negated=0b001001, sigmoids=0b101000)


@triton.jit
def pools_kernel(
    x,
    weight,
    bias,
    present,
    parts,
    spots,
    n,
    c,
    x_b,
    x_c,
    x_n,
    zero,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Minimum, sum and maximum of a block of channels of `x` and of `W x + bias` (the sum is of its σ), for TILES tiles.

    WHOLE: the block has all channels, so that one tile serves both. A sample that is not `present` is zeros and is not read.
    `zero` is 0, which the compiler cannot know, so that it leaves the loads of the weights in the loop.
    """
    blocks = tl.cdiv(c, ROWS)
    chunks = tl.cdiv(n, POSITIONS * TILES)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(0) // blocks % chunks
    b = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    inside = row < c
    x_sum = tl.zeros((ROWS,), tl.float32)
    t_sum = tl.zeros((ROWS,), tl.float32)
    x_low = tl.full((ROWS,), float("-inf"), tl.float32)  # the maximum of −x
    x_top = tl.full((ROWS,), float("-inf"), tl.float32)
    z_low = tl.full((ROWS,), float("-inf"), tl.float32)
    z_top = tl.full((ROWS,), float("-inf"), tl.float32)
    x_low_at = tl.zeros((ROWS,), tl.int32)
    x_top_at = tl.zeros((ROWS,), tl.int32)
    z_low_at = tl.zeros((ROWS,), tl.int32)
    z_top_at = tl.zeros((ROWS,), tl.int32)
    for tile in tl.range(TILES, num_stages=1):
        p = (chunk * TILES + tile) * POSITIONS + tl.arange(0, POSITIONS)
        ok = (p < n)[None, :]
        readable = ok
        if present is not None:
            readable = ok & (tl.load(present + b) != 0)
        here = x + b * x_b + p[None, :] * x_n
        a = tl.load(here + row[:, None] * x_c, mask=inside[:, None] & readable, other=0.0)
        z = tl.zeros((ROWS, POSITIONS), tl.float32)
        if WHOLE:
            k = tl.arange(0, ROWS)
            w = tl.load(
                weight + tile * zero + row[:, None] * c + k[None, :], mask=inside[:, None] & (k < c)[None, :], other=0.0
            )
            z = product(w, a, z, PRECISION)
        else:
            for first in range(0, c, DEPTH):
                k = first + tl.arange(0, DEPTH)
                w = tl.load(weight + row[:, None] * c + k[None, :], mask=inside[:, None] & (k < c)[None, :], other=0.0)
                u = tl.load(here + k[:, None] * x_c, mask=(k < c)[:, None] & readable, other=0.0)
                z = product(w, u, z, PRECISION)
        z += tl.load(bias + tile * zero + row, mask=inside, other=0.0)[:, None]
        value = a.to(tl.float32)
        x_sum += tl.sum(value, 1)
        top, at = peak(-value, ok, p)
        x_low, x_low_at = higher(x_low, x_low_at, top, at)
        top, at = peak(value, ok, p)
        x_top, x_top_at = higher(x_top, x_top_at, top, at)
        t_sum += tl.sum(tl.where(ok, sigmoid(z), 0.0), 1)
        top, at = peak(-z, ok, p)
        z_low, z_low_at = higher(z_low, z_low_at, top, at)
        top, at = peak(z, ok, p)
        z_top, z_top_at = higher(z_top, z_top_at, top, at)
    slot = b * chunks + chunk
    tl.store(parts + (slot * 6 + 0) * c + row, x_low, mask=inside)
    tl.store(parts + (slot * 6 + 1) * c + row, x_sum, mask=inside)
    tl.store(parts + (slot * 6 + 2) * c + row, x_top, mask=inside)
    tl.store(parts + (slot * 6 + 3) * c + row, z_low, mask=inside)
    tl.store(parts + (slot * 6 + 4) * c + row, t_sum, mask=inside)
    tl.store(parts + (slot * 6 + 5) * c + row, z_top, mask=inside)
    tl.store(spots + (slot * 4 + 0) * c + row, x_low_at, mask=inside)
    tl.store(spots + (slot * 4 + 1) * c + row, x_top_at, mask=inside)
    tl.store(spots + (slot * 4 + 2) * c + row, z_low_at, mask=inside)
    tl.store(spots + (slot * 4 + 3) * c + row, z_top_at, mask=inside)


def mifa_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    present: Tensor | None,
    places: bool = True,
) -> tuple[Tensor, Tensor]:
    """The six poolings of one modality, and the positions of the four extrema, which it finds with or without `places`.

    weight and bias are those of the modality's convolution. The squeeze, or None, is the reduction `z = lin(squeeze, x)` before
    it. present says which samples have this modality; the features of the others count as zeros and are not read.

    Shape: x `b c n` of any strides, weight `d d`, bias `d`, squeeze `d c` and `d`, present `b`; -> stats `6 b d` float32
    (minimum, mean and maximum of z, then of t), where `4 b d` int32 (first position of the minimum and maximum of z, then
    of t, before σ).
    """
    b, d, n = x.shape[0], weight.shape[0], x.shape[2]
    present = None if present is None else present.contiguous()  # a column of `b m` has a stride
    z = squeezed_map(x, squeeze_weight, squeeze_bias, present)
    tile = config.pools(z, d)
    chunks = triton.cdiv(n, tile.positions * tile.tiles)
    parts, spots = partials(x, POOLS, chunks, d)
    rows = min(128, config.power_of_two(d))
    launch(
        pools_kernel,
        b * chunks * triton.cdiv(d, rows),
        x,
        x=z,
        weight=weight.to(x.dtype).contiguous(),
        bias=bias.float(),
        present=present if squeeze_weight is None else None,
        parts=parts,
        spots=spots,
        n=n,
        c=d,
        x_b=z.stride(0),
        x_c=z.stride(1),
        x_n=z.stride(2),
        zero=0,
        WHOLE=d <= rows,
        PRECISION=precision(),
        ROWS=rows,
        POSITIONS=tile.positions,
        TILES=tile.tiles,
        DEPTH=min(tile.depth, rows),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return finish(x, POOLS, parts, spots, d)


def mifa_backward(
    grads: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    present: Tensor | None,
    stats: Tensor,
    where: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `mifa_forward`, recomputed from `x` a few samples at a time.

    Shape: grads and stats `6 b d`, where `4 b d`; -> those of x, weight, bias and, None without a squeeze, its two.
    """
    dx = torch.empty_like(x)
    n, squeezed = x.shape[2], squeeze_weight is not None
    weight_, bias_ = weight.to(x.dtype).contiguous(), bias.float()
    low_z, mean_z, top_z, low_t, mean_t, top_t = grads.float().contiguous()
    in_z = Pull(mean_z / n, torch.stack([low_z, top_z], 1), torch.stack([where[0], where[1]], 1))
    in_t = Pull(mean_t / n, torch.stack([low_t, top_t], 1), torch.stack([where[2], where[3]], 1))

    def samples(s: slice) -> list[Tensor]:
        has = None if present is None else rearrange(present[s], "b -> b 1 1")
        part = x[s] if has is None else torch.where(has, x[s], 0)
        z = squeezed_map(part, squeeze_weight, squeeze_bias)
        q, sums = new_map(z, weight.shape[0], unbounded(x)), bias_sums(z, weight.shape[0])
        layer(z, weight_, bias_, slot=Slot(MEAN, sums, sums), out=q, pull=in_t.of(s))
        dz = new_map(z, weight.shape[0], unbounded(x)) if squeezed else dx[s]
        back([(weight_, q)], dz, pull=in_z.of(s))
        gradients = [weight_gradient(q, rows_of(z)), sums.sum((0, 1, 2))]
        if squeeze_weight is not None:
            gradients += squeeze_back(dz, part, squeeze_weight, dx[s])
        if has is not None:
            dx[s].masked_fill_(~has, 0)
        return gradients

    dw, db, *through = summed(samples(s) for s in sample_chunks(x, weight.shape[0]))
    own = cast_like((dw, db), (weight, bias))
    if squeeze_weight is None or squeeze_bias is None:
        return dx, own[0], own[1], None, None
    dsw, dsb = cast_like(through, (squeeze_weight, squeeze_bias))
    return dx, own[0], own[1], dsw, dsb
